# SPDX-License-Identifier: Apache-2.0
"""The image files of `docker/`, played without a container engine: same files, same commands, a folder for a root."""

import fnmatch
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ("cpu", "gpu")
SYSTEM = ("apt-get", "useradd")  # what needs the distribution's root


def instructions(image: str) -> list[tuple[str, str]]:
    """``(instruction, its words)`` of an image file, continued lines joined."""
    text = (ROOT / "docker" / f"Dockerfile.{image}").read_text()
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1].strip()) for line in lines if line.strip()]


def copies(image: str) -> list[tuple[list[str], str]]:
    """``(sources, target)`` of every COPY."""
    return [named(rest) for do, rest in instructions(image) if do == "COPY"]


def named(copy: str) -> tuple[list[str], str]:
    *sources, target = [word for word in shlex.split(copy) if not word.startswith("--")]
    return sources, target


def send_context(target: Path) -> None:
    """Copy what a container engine is sent: tracked files that `.dockerignore` lets in."""
    rules = [rule for rule in (ROOT / ".dockerignore").read_text().splitlines() if rule and rule[0] != "#"]
    rules = [rule for rule in rules if not rule.startswith("**/")]  # caches, of which none is tracked
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    for name in listed.stdout.splitlines():
        sent = True
        for rule in rules:
            if any(fnmatch.fnmatch(str(part), rule.removeprefix("!")) for part in (name, *Path(name).parents)):
                sent = rule.startswith("!")
        if sent and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    send_context(folder)
    return folder


@pytest.mark.parametrize("image", IMAGES)
def test_the_context_holds_what_an_image_copies(image, context):
    for sources, _ in copies(image):
        for source in sources:
            assert (context / source).exists(), f"COPY {source}: .dockerignore keeps it out"


def test_the_context_holds_what_a_container_runs(context):
    assert (context / "recipes" / "crisp" / "qwen3_8b.sh").exists() and (context / "recipes" / "common.sh").exists()
    assert not (context / "tests").exists() and not (context / ".git").exists()


def test_both_images_install_from_the_same_files():
    """So that playing the one below says something about the other."""
    assert copies("cpu") == copies("gpu")


def test_what_an_image_installs_from_can_be_imported(context, tmp_path):
    """Setting up ends with an import; a module that the package's first file had come to need was not copied yet."""
    before = instructions("cpu")[: instructions("cpu").index(("RUN", "bash setup.sh --cpu"))]
    for sources, target in (named(rest) for do, rest in before if do == "COPY"):
        for source in sources:
            if source.endswith(".py"):
                (tmp_path / target).mkdir(exist_ok=True)
                shutil.copy2(context / source, tmp_path / target)
    done = subprocess.run(
        [sys.executable, "-c", "import opd_ext; print(opd_ext.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(tmp_path / "opd_ext" / "__init__.py"), done.stderr


def test_the_commands_of_the_documents_name_what_there_is():
    text = (ROOT / "docker" / "README.md").read_text() + (ROOT / "README.md").read_text()
    named = set(re.findall(r"docker/Dockerfile\.\w+|recipes/[\w/]+\.sh", text))
    assert {"docker/Dockerfile.cpu", "docker/Dockerfile.gpu"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []


def documented(command: str) -> list[list[str]]:
    """The words of every `docker build` or `docker run` of the documents, comments and line ends taken away."""
    text = (ROOT / "docker" / "README.md").read_text() + (ROOT / "README.md").read_text()
    lines = re.findall(rf"^docker {command} .*$", re.sub(r"\\\n\s*", "", text), flags=re.MULTILINE)
    assert lines
    return [shlex.split(line, comments=True)[2:] for line in lines]


def values(words: list[str], *flags: str) -> list[str]:
    """What follows each of these flags."""
    return [value for flag, value in itertools.pairwise(words) if flag in flags]


def started(words: list[str]) -> tuple[str, list[str]]:
    """Image and command of a `docker run`."""
    (place,) = (place for place, word in enumerate(words) if word.startswith("opd-ext:"))
    return words[place], words[place + 1 :]


def test_the_builds_of_the_documents_fit_the_image_files():
    for words in documented("build"):
        (file,), (tag,) = values(words, "-f"), values(words, "-t")
        image = file.rpartition(".")[2]
        assert tag == f"opd-ext:{image}" and words[-1] == "."
        arguments = {rest.partition("=")[0] for do, rest in instructions(image) if do == "ARG"}
        assert {value.partition("=")[0] for value in values(words, "--build-arg")} <= arguments
    offered = set(re.findall(r"--build-arg (\w+)", (ROOT / "docker" / "README.md").read_text()))
    assert offered <= {rest.partition("=")[0] for image in IMAGES for do, rest in instructions(image) if do == "ARG"}


def test_the_containers_of_the_documents_run_what_is_in_the_image(context):
    """Known images, mounts on the folders in which runs and models are looked for, and scripts that were copied."""
    for words in documented("run"):
        image, command = started(words)
        name = image.partition(":")[2]
        (place,) = (rest for do, rest in instructions(name) if do == "WORKDIR")
        assert name in IMAGES
        targets = {value.split(":")[1] for value in values(words, "-v")}
        assert targets <= {f"{place}/runs", "/home/opd/.cache", "/models", "/data"}
        given = [value.partition("=")[2] for value in values(words, "-e")]
        for target in targets & {"/models", "/data"}:
            assert any(value.startswith(target) for value in given), f"nothing reads {target}"
        assert not command or {f"{place}/runs", "/home/opd/.cache"} <= targets, "nothing of a run would be left"
        assert all((context / word).is_file() for word in command if "/" in word)


@pytest.mark.slow  # installs the whole stack once more
def test_the_image_of_the_cpu_stack_builds_and_its_container_plans_a_run(context, tmp_path):
    """Every COPY and every RUN that needs no root, in their order, then the container's own command and a dry run."""
    home = tmp_path / "home"
    env = {"HOME": str(home), "PATH": f"{Path(sys.executable).resolve().parent}:/usr/bin:/bin", "LANG": "C.UTF-8"}
    index = ("PIP_", "SSL_", "HTTP", "NO_P")  # how this machine reaches packages
    env |= {name: value for name, value in os.environ.items() if name.upper().startswith(index)}
    place = home

    def inside(text: str) -> str:
        return text.replace("/home/opd", str(home))

    def run(line: str) -> str:
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        done = subprocess.run(["bash", "-c", line], cwd=place, env=env, timeout=900, **output)
        assert done.returncode == 0, f"{line}\n{done.stdout[-4000:]}"
        return done.stdout

    doctor = ""
    for do, rest in instructions("cpu"):
        if do == "WORKDIR":
            place = Path(inside(rest))
            place.mkdir(parents=True)
        elif do in ("ENV", "ARG"):
            for assigned in shlex.split(inside(rest)):
                name, _, value = assigned.partition("=")
                env[name] = value.replace("$PATH", env["PATH"])
        elif do == "COPY":
            sources, target = named(rest)
            if target.endswith("/"):
                (place / target).mkdir(parents=True, exist_ok=True)
            for source in sources:
                if (context / source).is_dir():
                    shutil.copytree(context / source, place / target, dirs_exist_ok=True)
                else:
                    shutil.copy2(context / source, place / target)
        elif do == "RUN" and not rest.startswith(SYSTEM):
            run(inside(rest))
        elif do == "CMD":
            doctor = run(shlex.join(json.loads(rest)))
    assert "cpu stack" in doctor
    assert run("python -c 'import opd_ext; print(opd_ext.__file__)'").startswith(str(place))
    commands = [command for image, command in map(started, documented("run")) if image == "opd-ext:cpu" and command]
    assert commands
    for command in commands:
        assert "passes this package's schema" in run(shlex.join([*command, "--dry-run"]))
