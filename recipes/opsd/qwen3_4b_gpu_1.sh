#!/usr/bin/env bash
# OPSD (arXiv 2601.18734) on Qwen3-4B, on one card of 80 GB: an hour. README.md says what others found at this size.
# Settings: opd_ext/config/recipe/opsd/qwen3_4b_gpu_1.yaml, on top of method/opsd.yaml.
#
#   recipes/opsd/qwen3_4b_gpu_1.sh                 train; run again, it goes on from the last checkpoint in OUT
#   recipes/opsd/qwen3_4b_gpu_1.sh --dry-run       the plan, without GPU, data or model
#
#   for set in openthoughts_math_30k aime24 aime25; do opd data $set; done      once: a solution for every problem
#
# MODEL     hub id or folder                               Qwen/Qwen3-4B
# DATA_DIR  where `opd data` wrote                         ${OPD_HOME:-~/.cache/opd_ext}/data
# TRAIN     training set in DATA_DIR                       openthoughts_math_30k/train
# EVAL      validation sets in DATA_DIR                    "aime24 aime25"
# OUT       run folder                                     ${OPD_RUNS:-runs}/opsd-qwen3-4b-gpu-1
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

gpus=1
gpu_run opsd/qwen3_4b_gpu_1 openthoughts_math_30k/train "aime24/test aime25/test" "$@"
exec opd train recipe=opsd/qwen3_4b_gpu_1 "${inputs[@]}" "$@"
