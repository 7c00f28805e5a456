#!/usr/bin/env bash
# All on-policy methods on the miniature world: the same base, the same number of rollouts, several seeds, one table.
#
#   recipes/compare/tiny_cpu.sh                                  8 methods x 3 seeds, one after the other
#   METHODS="grpo sdpo" SEEDS="1 2" recipes/compare/tiny_cpu.sh  some of them
#   JOBS=2 recipes/compare/tiny_cpu.sh                           two runs at a time (4 cores carry two)
#   recipes/compare/tiny_cpu.sh trainer.total_training_steps=20  any setting can be overridden, for all runs alike
#
# Every run has a folder of its own in ${OPD_RUNS:-runs}/compare. Started again, finished runs are left alone and
# interrupted ones go on from their last checkpoint. The table and the figure are comparison.{md,json,png} there.
set -euo pipefail

METHODS=${METHODS:-grpo cispo opd iw_opd crisp opsd sdpo trace}
SEEDS=${SEEDS:-1 2 3}
JOBS=${JOBS:-1}
STEPS=${STEPS:-30}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

find_opd "bash setup.sh"
if only_plans "$@"; then exec opd train scale=cpu_tiny "$@"; fi # of one run; they differ in method and seed
build_world base large
out=${OPD_RUNS:-runs}/${here##*/} # a copy of this folder has runs of its own
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + JOBS - 1) / JOBS))} OMP_WAIT_POLICY=PASSIVE
mkdir -p "$out"

# 64 rollouts per step for every method. Two samples of each validation problem, at the same steps for all.
common=(
    scale=cpu_tiny "trainer.total_training_steps=$STEPS"
    trainer.test_freq=10 trainer.save_freq=10 trainer.max_actor_ckpt_to_keep=1
    actor_rollout_ref.rollout.val_kwargs.n=2
)
declare -A rollouts=([grpo]=8 [cispo]=8 [opd]=64 [iw_opd]=64 [crisp]=64 [opsd]=64 [sdpo]=8 [trace]=8)

run() {
    local method=$1 seed=$2 folder=$out/$1-seed$2
    shift 2
    if [[ -f $folder/generations/val_$STEPS.jsonl ]]; then return; fi
    mkdir -p "$folder"
    if opd train "method=$method" "${common[@]}" "data.train_batch_size=${rollouts[$method]:-64}" \
        "opd.seed=$seed" "opd.run_dir='$(realpath "$folder")'" "$@" >>"$folder/run.log" 2>&1; then
        printf '%(%H:%M:%S)T  %s seed %s: %s\n' -1 "$method" "$seed" "$(grep '^ *val' "$folder/console.log" | tail -n 1)"
    else
        printf '%(%H:%M:%S)T  %s seed %s FAILED, see %s\n' -1 "$method" "$seed" "$folder/run.log" >&2
        return 1
    fi
}

failed=0 started=()
for seed in $SEEDS; do
    for method in $METHODS; do
        while (($(jobs -rp | wc -l) >= JOBS)); do wait -n || true; done
        run "$method" "$seed" "$@" &
        started+=($!)
        sleep 1
    done
done
for process in "${started[@]}"; do wait "$process" || failed=1; done # one that has ended already is remembered, too
((failed == 0)) || die "some runs failed; start the script again to go on."

pairs=()
for pair in iw_opd:opd sdpo:grpo trace:grpo cispo:grpo; do
    if [[ " $METHODS " == *" ${pair%:*} "* && " $METHODS " == *" ${pair#*:} "* ]]; then pairs+=(--against "$pair"); fi
done
exec opd compare "$out" "${pairs[@]}"
