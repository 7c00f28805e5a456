#!/usr/bin/env bash
# CRISP (arXiv 2603.05433) on Qwen3-32B, one node with eight H200: qwen3_8b.sh (read that) with another model, run folder
# and share of the GPU for vLLM. The paper states no settings of this size. Same command line, same environment variables.
# Settings: opd_ext/config/recipe/crisp/qwen3_32b.yaml.
#
#   recipes/crisp/qwen3_32b.sh --dry-run
#   recipes/crisp/qwen3_32b.sh
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

gpu_run crisp/qwen3_32b dapo_math_17k/train "math500/test aime24/test aime25/test" "$@"
exec opd train recipe=crisp/qwen3_32b "${inputs[@]}" "$@"
