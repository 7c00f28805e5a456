#!/usr/bin/env bash
# Three specialists, each fine-tuned on one family of the miniature world's problems, teach one student all of them.
#   examples/several_teachers/run.sh                      the whole of it, on a CPU
#   SEEDS="1 2 3" examples/several_teachers/run.sh        the student with three seeds
set -euo pipefail
cd "$(dirname "$0")/../.."
export SPECIALISTS="${SPECIALISTS:-$PWD/runs/specialists}"
WORLD="${OPD_HOME:-$HOME/.cache/opd_ext}/tinymath"

opd data tinymath
python examples/several_teachers/families.py "$WORLD" "$SPECIALISTS"
for family in sums products chains; do
    opd sft run_dir="$SPECIALISTS/sft-$family" teacher=null traces_column=extra_info.solution \
        prompts.file="$SPECIALISTS/$family-train.parquet" prompts.count=2000 train.steps=120 train.save_every=120 \
        evaluate.file="$SPECIALISTS/$family-test.parquet" evaluate.select_file="$SPECIALISTS/$family-val.parquet"
    opd export "$SPECIALISTS/sft-$family/train/sft" --out "$SPECIALISTS/$family"
done
for seed in ${SEEDS:-1}; do
    opd train --config-dir examples/several_teachers/config method=specialists scale=cpu_tiny opd.seed="$seed" \
        opd.run_dir="$SPECIALISTS/student-$seed" "$@"
    opd report "$SPECIALISTS/student-$seed"
    for family in sums products chains; do
        opd eval "$SPECIALISTS/student-$seed" --against "$SPECIALISTS/$family" --scale cpu_tiny --n 8 \
            --on "$SPECIALISTS/$family-test.parquet" --out "$SPECIALISTS/eval-$seed-$family"
    done
done
# shellcheck disable=SC2086  # several seeds are several words
python examples/several_teachers/table.py "$SPECIALISTS" ${SEEDS:-1}
