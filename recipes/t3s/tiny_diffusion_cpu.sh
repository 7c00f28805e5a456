#!/usr/bin/env bash
# T3S for a masked-diffusion model on a laptop: tiny_cpu.sh, and after its selection a bidirectional model that is
# trained with it. Same command line.
#
#   recipes/t3s/tiny_diffusion_cpu.sh                               all of it, in minutes
#   recipes/t3s/tiny_diffusion_cpu.sh diffusion.tau=0.1             any setting can be overridden
#   recipes/t3s/tiny_diffusion_cpu.sh run_dir=runs/t3s-cpu_tiny     go on in the folder of tiny_cpu.sh
#
# 1. The first time: adds to the miniature world a model that reconstructs hidden tokens block by block.
# 2. The stages of tiny_cpu.sh; the pilot, an autoregressive model with the same tokenizer, is the selector.
# 3. Fine-tunes the diffusion model three times: without a selection, with it, and with as many random tokens.
#    It has a run folder of its own in ${OPD_RUNS:-runs}; --dry-run names it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

find_opd "bash setup.sh"
only_plans "$@" || build_world base large diffusion
name_pipeline t3s/tiny_diffusion_cpu "$@"
exec opd t3s scale=cpu_tiny preset=diffusion_tiny "${inputs[@]}" "$@"
