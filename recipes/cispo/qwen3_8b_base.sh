#!/usr/bin/env bash
# CISPO (arXiv 2506.13585) on Qwen3-8B-Base. The paper's controlled study trains a base model (Qwen2.5-32B) on DAPO's
# problems and discloses neither the cap of the weight nor learning rate, batch and group size: what is not published
# says so there. The published parts: the loss, 16 updates per batch, AdamW's betas and epsilon; the fp32 head is the trainer's.
# Settings: opd_ext/config/recipe/cispo/qwen3_8b_base.yaml, on top of method/cispo.yaml, world/math.yaml and
# scale/node_8xh200.yaml.
#
#   for set in dapo_math_17k aime24; do opd data $set; done      once
#   recipes/cispo/qwen3_8b_base.sh                         train; run again, it goes on from the last checkpoint in OUT
#   recipes/cispo/qwen3_8b_base.sh --dry-run               the plan, without GPU, data or model
#   recipes/cispo/qwen3_8b_base.sh actor_rollout_ref.actor.clip_ratio_high=0.2     cap 1.2: another algorithm
#
# MODEL     hub id or folder                               Qwen/Qwen3-8B-Base
# DATA_DIR  where `opd data` wrote                         ${OPD_HOME:-~/.cache/opd_ext}/data
# TRAIN     training set in DATA_DIR                       dapo_math_17k/train
# EVAL      validation sets in DATA_DIR                    "aime24"
# OUT       run folder                                     ${OPD_RUNS:-runs}/cispo-qwen3-8b-base
# GPUS      on this node, a divisor of 512                 8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_MODEL, OPD_DATA_DIR, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

gpu_run cispo/qwen3_8b_base dapo_math_17k/train aime24/test "$@"
exec opd train recipe=cispo/qwen3_8b_base "${inputs[@]}" "$@"
