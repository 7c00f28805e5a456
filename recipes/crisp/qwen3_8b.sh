#!/usr/bin/env bash
# CRISP (arXiv 2603.05433) on Qwen3-8B with the published settings: 100 steps on one node with eight H200.
#
#   opd data math --dapo FILE --math500 FILE --aime24 FILE --aime25 FILE --out ~/.cache/opd_ext/math      once
#   recipes/crisp/qwen3_8b.sh                              train; run again, it goes on from the last checkpoint in OUT
#   recipes/crisp/qwen3_8b.sh --dry-run                    the plan, without GPU, data or model
#   recipes/crisp/qwen3_8b.sh opd.teacher.interval=30      any setting can be overridden
#
# MODEL     hub id or folder                               Qwen/Qwen3-8B
# DATA_DIR  what `opd data math` wrote                     ${OPD_HOME:-~/.cache/opd_ext}/math
# TRAIN     training set in DATA_DIR                       dapo_train
# EVAL      validation sets in DATA_DIR                    "math500 aime24 aime25"
# OUT       run folder                                     ${OPD_RUNS:-runs}/crisp-qwen3-8b
# GPUS      on this node, a divisor of 32                  8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_MODEL, OPD_DATA_DIR, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -r $here/../common.sh ]] ||
    { echo "${0##*/}: ../common.sh is missing; keep this folder within recipes/." >&2; exit 2; }
. "$here/../common.sh"

MODEL=$(input MODEL Qwen/Qwen3-8B)
TRAIN=$(input TRAIN dapo_train)
EVAL=$(input EVAL "math500 aime24 aime25")
OUT=$(input OUT "${OPD_RUNS:-runs}/crisp-qwen3-8b")
gpu_run "$@"

settings=(
    method=crisp scale=node_8xh200

    # The teacher: a copy of the student that is told to be concise.
    opd.teacher.weights=periodic opd.teacher.interval=50 # copied after step 50, so 100 steps see one refresh in effect
    opd.context.kind=instruction opd.context.text=v2     # v1 shortens far more and costs accuracy on hard problems
    opd.context.strip_suffix=true                        # the release shows the teacher the closing reminder twice

    # The loss: exact reverse KL over the whole vocabulary, on every generated token, right or wrong, cut off or not.
    opd.divergence.kind=reverse_kl opd.divergence.support=full
    opd.divergence.temperature=1.0
    opd.credit.kind=uniform
    opd.reduction=token-mean # the release averages per micro-batch, so its loss depends on how a batch is split

    # Data: DAPO-Math-17k, 13,918 problems; 100 steps are a quarter of an epoch.
    data.train_batch_size=32
    actor_rollout_ref.rollout.n=1
    data.apply_chat_template_kwargs.enable_thinking=true # student, teacher and evaluation alike

    # Lengths in tokens. Both phases share max_response_length, so training has its own, tighter limit.
    data.max_prompt_length=1024
    data.max_response_length=30000
    opd.rollout.train_tokens=8192
    opd.rollout.val_tokens=30000
    opd.max_pair_length=10240 # prompt + response; a pair that is longer on either side is dropped whole

    # Sampling: untempered in training, Qwen3's recommendation in validation, 8 samples per problem.
    actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.top_p=1.0
    actor_rollout_ref.rollout.top_k=-1
    actor_rollout_ref.rollout.val_kwargs.do_sample=true
    actor_rollout_ref.rollout.val_kwargs.temperature=0.6
    actor_rollout_ref.rollout.val_kwargs.top_p=0.95
    actor_rollout_ref.rollout.val_kwargs.top_k=20
    actor_rollout_ref.rollout.val_kwargs.n=8

    # Optimiser: AdamW, one step per batch; a step whose gradient norm is not finite is skipped.
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.optim.lr_scheduler_type=constant
    actor_rollout_ref.actor.optim.lr_warmup_steps=0
    "actor_rollout_ref.actor.optim.betas=[0.9,0.999]"
    actor_rollout_ref.actor.optim.weight_decay=0.01
    actor_rollout_ref.actor.grad_clip=1.0
    actor_rollout_ref.actor.ppo_mini_batch_size=32

    # Precision: bf16 compute, fp32 master weights. A bf16 teacher equals an fp32 one that computes in bf16.
    actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
    actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16
    actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32
    actor_rollout_ref.ref.fsdp_config.model_dtype=bf16

    # The machine. Published: SGLang with tensor parallel 2, FSDP1 with Ulysses 4 and offload. Here: a vLLM replica per
    # GPU, FSDP2 over all GPUs, no offload. None of it enters the maths.
    trainer.nnodes=1
    actor_rollout_ref.model.enable_gradient_checkpointing=true
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=20480 # the published micro-batch: two pairs of full length
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 # vLLM's share while it generates; it sleeps during the update

    # The run. The published tables are from step 100 of the 434 in an epoch.
    trainer.total_training_steps=100
    trainer.val_before_train=true # the row "base" of the table
    trainer.test_freq=20
    trainer.save_freq=10
    trainer.max_actor_ckpt_to_keep=3
    trainer.experiment_name=crisp-qwen3-8b
    "${inputs[@]}" # model, data, GPUS and OUT
)

exec opd train "${settings[@]}" "$@"
