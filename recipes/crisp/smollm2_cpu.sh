#!/usr/bin/env bash
# CRISP on a real model without a GPU: SmolLM2-135M-Instruct, two CPU cores, less than an hour. README.md has the result.
#
#   recipes/crisp/smollm2_cpu.sh                           all of it
#   recipes/crisp/smollm2_cpu.sh --dry-run                 the plan
#   recipes/crisp/smollm2_cpu.sh opd.seed=2 OVERRIDE...    any setting can be overridden
#
# 1. The first time: the model and 360 problems of arithmetic whose prompts ask for steps, in ${OPD_HOME:-~/.cache/opd_ext}.
# 2. Trains the model against its own copy that is asked to answer briefly, and validates before, during and after.
# 3. Prints the before/after table and writes it, with curves, into the run folder: ${OPD_RUNS:-runs}/crisp-smollm2-cpu.
#    Run again, it goes on from the last checkpoint there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

find_opd "bash setup.sh"
only_plans "$@" || build_smollm2 gym_steps "Show your steps and explain each one."
name_run crisp/smollm2_cpu "$@"
exec opd train recipe=crisp/smollm2_cpu "${inputs[@]}" "$@"
