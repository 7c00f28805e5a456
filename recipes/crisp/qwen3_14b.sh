#!/usr/bin/env bash
# CRISP (arXiv 2603.05433) on Qwen3-14B: the published settings are those of the 8B model, so this is qwen3_8b.sh (read
# that) with another model and run folder. Same command line, same environment variables.
# Settings: opd_ext/config/recipe/crisp/qwen3_14b.yaml, which also says what it takes on 80 GB cards.
#
#   recipes/crisp/qwen3_14b.sh --dry-run
#   recipes/crisp/qwen3_14b.sh
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

gpu_run crisp/qwen3_14b dapo_math_17k/train "math500/test aime24/test aime25/test" "$@"
exec opd train recipe=crisp/qwen3_14b "${inputs[@]}" "$@"
