#!/usr/bin/env bash
# CRISP over turns on Qwen3-8B with tools: 100 steps on one node with eight H200.
# Settings: opd_ext/config/recipe/agents/qwen3_8b.yaml, on top of recipe crisp/qwen3_8b. Not run so far.
#
#   opd data tinymath tools                                              once: tasks, tools and grader to begin with
#   recipes/agents/qwen3_8b.sh                                           train; run again, it goes on in its run folder
#   recipes/agents/qwen3_8b.sh --dry-run                                 the plan, without GPU, data or model
#   recipes/agents/qwen3_8b.sh opd.context.every_turn=true               the instruction again in every turn
#   OPD_AGENT_DATA=/data/planner recipes/agents/qwen3_8b.sh reward.custom_reward_function.path=/data/planner/grader.py \
#       'opd.context={text: v3, template: "{instruction}\n\n{question}"}'       your tasks, which are not mathematical
#
# OPD_AGENT_DATA  folder with train.parquet, val.parquet and tools.py          ${OPD_HOME:-~/.cache/opd_ext}/tinymath_tools
# OPD_RUNS        where run folders go                                         runs
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

find_opd "bash setup.sh --gpu"
exec opd train recipe=agents/qwen3_8b "$@"
