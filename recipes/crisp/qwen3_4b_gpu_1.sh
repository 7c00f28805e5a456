#!/usr/bin/env bash
# CRISP (arXiv 2603.05433) on Qwen3-4B by LoRA, on one card of 80 GB: an evening.
# Settings: opd_ext/config/recipe/crisp/qwen3_4b_gpu_1.yaml, on top of method/crisp.yaml.
#
#   for set in dapo_math_17k math500 aime24 aime25; do opd data $set; done      once
#   recipes/crisp/qwen3_4b_gpu_1.sh                train; run again, it goes on from the last checkpoint in OUT
#   recipes/crisp/qwen3_4b_gpu_1.sh --dry-run      the plan, without GPU, data or model
#
# MODEL     hub id or folder                               Qwen/Qwen3-4B
# DATA_DIR  where `opd data` wrote                         ${OPD_HOME:-~/.cache/opd_ext}/data
# TRAIN     training set in DATA_DIR                       dapo_math_17k/train
# EVAL      validation sets in DATA_DIR                    "math500 aime24 aime25"
# OUT       run folder                                     ${OPD_RUNS:-runs}/crisp-qwen3-4b-gpu-1
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

gpus=1
gpu_run crisp/qwen3_4b_gpu_1 dapo_math_17k/train "math500/test aime24/test aime25/test" "$@"
exec opd train recipe=crisp/qwen3_4b_gpu_1 "${inputs[@]}" "$@"
