#!/usr/bin/env bash
# SDPO (arXiv 2601.20802) on Qwen3-8B, thinking off, with the published settings of its runs without rich feedback
# (science questions and tool use) - on maths, for which the authors publish no recipe. README.md has the published
# science questions and what is known about maths.
# Settings: opd_ext/config/recipe/sdpo/qwen3_8b.yaml, on top of method/sdpo.yaml, world/math.yaml and
# scale/node_8xh200.yaml.
#
#   for set in dapo_math_17k math500 aime24 aime25; do opd data $set; done      once
#   recipes/sdpo/qwen3_8b.sh                               train; run again, it goes on from the last checkpoint in OUT
#   recipes/sdpo/qwen3_8b.sh --dry-run                     the plan, without GPU, data or model
#   recipes/sdpo/qwen3_8b.sh opd.teacher.weights=frozen    any setting can be overridden
#
# MODEL     hub id or folder                               Qwen/Qwen3-8B
# DATA_DIR  where `opd data` wrote                         ${OPD_HOME:-~/.cache/opd_ext}/data
# TRAIN     training set in DATA_DIR                       dapo_math_17k/train
# EVAL      validation sets in DATA_DIR                    "math500 aime24 aime25"
# OUT       run folder                                     ${OPD_RUNS:-runs}/sdpo-qwen3-8b
# GPUS      on this node, a divisor of 256                 8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_MODEL, OPD_DATA_DIR, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

gpu_run sdpo/qwen3_8b dapo_math_17k/train "math500/test aime24/test aime25/test" "$@"
exec opd train recipe=sdpo/qwen3_8b "${inputs[@]}" "$@"
