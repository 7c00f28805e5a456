#!/usr/bin/env bash
# T3S (arXiv 2601.10348) on Qwen3-8B with 200 verified traces (BOBA-200), with the settings that are known of the
# published run. README.md says which those are; the rest is inferred.
# Settings: opd_ext/config/pipelines/recipe/t3s/qwen3_8b.yaml, on top of t3s.yaml and scale/node_8xh200.yaml.
#
#   for set in boba200 aime; do opd data $set; done      once
#   recipes/t3s/qwen3_8b.sh                          all stages; run again, it goes on in OUT
#   recipes/t3s/qwen3_8b.sh --dry-run                the stages, and which of them are done; no GPU
#   recipes/t3s/qwen3_8b.sh --until bottleneck       stop after a stage; also --only STAGE, --force STAGE
#   recipes/t3s/qwen3_8b.sh always_keep_eos=true     any setting can be overridden
#
# MODEL     student: hub id or folder                      Qwen/Qwen3-8B
# TRACES    column of TRAIN with verified traces           trace
# TEACHER   a model to sample traces from instead          none
# DATA_DIR  where `opd data` wrote                         ${OPD_HOME:-~/.cache/opd_ext}/data
# TRAIN     prompts with answers in DATA_DIR               boba200/train
# EVAL      problems that are reported                     aime/test
# OUT       run folder                                     ${OPD_RUNS:-runs}/t3s-qwen3-8b
# GPUS      on this node, a divisor of 64                  8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_MODEL, OPD_DATA_DIR, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

find_opd "bash setup.sh --gpu"
name_pipeline t3s/qwen3_8b "$@"
pipeline_inputs MODEL=model TEACHER=teacher TRAIN=prompts.file=boba200/train EVAL=evaluate.file=aime/test -- "$@"
if given TEACHER; then
    # Templates of DeepSeek-R1 and QwQ open the thinking in the prompt; Qwen3 writes the tag itself.
    inputs+=(traces_column=null $'trace_prefix=\'<think>\n\'')
elif given TRACES; then
    inputs+=("traces_column='$(input TRACES "")'")
fi
exec opd t3s recipe=t3s/qwen3_8b "${inputs[@]}" "$@"
