#!/usr/bin/env bash
# OPD on a real model without a GPU: SmolLM2-135M-Instruct learns from itself, fine-tuned on the task. Two CPU cores.
#
#   recipes/opd/smollm2_cpu.sh                             all of it
#   recipes/opd/smollm2_cpu.sh --dry-run                   the plan
#   recipes/opd/smollm2_cpu.sh opd.seed=2 OVERRIDE...      any setting can be overridden
#
# 1. The first time: the model and 360 problems of arithmetic, in ${OPD_HOME:-~/.cache/opd_ext}; then the teacher, by
#    `opd sft recipe=sft/smollm2_cpu`, in ${OPD_RUNS:-runs}/sft-smollm2_cpu.
# 2. Trains the model on its own rollouts towards the teacher, and validates before, during and after.
# 3. Prints the before/after table and writes it, with curves, into the run folder: ${OPD_RUNS:-runs}/opd-smollm2-cpu.
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
only_plans "$@" || { build_smollm2 gym "" && opd sft recipe=sft/smollm2_cpu; } # a finished one takes a second
name_run opd/smollm2_cpu "$@"
exec opd train recipe=opd/smollm2_cpu "${inputs[@]}" "$@"
