#!/usr/bin/env bash
# GRPO (arXiv 2402.03300) with DAPO's clip-higher (arXiv 2503.14476) on Qwen3-8B in thinking mode: the settings of the
# GRPO run that TRACE (arXiv 2605.10194) compares itself with, so that this and recipes/trace are two arms of one study.
# Settings: opd_ext/config/recipe/grpo/qwen3_8b.yaml, on top of method/grpo.yaml, world/math.yaml and
# scale/node_8xh200.yaml.
#
#   for set in dapo_math_17k math500 aime24 aime25; do opd data $set; done      once
#   recipes/grpo/qwen3_8b.sh                               train; run again, it goes on from the last checkpoint in OUT
#   recipes/grpo/qwen3_8b.sh --dry-run                     the plan, without GPU, data or model
#   recipes/grpo/qwen3_8b.sh opd.seed=2                    any setting can be overridden
#
# MODEL     hub id or folder                               Qwen/Qwen3-8B
# DATA_DIR  where `opd data` wrote                         ${OPD_HOME:-~/.cache/opd_ext}/data
# TRAIN     training set in DATA_DIR                       dapo_math_17k/train
# EVAL      validation sets in DATA_DIR                    "math500 aime24 aime25"
# OUT       run folder                                     ${OPD_RUNS:-runs}/grpo-qwen3-8b
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

gpu_run grpo/qwen3_8b dapo_math_17k/train "math500/test aime24/test aime25/test" "$@"
exec opd train recipe=grpo/qwen3_8b "${inputs[@]}" "$@"
