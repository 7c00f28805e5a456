#!/usr/bin/env bash
# T3S for the masked-diffusion model LLaDA2.0-mini; its autoregressive relative Ling-mini-2.0 selects the tokens. Little
# of the published run is known: README.md says what, what must be downloaded, and why both models need a patch first.
#
#   recipes/t3s/llada2_mini.sh                              all stages; run again, it goes on in OUT
#   recipes/t3s/llada2_mini.sh --dry-run                    the stages, and which of them are done; no GPU
#   recipes/t3s/llada2_mini.sh --until select-diffusion     the selector's part; also --only STAGE, --force STAGE
#   recipes/t3s/llada2_mini.sh diffusion.tau=0.1            any setting can be overridden
#
# MODEL      selector: folder or hub id                     inclusionAI/Ling-mini-2.0
# DIFFUSION  model that is trained, likewise                inclusionAI/LLaDA2.0-mini
# TRACES     column of TRAIN with verified traces           trace
# DATA_DIR   parquet files that README.md says how to make  ${OPD_HOME:-~/.cache/opd_ext}/math
# TRAIN      prompts with answers in DATA_DIR               s1k
# EVAL       problems that are reported                     aime
# OUT        run folder                                     ${OPD_RUNS:-runs}/t3s-llada2-mini
# GPUS       on this node, a divisor of 64                  8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_MODEL, OPD_DIFFUSION, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -r $here/../common.sh ]] ||
    { echo "${0##*/}: ../common.sh is missing; keep this folder within recipes/." >&2; exit 2; }
. "$here/../common.sh"

MODEL=$(input MODEL inclusionAI/Ling-mini-2.0)
DIFFUSION=$(input DIFFUSION inclusionAI/LLaDA2.0-mini)
TRACES=$(input TRACES trace)
TRAIN=$(input TRAIN s1k)
EVAL=$(input EVAL aime)
DATA_DIR=$(realpath -m "$(input DATA_DIR "${OPD_HOME:-$HOME/.cache/opd_ext}/math")")
OUT=$(realpath -m "$(input OUT "${OPD_RUNS:-runs}/t3s-llada2-mini")")
GPUS=$(input GPUS 8)
find_opd "bash setup.sh --gpu"
if [[ -d $MODEL ]]; then MODEL=$(realpath "$MODEL"); fi
if [[ -d $DIFFUSION ]]; then DIFFUSION=$(realpath "$DIFFUSION"); fi
if ! only_plans "$@"; then
    [[ -f $DIFFUSION/config.json || $DIFFUSION =~ ^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$ ]] ||
        die "DIFFUSION=$DIFFUSION is neither a folder with a config.json nor a hub id like inclusionAI/LLaDA2.0-mini."
    check_inputs "$TRAIN" "$EVAL"
fi

settings=(
    scale=node_8xh200
    preset=diffusion # tau, mask ratios, mask token, blocks and decoding: opd_ext/config/offline/preset
    "model='$MODEL'" "diffusion.model='$DIFFUSION'" "run_dir='$OUT'"
    trust_remote_code=true
    "prompts.file='$DATA_DIR/$TRAIN.parquet'"
    "traces_column='$TRACES'"

    # The selector's pilot. Published of pilots: batch, learning rate and some 16 epochs, here of 1,000 rows; the rest
    # is inferred. Only the selection is wanted of it, so it has no arms of its own.
    train.steps=250 train.batch_size=64 train.lr=1e-5
    train.schedule=constant train.warmup_steps=0 "train.betas=[0.9,0.95]" train.weight_decay=0.0
    train.save_every=25
    train.max_length=32768 train.tokens_per_gpu=32768
    "arms=[]" rrt=false
    bottleneck.n=4 bottleneck.temperature=0.6 bottleneck.top_p=0.95 bottleneck.standard_errors=2.0

    # The diffusion model: positions that lost more than tau nats are always restored, others with a ratio per sample.
    # 20 epochs of 15 whole batches, 3 % warm-up. For 200 prompts: steps 60, warm-up 2, as in the preset.
    diffusion.tau=0.2
    "diffusion.ratio=[0.3,0.8]"
    diffusion.train.steps=300 diffusion.train.warmup_steps=9 diffusion.train.save_every=300
    diffusion.train.batch_size=64 diffusion.train.lr=1e-5 diffusion.train.schedule=cosine
    diffusion.train.max_length=16384 # its context; longer traces lose their end
    "diffusion.train.verl=\${train.verl}"

    # Evaluation: one greedy answer of the diffusion model; of the selector, 16 samples. 2,048 of 16,384 tokens are left
    # to the prompt. There is no cache, so answers are dear.
    "evaluate.file='$DATA_DIR/$EVAL.parquet'"
    evaluate.select_file=null
    evaluate.n=16 evaluate.max_tokens=14336
    "evaluate.temperatures=[0.6]" evaluate.top_p=0.95
    reward.path=pkg://opd_ext.rewards.math_dual

    # The machine: a vLLM engine per GPU, or a denoising process, then FSDP2 over all of them.
    vllm.replicas="$GPUS" vllm.max_model_len=32768 # all that the selector knows positions for
    train.ranks="$GPUS" diffusion.train.ranks="$GPUS"
)

exec opd t3s "${settings[@]}" "$@"
