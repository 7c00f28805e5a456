#!/usr/bin/env bash
# SDPO (arXiv 2601.20802) on Qwen3-4B by LoRA, thinking off, on one card of 80 GB, on puzzles
# and arithmetic of reasoning-gym: an evening, and nothing to download but the model.
# Settings: opd_ext/config/recipe/sdpo/qwen3_4b_gpu_1.yaml, on top of method/sdpo.yaml.
#
#   recipes/sdpo/qwen3_4b_gpu_1.sh                   makes the data once and trains; run again, it goes on from the last
#                                                          checkpoint in OUT
#   recipes/sdpo/qwen3_4b_gpu_1.sh --dry-run         the plan, without GPU, data or model
#
# MODEL     hub id or folder                               Qwen/Qwen3-4B
# DATA_DIR  data of your own, as `opd data gym` writes     ${OPD_HOME:-~/.cache/opd_ext}/gym_puzzles
# TRAIN     training set in DATA_DIR                       train
# EVAL      validation sets in DATA_DIR                    "val"
# OUT       run folder                                     ${OPD_RUNS:-runs}/sdpo-qwen3-4b-gpu-1
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

gpus=1 data_folder=gym_puzzles
find_opd "bash setup.sh --gpu"
only_plans "$@" || given DATA_DIR || build_puzzles
gpu_run sdpo/qwen3_4b_gpu_1 train val "$@"
exec opd train recipe=sdpo/qwen3_4b_gpu_1 "${inputs[@]}" "$@"
