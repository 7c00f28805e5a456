#!/usr/bin/env bash
# T3S (arXiv 2601.10348) on Qwen3-8B with 200 verified traces (BOBA-200), with the settings that are known of the
# published run. README.md says which those are; the rest is inferred.
#
#   recipes/t3s/qwen3_8b.sh                          all stages; run again, it goes on in OUT
#   recipes/t3s/qwen3_8b.sh --dry-run                the stages, and which of them are done; no GPU
#   recipes/t3s/qwen3_8b.sh --until bottleneck       stop after a stage; also --only STAGE, --force STAGE
#   recipes/t3s/qwen3_8b.sh always_keep_eos=true     any setting can be overridden
#
# MODEL     student: hub id or folder                      Qwen/Qwen3-8B
# TRACES    column of TRAIN with verified traces           trace
# TEACHER   a model to sample traces from instead          none
# DATA_DIR  parquet files that README.md says how to make  ${OPD_HOME:-~/.cache/opd_ext}/math
# TRAIN     prompts with answers in DATA_DIR               boba200
# EVAL      problems that are reported                     aime
# OUT       run folder                                     ${OPD_RUNS:-runs}/t3s-qwen3-8b
# GPUS      on this node, a divisor of 64                  8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_MODEL, OPD_DATA_DIR, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -r $here/../common.sh ]] ||
    { echo "${0##*/}: ../common.sh is missing; keep this folder within recipes/." >&2; exit 2; }
. "$here/../common.sh"

MODEL=$(input MODEL Qwen/Qwen3-8B)
TEACHER=$(input TEACHER "")
TRACES=$(input TRACES trace)
TRAIN=$(input TRAIN boba200)
EVAL=$(input EVAL aime)
DATA_DIR=$(realpath -m "$(input DATA_DIR "${OPD_HOME:-$HOME/.cache/opd_ext}/math")")
OUT=$(realpath -m "$(input OUT "${OPD_RUNS:-runs}/t3s-qwen3-8b")")
GPUS=$(input GPUS 8)
find_opd "bash setup.sh --gpu"
if [[ -d $MODEL ]]; then MODEL=$(realpath "$MODEL"); fi
if [[ -d $TEACHER ]]; then TEACHER=$(realpath "$TEACHER"); fi
only_plans "$@" || check_inputs "$TRAIN" "$EVAL"

if [[ -n $TEACHER ]]; then
    # Templates of DeepSeek-R1 and QwQ open the thinking in the prompt; Qwen3 writes the tag itself.
    traces=("teacher='$TEACHER'" $'trace_prefix=\'<think>\n\'')
else
    traces=("traces_column='$TRACES'")
fi

settings=(
    scale=node_8xh200
    "model='$MODEL'" "run_dir='$OUT'"
    "prompts.file='$DATA_DIR/$TRAIN.parquet'"

    # Traces: 16 answers of the teacher per prompt, of which one right and finished one is drawn.
    "${traces[@]}"
    traces.n=16 traces.temperature=0.6 traces.max_tokens=32768

    # The pilot, plain fine-tuning, and every arm: the same data, order, optimiser and steps, each from the base.
    train.steps=50 train.batch_size=64 train.lr=1e-5
    train.schedule=constant train.warmup_steps=0 "train.betas=[0.9,0.95]" train.weight_decay=0.0 # inferred
    train.clip_grad=1.0 train.normalisation=kept-token-mean                                      # inferred
    train.save_every=5                                                                           # inferred
    train.max_length=34816

    # The bottleneck: accuracy on the training prompts, four samples each; it must dip by two standard errors.
    bottleneck.n=4 bottleneck.temperature=0.6 bottleneck.top_p=0.95 bottleneck.standard_errors=2.0 # inferred
    threshold=0.0
    "arms=[t3s,inverse,random,lowest]" rrt=true

    # Evaluation: the mean of 16 samples, with the decoding that Qwen3 recommends for thinking (inferred).
    "evaluate.file='$DATA_DIR/$EVAL.parquet'"
    evaluate.select_file=null
    evaluate.n=16 evaluate.max_tokens=32768
    "evaluate.temperatures=[0.6]" evaluate.top_p=0.95 evaluate.top_k=20
    reward.path=pkg://opd_ext.rewards.math_dual

    # The machine: a vLLM engine per GPU, then FSDP2 over all of them. None of it enters the maths.
    vllm.replicas="$GPUS"
    train.ranks="$GPUS"
)

exec opd t3s "${settings[@]}" "$@"
