#!/usr/bin/env bash
# TRACE on a laptop: the real Ray, vLLM and FSDP on two CPU cores, no GPU, no download.
#
#   recipes/trace/tiny_cpu.sh                           all of it, in minutes
#   recipes/trace/tiny_cpu.sh --dry-run                 the plan
#   recipes/trace/tiny_cpu.sh opd.credit.annotator.kind=random25 opd.credit.annotator.base=rule     any setting
#
# 1. The first time: unpacks the miniature world (tokenizer, arithmetic problems, a base model that solves them with too
#    many words) in ${OPD_HOME:-~/.cache/opd_ext}/tinymath.
# 2. Trains the base model with GRPO, and on marked spans against its copy that knows their type.
# 3. Prints the before/after table and writes it, with curves, into the run folder: ${OPD_RUNS:-runs}/trace-cpu_tiny.
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
name_run trace/tiny_cpu "$@"
exec opd train method=trace scale=cpu_tiny "${inputs[@]}" "$@"
