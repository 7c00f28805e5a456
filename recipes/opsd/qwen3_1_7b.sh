#!/usr/bin/env bash
# OPSD (arXiv 2601.18734) on Qwen3-1.7B, the model of the released numbers, with the settings of the release of March
# 2026: forward KL with a clip. Thinking is off for the student and on for the teacher.
# Settings: opd_ext/config/recipe/opsd/qwen3_1_7b.yaml, on top of method/opsd.yaml, world/math.yaml and
# scale/node_8xh200.yaml.
#
#   recipes/opsd/qwen3_1_7b.sh                             train; run again, it goes on from the last checkpoint in OUT
#   recipes/opsd/qwen3_1_7b.sh --dry-run                   the plan, without GPU, data or model
#   recipes/opsd/qwen3_1_7b.sh opd.divergence.clip_mode=none      any setting can be overridden
#
#   for set in openthoughts_math_30k aime24 aime25; do opd data $set; done      once: a solution for every problem
#
# MODEL     hub id or folder                               Qwen/Qwen3-1.7B
# DATA_DIR  where `opd data` wrote                         ${OPD_HOME:-~/.cache/opd_ext}/data
# TRAIN     training set in DATA_DIR                       openthoughts_math_30k/train
# EVAL      validation sets in DATA_DIR                    "aime24 aime25"
# OUT       run folder                                     ${OPD_RUNS:-runs}/opsd-qwen3-1.7b
# GPUS      on this node, a divisor of 32                  8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_MODEL, OPD_DATA_DIR, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

gpu_run opsd/qwen3_1_7b openthoughts_math_30k/train "aime24/test aime25/test" "$@"
exec opd train recipe=opsd/qwen3_1_7b "${inputs[@]}" "$@"
