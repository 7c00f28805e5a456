# SPDX-License-Identifier: Apache-2.0
"""`setup.sh --gpu`: what the machine lacks is said before anything is installed, and a failure names what failed.

The script, pip's search for a wheel and the environment's Python are the real ones; what a test cannot have, the
driver, nvcc and 20 GB of packages, are programs that answer as the real ones do (`pip install` writes down its call).
Where a test offers no wheels, pip's real search is left out: it costs a second and finds nothing.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
H200 = "580.95.05, 9.0"
TOOLS = "bash awk basename cat cp cut df dirname env grep head mkdir rm sed sha256sum sleep sort tail tr wc"

# A Python that makes an environment of itself. `pip install` and imports are calls to write down, and the first one
# that $FAILS matches (a pattern of `case`) prints $SAYS and fails; the rest is the real Python's.
PYTHON = f"""#!/bin/bash
me=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
call() {{
    printf '%s | %s | %s\\n' "$*" "${{FLASH_ATTENTION_FORCE_BUILD-}}" "${{FLASH_ATTN_CUDA_ARCHS-unset}}" >>"$CALLS"
    case "$*" in ${{FAILS:-nothing}}) printf '%b\\n' "$SAYS"; exit 1 ;; esac
    printf '%b\\n' "${{CHATTER-}}"
}}
case "$*" in
    "-m venv "*) echo "${{0##*/}} $*" >>"$CALLS"; mkdir -p "$3/bin"; cp "$me" "$3/bin/python" ;;
    "-m pip download "*) [[ -n ${{PIP_FIND_LINKS-}}${{OPD_FLASH_ATTN_INDEX_URL-}} ]] && exec {sys.executable} "$@"
        echo "ERROR: No matching distribution found for ${{@: -1}}"; exit 1 ;;
    "-m pip install "* | "-m pip check" | "-c import torch"* | "-c import reasoning_gym") call "$*" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


@dataclass
class Machine:
    """A folder with the files that setup.sh reads, and a PATH with nothing but what a test puts there."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def program(self, name: str, text: str) -> None:
        file = self.folder / "bin" / name
        file.write_text(text)
        file.chmod(0o755)

    def driver(self, *gpus: str) -> None:
        lines = "\\n".join(gpus)
        self.program("nvidia-smi", f'#!/bin/bash\n[[ "$*" == *driver_version,compute_cap* ]] && printf "{lines}\\n"\n')

    def nvcc(self, release: str) -> None:
        text = f"Cuda compilation tools, release {release}, V{release}.88"
        self.program("nvcc", f"#!/bin/bash\necho 'nvcc: NVIDIA (R) Cuda compiler driver'\necho '{text}'\n")
        del self.environment["CUDA_HOME"]

    def wheel(self, folder: str, version: str = "2.8.3+cu130torch2.11", tag: str = "py3-none-any") -> Path:
        """A wheel that pip accepts."""
        there = self.folder / folder
        there.mkdir(parents=True, exist_ok=True)
        path, info = there / f"flash_attn-{version}-{tag}.whl", f"flash_attn-{version}.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: flash_attn\nVersion: {version}\n")
            archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
            archive.writestr(f"{info}/RECORD", "")
        return path

    def setup(self, *options: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "setup.sh", *(options or ("--gpu",))],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def installed(self) -> list[str]:
        """What `pip install` was asked for, in order."""
        made = [call.split(" | ")[0] for call in self.calls if call.startswith("-m pip install")]
        return [call.partition("gpu.txt ")[2] or call.partition("cpu.txt ")[2] for call in made]

    def refused(self, sentence: str, **environment: str) -> None:
        """Setup fails with this sentence, has installed nothing and leaves no environment behind."""
        done = self.setup(**environment)
        assert done.returncode == 1 and sentence in done.stdout.splitlines()[-1], done.stdout
        assert self.installed() == [] and not (self.folder / ".venv").exists()


@pytest.fixture
def machine(tmp_path):
    folder = tmp_path / "repository"
    (folder / "bin").mkdir(parents=True)
    (folder / "calls").touch()
    for name in ("setup.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "opd_ext" / "constraints", folder / "opd_ext" / "constraints")
    for tool in TOOLS.split():
        os.symlink(shutil.which(tool), folder / "bin" / tool)
    index = tmp_path / "empty" / "simple"
    index.mkdir(parents=True)
    environment = {
        "PATH": str(folder / "bin"),
        "HOME": str(tmp_path),
        "CALLS": str(folder / "calls"),
        "CUDA_HOME": str(tmp_path / "no-toolkit"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": index.as_uri(),
        "PIP_NO_CACHE_DIR": "1",
    }
    made = Machine(folder, environment)
    made.program("python3.11", PYTHON)
    made.program("c++", "#!/bin/bash\n")
    made.driver(*[H200] * 8)
    return made


def test_a_wheel_is_taken_before_anything_is_compiled(machine):
    wheel = machine.wheel("wheels")
    done = machine.setup(PIP_FIND_LINKS=str(wheel.parent))
    assert done.returncode == 0, done.stdout
    torch, needs, flash, rest, gym = machine.installed()
    assert (torch, needs) == ("--no-deps torch==2.11.0", "torch==2.11.0")
    assert flash == f"--no-deps --no-index {Path('.venv', 'flash-attn', wheel.name)}"
    assert (rest, gym) == ("-e .[gpu]", "-e .[gym]")
    loaded = [call for call in machine.calls if "flash_attn_2_cuda" in call]
    assert loaded and machine.calls.index(loaded[0]) < next(i for i, c in enumerate(machine.calls) if "-e .[gpu]" in c)


def test_an_index_of_wheels_serves_flash_attn_alone(machine):
    wheel = machine.wheel("index/simple/flash-attn")
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>')
    done = machine.setup(OPD_FLASH_ATTN_INDEX_URL=wheel.parents[1].as_uri())
    assert done.returncode == 0, done.stdout
    assert f"found {wheel.name}" in done.stdout
    assert not [call for call in machine.calls if "--index-url" in call]


@pytest.mark.parametrize("version, tag", [("2.8.2", "py3-none-any"), ("2.8.3", "cp27-cp27m-any")])
def test_a_wheel_of_another_version_or_python_is_not_taken(machine, version, tag):
    machine.refused("there is no nvcc", PIP_FIND_LINKS=str(machine.wheel("wheels", version, tag).parent))


def test_without_wheel_and_nvcc_nothing_is_installed(machine):
    machine.refused("put a wheel in PIP_FIND_LINKS or name an index of wheels in OPD_FLASH_ATTN_INDEX_URL, or install")


def test_another_cuda_than_torchs_is_refused_before_anything_is_installed(machine):
    machine.nvcc("12.8")
    machine.refused("nvcc is CUDA 12.8 and torch is CUDA 13, so flash-attn cannot be compiled")


def test_the_toolkit_is_looked_for_where_torch_looks(machine):
    """CUDA_HOME wins over PATH, as in torch.utils.cpp_extension."""
    machine.nvcc("13.0")
    machine.refused("(looked for /no/toolkit/bin/nvcc)", CUDA_HOME="/no/toolkit")


def test_a_compilation_needs_a_compiler(machine):
    machine.nvcc("13.0")
    (machine.folder / "bin" / "c++").unlink()
    machine.refused("there is no C++ compiler (c++) to compile flash-attn: install g++")


def test_a_compilation_needs_pythons_headers(machine):
    machine.nvcc("13.0")
    odd = PYTHON.replace("    *) exec", '    "-c import sysconfig"*) echo /no/include ;;\n    *) exec')
    machine.program("python3.11", odd)
    machine.refused("/no/include/Python.h is missing")


@pytest.mark.parametrize(
    ("gpus", "given", "archs"),
    [
        ([H200] * 8, {}, "90"),
        (["580.95.05, 8.9", "580.95.05, 9.0", "580.95.05, 8.6"], {}, "80;90"),
        (["590.10, 10.3"], {}, "100"),
        ([H200], {"FLASH_ATTN_CUDA_ARCHS": "80"}, "80"),
    ],
)
def test_flash_attn_is_compiled_for_the_gpus_that_are_here(machine, gpus, given, archs):
    machine.nvcc("13.0")
    machine.driver(*gpus)
    done = machine.setup(**given)
    assert done.returncode == 0, done.stdout
    (call,) = [call for call in machine.calls if "--no-build-isolation" in call]
    assert call.split(" | ")[1:] == ["TRUE", archs]
    names = machine.installed()
    assert names[2] == "ninja packaging psutil setuptools wheel"
    assert names[3] == "--no-build-isolation --no-deps flash-attn==2.8.3"
    assert names.index("-e .[gpu]") > 3  # the hour of compiling is not spent after 15 GB


def test_an_image_is_built_without_a_driver(machine):
    machine.nvcc("13.0")
    machine.program("nvidia-smi", "#!/bin/bash\necho 'NVIDIA-SMI has failed'; exit 9\n")
    done = machine.setup()
    assert done.returncode == 0, done.stdout
    assert "no driver answers here" in done.stdout and "580.65.06 or newer" in done.stdout
    (call,) = [call for call in machine.calls if "--no-build-isolation" in call]
    assert call.endswith(" | unset")


@pytest.mark.parametrize("driver", ["570.172.08", "580.65.05", "535.9"])
def test_an_old_driver_is_refused_first(machine, driver):
    machine.driver(f"{driver}, 9.0")
    machine.refused(f"the NVIDIA driver is {driver}, and torch's CUDA 13 build needs 580.65.06 or newer: update it.")


def test_a_gpu_that_flash_attn_does_not_know_is_refused_first(machine):
    machine.driver("580.65.06, 7.5")
    machine.refused("flash-attn runs on Ampere or newer GPUs (compute capability 8.0), and one here has 7.5.")


@pytest.mark.parametrize(("option", "wanted"), [("--gpu", "python3.12"), ("--cpu", "python3.11")])
def test_gpu_wheels_are_built_for_3_12(machine, option, wanted):
    machine.program("python3.12", PYTHON)
    done = machine.setup(option, PIP_FIND_LINKS=str(machine.wheel("wheels").parent))
    assert done.returncode == 0, done.stdout
    assert machine.calls[0] == f"{wanted} -m venv .venv"


@pytest.mark.parametrize(
    ("fails", "says", "sentence"),
    [
        ("*flash-attn==*", "nvcc error", "flash-attn could not be compiled; the lines above end its log"),
        ("*flash-attn==*", "x.cu: Killed signal terminated program cc1plus", "lower MAX_JOBS"),
        ("*flash-attn==*", "OSError: [Errno 28] No space left on device", "the disk is full: the gpu stack needs"),
        ("*flash_attn_2_cuda*", "undefined symbol: _ZN3c10", "built for another torch or CUDA than torch==2.11.0"),
        # Packages are called nvidia-cuda-nvcc; the next one is what failed.
        (
            "*-e?.?gpu?*",
            "Collecting nvidia-cuda-nvcc==13.2.86\\nERROR: No matching distribution found for torchcodec",
            "the last step failed; the lines above",
        ),
        ("*ninja*", "Retrying after connection broken by 'ProxyError'", "the package index cannot be reached"),
    ],
)
def test_a_failure_names_what_failed(machine, fails, says, sentence):
    machine.nvcc("13.0")
    done = machine.setup(FAILS=fails, SAYS=says)
    assert done.returncode == 1 and sentence in done.stdout.splitlines()[-1], done.stdout
    assert says.split("\\n")[-1] in done.stdout


def test_what_earlier_steps_said_is_not_blamed(machine):
    """A download that was tried again, a package called nvcc: neither made the last step fail."""
    machine.nvcc("13.0")
    done = machine.setup(
        FAILS="*-e?.?gpu?*", SAYS="no wheel", CHATTER="ReadTimeoutError; Killed signal; nvcc CUDA_HOME"
    )
    assert "setup.sh: the last step failed;" in done.stdout.splitlines()[-1], done.stdout


def test_an_index_that_cannot_be_reached_is_not_taken_for_a_wheel_that_is_missing(machine):
    machine.refused(
        "the package index cannot be reached",
        OPD_FLASH_ATTN_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_RETRIES="1",
        PIP_DEFAULT_TIMEOUT="2",
    )


def test_an_environment_that_was_there_stays_when_it_cannot_be_filled(machine):
    machine.setup(PIP_FIND_LINKS=str(machine.wheel("wheels").parent))
    with (machine.folder / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    done = machine.setup()
    assert done.returncode == 1 and "there is no nvcc" in done.stdout.splitlines()[-1]
    assert (machine.folder / ".venv" / "bin" / "python").exists()
