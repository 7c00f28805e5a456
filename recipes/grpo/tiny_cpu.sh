#!/usr/bin/env bash
# GRPO on a laptop: the real Ray, vLLM and FSDP on two CPU cores, no GPU, no download.
#
#   recipes/grpo/tiny_cpu.sh                            all of it, in minutes
#   recipes/grpo/tiny_cpu.sh --dry-run                  the plan
#   recipes/grpo/tiny_cpu.sh actor_rollout_ref.actor.clip_ratio_high=0.2     any setting can be overridden (PPO's)
#
# 1. The first time: unpacks the miniature world (tokenizer, arithmetic problems, a base model that solves them with too
#    many words) in ${OPD_HOME:-~/.cache/opd_ext}/tinymath.
# 2. Trains the base model on the rewards of eight rollouts per problem, and validates before, during and after.
# 3. Prints the before/after table and writes it, with curves, into the run folder: ${OPD_RUNS:-runs}/grpo-cpu_tiny.
#    Run again, it goes on from the last checkpoint there; set OPD_RUNS to start afresh.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

find_opd "bash setup.sh"
only_plans "$@" || build_world base
name_run grpo/tiny_cpu "$@"
exec opd train method=grpo scale=cpu_tiny "${inputs[@]}" "$@"
