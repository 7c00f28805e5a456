#!/usr/bin/env bash
# T3S for the masked-diffusion model LLaDA2.0-mini; its autoregressive relative Ling-mini-2.0 selects the tokens. Little
# of the published run is known: README.md says what, what must be downloaded, and why both models need a patch first.
# Settings: opd_ext/config/pipelines/recipe/t3s/llada2_mini.yaml, on top of preset/diffusion.yaml, t3s.yaml and
# scale/node_8xh200.yaml.
#
#   for set in s1k aime; do opd data $set; done             once
#   recipes/t3s/llada2_mini.sh                              all stages; run again, it goes on in OUT
#   recipes/t3s/llada2_mini.sh --dry-run                    the stages, and which of them are done; no GPU
#   recipes/t3s/llada2_mini.sh --until select-diffusion     the selector's part; also --only STAGE, --force STAGE
#   recipes/t3s/llada2_mini.sh diffusion.tau=0.1            any setting can be overridden
#
# MODEL      selector: folder or hub id                     inclusionAI/Ling-mini-2.0
# DIFFUSION  model that is trained, likewise                inclusionAI/LLaDA2.0-mini
# TRACES     column of TRAIN with verified traces           trace
# DATA_DIR   where `opd data` wrote                         ${OPD_HOME:-~/.cache/opd_ext}/data
# TRAIN      prompts with answers in DATA_DIR               s1k/train
# EVAL       problems that are reported                     aime/test
# OUT        run folder                                     ${OPD_RUNS:-runs}/t3s-llada2-mini
# GPUS       on this node, a divisor of 64                  8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_MODEL, OPD_DIFFUSION, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

find_opd "bash setup.sh --gpu"
name_pipeline t3s/llada2_mini "$@"
pipeline_inputs MODEL=model DIFFUSION=diffusion.model TRAIN=prompts.file=s1k/train EVAL=evaluate.file=aime/test -- "$@"
if given TRACES; then inputs+=("traces_column='$(input TRACES "")'"); fi
exec opd t3s recipe=t3s/llada2_mini "${inputs[@]}" "$@"
