#!/usr/bin/env bash
# Submits a recipe to a Ray cluster, follows its log and exits as the recipe does. See README.md beside this file.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: recipes/ray/submit.sh RECIPE [--address URL] [--env NAME[=VALUE]]... [--no-follow] [-- OVERRIDES...]

  RECIPE       an executable script of this repository, e.g. recipes/crisp/qwen3_8b.sh
  --address    the cluster's job server (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265)
  --env        give the job a variable besides those that README.md lists; without a value, the one it has here
  --no-follow  return once the job is accepted
  OVERRIDES    handed to the recipe, e.g. trainer.total_training_steps=2
EOF
}

die() { printf 'submit.sh: %s\n' "$*" >&2; exit 2; }

recipe="" follow=1 named=() address=${RAY_API_SERVER_ADDRESS:-${RAY_ADDRESS:-http://127.0.0.1:8265}}
while (($#)); do
    case $1 in
        --address) (($# > 1)) || die "--address needs a URL, e.g. http://head:8265."; address=$2; shift ;;
        --env)
            (($# > 1)) || die "--env needs NAME or NAME=VALUE, e.g. NCCL_DEBUG=INFO."
            [[ ${2%%=*} =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "--env $2: '${2%%=*}' is not a name of a variable."
            if [[ $2 == *=* ]]; then named+=("$2")
            elif [[ -v $2 ]]; then named+=("$2=${!2}")
            else die "--env $2: $2 is not set here; give it a value with --env $2=VALUE."; fi
            shift ;;
        --no-follow) follow=0 ;;
        -h | --help) usage; exit 0 ;;
        --) shift; break ;;
        -*) die "unknown option $1; arguments of the recipe go behind --." ;;
        *) [[ -z $recipe ]] || die "one recipe at a time: $recipe and $1; overrides go behind --."; recipe=$1 ;;
    esac
    shift
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[[ -n $recipe ]] || { usage >&2; exit 2; }
[[ -f $recipe ]] || die "$recipe does not exist."
[[ -x $recipe ]] || die "$recipe is not executable; run chmod +x $recipe."
recipe=$(realpath --relative-to="$root" "$recipe")
[[ $recipe != ../* ]] || die "$recipe lies outside $root, which is all that the cluster gets to see."
[[ $address == http://* || $address == https://* ]] ||
    die "'$address' is not a job server; give its web address with --address, e.g. http://head:8265."

cd "$root"
venv=${OPD_VENV:-.venv}
if [[ -x $venv/bin/ray ]]; then PATH=$(cd "$venv/bin" && pwd):$PATH; fi
command -v ray >/dev/null || die "ray is not installed here; run bash setup.sh or put ray on PATH."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if ! ray job list --address "$address" >"$scratch/probe" 2>&1; then
    if grep -q 'AuthenticationError' "$scratch/probe"; then
        die "$address wants its token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the token file of the cluster."
    fi
    die "no job server answers at $address; start one with ray start --head, or forward its port (see README.md)."
fi

# The file, not the command line, carries the environment: command lines are visible to every user of a machine.
: >"$scratch/named"
if ((${#named[@]})); then printf '%s\0' "${named[@]}" >"$scratch/named"; fi
python3 - "$scratch/runtime_env.yaml" "$scratch/named" <<'EOF'
import json, os, re, sys

# Left out: what is true of this machine alone.
passed_on = re.compile(
    r"(OPD|HF|WANDB|NCCL|GLOO|TORCH|VLLM)_(?!VENV$|TORCH_INDEX_URL$|WARM_PYTHON$|HOST_IP$)|\w+_(proxy|PROXY)$"
)
named = os.fsdecode(open(sys.argv[2], "rb").read()).split("\0")[:-1]
runtime_env = {
    "env_vars": {name: value for name, value in os.environ.items() if passed_on.match(name) and value}
    | dict(pair.split("=", 1) for pair in named),
    "excludes": ["/.git/", "/.venv/", "/runs/", "/outputs/", "/data/", "/checkpoints/", "/wandb/",
                 "__pycache__/", "*.safetensors", "*.pt", "*.parquet", "!/opd_ext/tinymath/shipped/**"],
}
json.dump(runtime_env, open(sys.argv[1], "w"))  # JSON is YAML
EOF

name=$(tr -c '[:alnum:]\n' '-' <<<"${recipe%.*}")
id=${name#recipes-}-$(date +%Y%m%d-%H%M%S)-$RANDOM
ray job submit --address "$address" --submission-id "$id" --no-wait --working-dir . \
    --runtime-env "$scratch/runtime_env.yaml" -- "./$recipe" "$@" >"$scratch/submit" 2>&1 ||
    { cat "$scratch/submit" >&2; die "the job server refused $recipe; its answer stands above."; }
echo "submitted $id to $address"
[[ -n ${OPD_RUNS:-} ]] || echo "note: OPD_RUNS is not set, so the run folder ends up in this job's scratch folder on the head node."
((follow)) || exit 0

trap 'echo; echo "$id keeps running; stop it with: ray job stop --address $address $id"; exit 130' INT
ray job logs --address "$address" --follow "$id" || echo "submit.sh: the log broke off; waiting for $id to end." >&2

# `ray job submit` itself answers every failure with 1; the job's record has the recipe's own exit code.
python3 - "$address" "$id" <<'EOF'
import sys, time
from ray.job_submission import JobSubmissionClient

client = JobSubmissionClient(sys.argv[1])
while not (job := client.get_job_info(sys.argv[2])).status.is_terminal():
    time.sleep(2)
print(sys.argv[2], job.status.lower())
if job.status != "SUCCEEDED":
    print(job.message.split(", last available logs")[0], file=sys.stderr)
    sys.exit(max(job.driver_exit_code or 1, 1))  # stopped jobs have none, or a signal's negative number
EOF
