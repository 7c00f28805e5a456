#!/usr/bin/env bash
# A method over several turns with tools, on a laptop: the real Ray, vLLM and FSDP on two CPU cores, no GPU, no download.
#
#   recipes/agents/tools_cpu.sh                            CRISP: shorter turns and fewer calls at the same accuracy
#   METHOD=sdpo recipes/agents/tools_cpu.sh                SDPO, whose teacher reads what was wrong with the rollout
#   recipes/agents/tools_cpu.sh --dry-run                  the plan
#   recipes/agents/tools_cpu.sh opd.rollout.tool_seconds=5 any setting can be overridden
#
# METHOD    crisp, sdpo, grpo, cispo, srpo, opsd or rlsd     crisp
#
# 1. The first time: unpacks the tools' level of the miniature world (bills, a price list and a calculator as verl's tools,
#    a base model that works with them) in ${OPD_HOME:-~/.cache/opd_ext}/tinymath_tools.
# 2. Trains the base model through verl's agent loop, in up to six turns, and validates before, during and after.
# 3. Prints the before/after table and writes it, with curves, into the run folder:
#    ${OPD_RUNS:-runs}/METHOD-cpu_tiny_tools. Run again, it goes on from the last checkpoint there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

find_opd "bash setup.sh"
world=${OPD_HOME:-$HOME/.cache/opd_ext}/tinymath_tools
only_plans "$@" || [[ -f $world/base/config.json && -f $world/tools.py ]] || opd data tinymath tools
exec opd train method="${METHOD:-crisp}" scale=cpu_tiny_tools "$@"
