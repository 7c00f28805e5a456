#!/usr/bin/env bash
# OPSD (arXiv 2601.18734) on Qwen3-8B: the settings of qwen3_1_7b.sh (read that) with another model, run folder and the
# clip that the authors use at this size. Same command line, same environment variables. Independent runs at 8B found
# next to nothing or a loss in thinking mode: see README.md before you spend a node on it.
# Settings: opd_ext/config/recipe/opsd/qwen3_8b.yaml.
#
#   recipes/opsd/qwen3_8b.sh --dry-run
#   recipes/opsd/qwen3_8b.sh
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

gpu_run opsd/qwen3_8b openthoughts_math_30k/train "aime24/test aime25/test" "$@"
exec opd train recipe=opsd/qwen3_8b "${inputs[@]}" "$@"
