#!/usr/bin/env bash
# SSD (arXiv 2604.01193) with the published settings, of Qwen3-4B-Instruct-2507 or another published model (PRESET).
# Settings: opd_ext/config/pipelines/recipe/ssd/$PRESET.yaml, on top of preset/$PRESET.yaml, ssd.yaml and
# scale/node_8xh200.yaml.
#
#   for set in rstar_coder livecodebench; do opd data $set; done      once
#   recipes/ssd/qwen3_4b_instruct.sh                        sample, fine-tune, evaluate; run again, it goes on in OUT
#   recipes/ssd/qwen3_4b_instruct.sh --dry-run              the stages, and which of them are done; no GPU
#   recipes/ssd/qwen3_4b_instruct.sh --until sample-ssd     stop after a stage; also --only STAGE, --force STAGE
#   PRESET=qwen3_4b_thinking recipes/ssd/qwen3_4b_instruct.sh
#   recipes/ssd/qwen3_4b_instruct.sh seed=2                 any setting can be overridden
#
# PRESET    llama3_1_8b_instruct, qwen3_4b_instruct, qwen3_30b_a3b_instruct, qwen3_4b_thinking,
#           qwen3_30b_a3b_thinking or gpt_oss_20b          qwen3_4b_instruct
# MODEL     hub id or folder                               the model of PRESET
# DATA_DIR  where `opd data` wrote                         ${OPD_HOME:-~/.cache/opd_ext}/data
# TRAIN     prompts in DATA_DIR                            rstar_coder/passed
# SELECT    problems on which T_eval is chosen             livecodebench/v5
# EVAL      problems that are reported                     livecodebench/v6
# OUT       run folder                                     ${OPD_RUNS:-runs}/ssd-$PRESET
# GPUS      on this node: 4, 8, 16 or 32                   8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_PRESET, OPD_DATA_DIR, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

preset=$(input PRESET qwen3_4b_instruct)
chosen=()
case $preset in
    qwen3_4b_instruct) ;;
    llama3_1_8b_instruct | qwen3_30b_a3b_instruct | qwen3_4b_thinking | qwen3_30b_a3b_thinking | gpt_oss_20b)
        chosen=("recipe=$preset") ;;
    *) die "PRESET=$preset is not published; choose one of those that the first lines of this script name." ;;
esac
find_opd "bash setup.sh --gpu"
name_pipeline ssd/qwen3_4b_instruct "${chosen[@]}" "$@"
pipeline_inputs MODEL=model TRAIN=prompts.file=rstar_coder/passed \
    SELECT=evaluate.select_file=livecodebench/v5 EVAL=evaluate.file=livecodebench/v6 -- "$@"
exec opd ssd recipe="ssd/$preset" "${inputs[@]}" "$@"
