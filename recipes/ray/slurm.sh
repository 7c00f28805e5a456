#!/usr/bin/env bash
#SBATCH --job-name=opd
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
# Runs a recipe on the nodes of a SLURM job: starts Ray on them, waits until all have joined, submits the recipe with
# submit.sh and trainer.nnodes set, stops Ray and exits as the recipe does. From the root of the repository:
#
#   sbatch --nodes=4 recipes/ray/slurm.sh recipes/grpo/qwen3_8b.sh [OPTIONS OF submit.sh] [-- OVERRIDES...]
#
# OPD_RAY_HEAD_IP         the head's address on the network between nodes      the first of `hostname -I`
# OPD_RAY_PORT            Ray's port on the head                               6379
# OPD_RAY_DASHBOARD_PORT  its job server's port                                8265
# OPD_RAY_START           more options of `ray start`, for every node          none
# OPD_RAY_WAIT            seconds that the nodes have to join                  600
set -euo pipefail

die() { printf 'slurm.sh: %s\n' "$*" >&2; exit 2; }

[[ -n ${SLURM_JOB_NODELIST:-} ]] || die "this is no SLURM job; start it with sbatch recipes/ray/slurm.sh RECIPE."
cd "${SLURM_SUBMIT_DIR:-.}" # sbatch runs a copy of this file from a folder of its own
[[ -x recipes/ray/submit.sh ]] || die "$PWD is not the repository; run sbatch from its root, or with --chdir."
(($#)) || die "name a recipe, e.g. sbatch recipes/ray/slurm.sh recipes/grpo/qwen3_8b.sh."
if [[ -x ${OPD_VENV:-.venv}/bin/ray ]]; then PATH=$(cd "${OPD_VENV:-.venv}/bin" && pwd):$PATH; fi
export PATH
command -v ray >/dev/null || die "ray is not on PATH; run bash setup.sh --gpu on storage that all nodes share."

options=()
while (($#)) && [[ $1 != -- ]]; do options+=("$1"); shift; done
if (($#)); then shift; fi

names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
mapfile -t nodes <<<"$names"
count=${#nodes[@]} head=${nodes[0]}
port=${OPD_RAY_PORT:-6379} dashboard=${OPD_RAY_DASHBOARD_PORT:-8265}
read -ra more <<<"${OPD_RAY_START:-}"

# Without --cpus-per-task a step gets one core of the node.
step=(--ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}")
ip=${OPD_RAY_HEAD_IP:-}
if [[ -z $ip ]]; then
    addresses=$(srun --nodes=1 --ntasks=1 "${step[@]}" --nodelist="$head" hostname -I)
    ip=${addresses%% *}
fi

# Others may have accounts on these nodes: Ray answers only who has this job's token.
export RAY_AUTH_MODE=token
if [[ -z ${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-} ]]; then
    RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
    export RAY_AUTH_TOKEN
fi

steps=()
stop_ray() {
    trap - EXIT
    for pid in "${steps[@]}"; do kill "$pid" 2>/dev/null || true; done # srun hands the signal on; ray start stops
    wait || true
}
trap stop_ray EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

srun --nodes=1 --ntasks=1 "${step[@]}" --nodelist="$head" \
    ray start --head --block --node-ip-address="$ip" --port="$port" \
    --dashboard-host="$ip" --dashboard-port="$dashboard" "${more[@]}" &
steps+=($!)
python3 - "http://$ip:$dashboard" "${OPD_RAY_WAIT:-600}" <<'EOF_PYTHON' || die "Ray's head did not start on $head; see its lines above."
import sys, time, urllib.error, urllib.request

end = time.monotonic() + float(sys.argv[2])
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
while time.monotonic() < end:
    try:
        direct.open(sys.argv[1], timeout=5)
        sys.exit(0)
    except urllib.error.HTTPError:  # it wants the token: it is there
        sys.exit(0)
    except OSError:
        time.sleep(1)
sys.exit(1)
EOF_PYTHON

if ((count > 1)); then
    others=$(IFS=, && echo "${nodes[*]:1}")
    srun --nodes=$((count - 1)) --ntasks=$((count - 1)) "${step[@]}" --nodelist="$others" \
        ray start --block --address="$ip:$port" "${more[@]}" &
    steps+=($!)
fi
python3 - "$ip:$port" "$count" "${OPD_RAY_WAIT:-600}" <<'EOF_PYTHON' || die "not all of $count nodes joined Ray; see the lines above."
import sys, time

import ray

address, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
ray.init(address=address, log_to_driver=False, logging_level="warning")
end = time.monotonic() + seconds
while (alive := sum(node["Alive"] for node in ray.nodes())) < count:
    if time.monotonic() > end:
        sys.exit(f"slurm.sh: {alive} of {count} nodes have joined Ray after {seconds:.0f} s.")
    time.sleep(1)
print(f"{alive} nodes have joined Ray", flush=True)
EOF_PYTHON

code=0
recipes/ray/submit.sh "${options[@]}" --address "http://$ip:$dashboard" -- "trainer.nnodes=$count" "$@" || code=$?
exit "$code"
