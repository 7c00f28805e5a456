#!/usr/bin/env bash
# SDPO (arXiv 2601.20802) on Qwen3-8B, thinking off, on the published questions of tool use (ToolAlpaca): qwen3_8b.sh (read
# that) with other data and another grader. Same command line, same environment variables, with these defaults:
# Settings: opd_ext/config/recipe/sdpo/qwen3_8b_tools.yaml; the data: opd data toolalpaca, once.
#
#   recipes/sdpo/qwen3_8b_tools.sh --dry-run
#   recipes/sdpo/qwen3_8b_tools.sh
#
# TRAIN     training set in DATA_DIR                       toolalpaca/train
# EVAL      validation sets in DATA_DIR                    toolalpaca/test
# OUT       run folder                                     ${OPD_RUNS:-runs}/sdpo-qwen3-8b-tools
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

gpu_run sdpo/qwen3_8b_tools toolalpaca/train toolalpaca/test "$@"
exec opd train recipe=sdpo/qwen3_8b_tools "${inputs[@]}" "$@"
