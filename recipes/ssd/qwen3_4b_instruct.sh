#!/usr/bin/env bash
# SSD (arXiv 2604.01193) with the published settings, of Qwen3-4B-Instruct-2507 or another published model (PRESET).
#
#   recipes/ssd/qwen3_4b_instruct.sh                        sample, fine-tune, evaluate; run again, it goes on in OUT
#   recipes/ssd/qwen3_4b_instruct.sh --dry-run              the stages, and which of them are done; no GPU
#   recipes/ssd/qwen3_4b_instruct.sh --until sample-ssd     stop after a stage; also --only STAGE, --force STAGE
#   PRESET=qwen3_4b_thinking recipes/ssd/qwen3_4b_instruct.sh
#   recipes/ssd/qwen3_4b_instruct.sh seed=2                 any setting can be overridden
#
# PRESET    llama3_1_8b_instruct, qwen3_4b_instruct, qwen3_30b_a3b_instruct, qwen3_4b_thinking,
#           qwen3_30b_a3b_thinking or gpt_oss_20b          qwen3_4b_instruct
# MODEL     hub id or folder                               the model of PRESET
# DATA_DIR  parquet files that README.md says how to make  ${OPD_HOME:-~/.cache/opd_ext}/code
# TRAIN     prompts in DATA_DIR                            rstar_coder_passed
# SELECT    problems on which T_eval is chosen             lcb_v5
# EVAL      problems that are reported                     lcb_v6
# OUT       run folder                                     ${OPD_RUNS:-runs}/ssd-$PRESET
# GPUS      on this node: 4, 8, 16 or 32                   8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_PRESET, OPD_DATA_DIR, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -r $here/../common.sh ]] ||
    { echo "${0##*/}: ../common.sh is missing; keep this folder within recipes/." >&2; exit 2; }
. "$here/../common.sh"

PRESET=$(input PRESET qwen3_4b_instruct)
# The system message asks for what the grader looks for; only instruct models are told to think. Published: the same
# two kinds of message, not their words.
wanted="write the complete program in one block that begins with \`\`\`python."
instruct="Solve the problem in Python. Reason step by step first, then $wanted"
thinking="Solve the problem in Python. In the answer, $wanted"
case $PRESET in
    llama3_1_8b_instruct) published=meta-llama/Llama-3.1-8B-Instruct system=$instruct ;;
    qwen3_4b_instruct) published=Qwen/Qwen3-4B-Instruct-2507 system=$instruct ;;
    qwen3_30b_a3b_instruct) published=Qwen/Qwen3-30B-A3B-Instruct-2507 system=$instruct ;;
    qwen3_4b_thinking) published=Qwen/Qwen3-4B-Thinking-2507 system=$thinking ;;
    qwen3_30b_a3b_thinking) published=Qwen/Qwen3-30B-A3B-Thinking-2507 system=$thinking ;;
    gpt_oss_20b) published=openai/gpt-oss-20b system=$thinking ;;
    *) die "PRESET=$PRESET is not published; choose one of those that the first lines of this script name." ;;
esac
MODEL=$(input MODEL "$published")
TRAIN=$(input TRAIN rstar_coder_passed)
SELECT=$(input SELECT lcb_v5)
EVAL=$(input EVAL lcb_v6)
DATA_DIR=$(realpath -m "$(input DATA_DIR "${OPD_HOME:-$HOME/.cache/opd_ext}/code")")
OUT=$(realpath -m "$(input OUT "${OPD_RUNS:-runs}/ssd-$PRESET")")
GPUS=$(input GPUS 8)
find_opd "bash setup.sh --gpu"
if [[ -d $MODEL ]]; then MODEL=$(realpath "$MODEL"); fi
only_plans "$@" || check_inputs "$TRAIN" "$SELECT" "$EVAL"

settings=(
    scale=node_8xh200
    preset="$PRESET" # how to sample (arms.ssd), steps, warm-up and where to save: opd_ext/config/offline/preset
    "model='$MODEL'" "run_dir='$OUT'"

    # Prompts: one per statement, whatever becomes of it. No tests, no solutions, no filter on the answers.
    "prompts.file='$DATA_DIR/$TRAIN.parquet'"
    prompts.deduplicate=true
    "prompts.system='$system'"

    # Samples: one per prompt. Published: 128K tokens in all; the released code caps the response at 65,536.
    max_tokens=65536
    arms.control.temperature=1.0 arms.control.top_k=-1 arms.control.top_p=1.0 # mandatory, see README.md

    # Fine-tuning: AdamW, cosine from 5e-6 to 1e-6, batches of 32, a token mean over the batch.
    train.batch_size=32
    train.lr=5e-6 train.min_lr=1e-6 train.schedule=cosine
    "train.betas=[0.9,0.95]" train.weight_decay=0.1
    train.clip_grad=1.0 train.normalisation=kept-token-mean # neither is published
    train.max_length=65536                                  # what is longer loses its end, and is counted

    # Evaluation: 10 samples per problem. T_eval is chosen on v5 and reported on v6, of the last checkpoint; published
    # is, as far as one can tell, the best of checkpoints and temperatures on the benchmark itself.
    "evaluate.file='$DATA_DIR/$EVAL.parquet'"
    "evaluate.select_file='$DATA_DIR/$SELECT.parquet'"
    evaluate.n=10
    evaluate.max_tokens=65536
    reward.path=pkg://opd_ext.rewards.code # right if every test passes

    # The machine: a vLLM engine per GPU, then FSDP2 over all of them. Four GPUs share a sequence (Ulysses), so that the
    # logits of one of 65,536 tokens fit. None of it enters the maths. Published: Megatron-LM on eight B200.
    vllm.replicas="$GPUS"
    train.ranks="$GPUS"
    train.verl.engine.ulysses_sequence_parallel_size=4
    train.verl.data.max_token_len_per_gpu=16384
)

exec opd ssd "${settings[@]}" "$@"
