#!/usr/bin/env bash
# CRISP (arXiv 2603.05433) on DeepSeek-R1-Distill-Llama-8B, one node with eight H200: the published settings are those of
# Qwen3-8B, so this is qwen3_8b.sh (read that) with another model and run folder. Same command line, same environment
# variables. Settings: opd_ext/config/recipe/crisp/r1_distill_llama_8b.yaml.
#
#   recipes/crisp/r1_distill_llama_8b.sh --dry-run
#   recipes/crisp/r1_distill_llama_8b.sh
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

gpu_run crisp/r1_distill_llama_8b dapo_math_17k/train "math500/test aime24/test aime25/test" "$@"
exec opd train recipe=crisp/r1_distill_llama_8b "${inputs[@]}" "$@"
