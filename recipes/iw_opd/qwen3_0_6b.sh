#!/usr/bin/env bash
# IW-OPD (arXiv 2606.22600) of Qwen3-4B-Instruct-2507 into Qwen3-0.6B, thinking off, with the settings of
# the published runs (recipes/opd is their baseline: this recipe without the weight).
# Settings: opd_ext/config/recipe/iw_opd/qwen3_0_6b.yaml, on top of method/iw_opd.yaml, world/math.yaml and
# scale/node_8xh200.yaml.
#
#   for set in dapo_math_17k aime24 aime25; do opd data $set; done      once
#   recipes/iw_opd/qwen3_0_6b.sh                            train; run again, it goes on from the last checkpoint in OUT
#   recipes/iw_opd/qwen3_0_6b.sh --dry-run                  the plan, without GPU, data or model
#   recipes/iw_opd/qwen3_0_6b.sh opd.credit.gamma=1.0      any setting can be overridden
#
# MODEL     student: hub id or folder                      Qwen/Qwen3-0.6B
# TEACHER   likewise; its tokenizer must be the student's  Qwen/Qwen3-4B-Instruct-2507
# DATA_DIR  where `opd data` wrote                         ${OPD_HOME:-~/.cache/opd_ext}/data
# TRAIN     training set in DATA_DIR                       dapo_math_17k/train
# EVAL      validation sets in DATA_DIR                    "aime24 aime25"
# OUT       run folder                                     ${OPD_RUNS:-runs}/iw_opd-qwen3-0.6b
# GPUS      on this node, a divisor of 1024                8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_MODEL, OPD_DATA_DIR, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

teacher_is_input=yes
gpu_run iw_opd/qwen3_0_6b dapo_math_17k/train "aime24/test aime25/test" "$@"
exec opd train recipe=iw_opd/qwen3_0_6b "${inputs[@]}" "$@"
