#!/usr/bin/env bash
# SSD on a real model without a GPU: SmolLM2-135M-Instruct, two CPU cores.
#
#   recipes/ssd/smollm2_cpu.sh                             all of it
#   recipes/ssd/smollm2_cpu.sh --dry-run                   the stages, and which of them are done
#   recipes/ssd/smollm2_cpu.sh seed=2 OVERRIDE...          any setting can be overridden
#
# 1. The first time: the model and 360 problems of arithmetic, in ${OPD_HOME:-~/.cache/opd_ext}.
# 2. Samples answers hot and cut off, and, as the mandatory control, as the model is; fine-tunes a model on each.
# 3. Evaluates all of them, prints the tables and writes them, with figures, into report/ of the run folder:
#    ${OPD_RUNS:-runs}/ssd-smollm2_cpu. Run again, it goes on where it stopped.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

find_opd "bash setup.sh"
only_plans "$@" || build_smollm2 gym ""
name_pipeline ssd/smollm2_cpu "$@"
exec opd ssd recipe=ssd/smollm2_cpu "${inputs[@]}" "$@"
