#!/usr/bin/env bash
# SDPO (arXiv 2601.20802) on Qwen3-8B, thinking off, with the published settings of its runs without rich feedback
# (science questions and tool use) - on maths, for which the authors publish no recipe. README.md has the published
# science questions and what is known about maths.
#
#   opd data math --dapo FILE --math500 FILE --aime24 FILE --aime25 FILE --out ~/.cache/opd_ext/math      once
#   recipes/sdpo/qwen3_8b.sh                               train; run again, it goes on from the last checkpoint in OUT
#   recipes/sdpo/qwen3_8b.sh --dry-run                     the plan, without GPU, data or model
#   recipes/sdpo/qwen3_8b.sh opd.teacher.weights=frozen    any setting can be overridden
#
# MODEL     hub id or folder                               Qwen/Qwen3-8B
# DATA_DIR  what `opd data math` wrote                     ${OPD_HOME:-~/.cache/opd_ext}/math
# TRAIN     training set in DATA_DIR                       dapo_train
# EVAL      validation sets in DATA_DIR                    "math500 aime24 aime25"
# OUT       run folder                                     ${OPD_RUNS:-runs}/sdpo-qwen3-8b
# GPUS      on this node, a divisor of 256                 8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_MODEL, OPD_DATA_DIR, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -r $here/../common.sh ]] ||
    { echo "${0##*/}: ../common.sh is missing; keep this folder within recipes/." >&2; exit 2; }
. "$here/../common.sh"

MODEL=$(input MODEL Qwen/Qwen3-8B)
TRAIN=$(input TRAIN dapo_train)
EVAL=$(input EVAL "math500 aime24 aime25")
OUT=$(input OUT "${OPD_RUNS:-runs}/sdpo-qwen3-8b")
gpu_run "$@"

settings=(
    method=sdpo scale=node_8xh200

    # The teacher: a slow copy of the student that has read a correct answer of a sibling rollout.
    opd.teacher.weights=ema opd.teacher.rate=0.05 # per batch of rollouts
    opd.context.kind=feedback
    opd.context.success_threshold=0.5
    opd.context.exclude_own_success=true
    opd.context.remove_thinking=true
    opd.context.include_feedback=false # published so for runs without rich feedback
    opd.context.demonstration=random    # the release takes the first in an order that depends on length
    opd.context.max_body_tokens=8192    # the release cuts the whole prompt, request and header included

    # The loss: Jensen-Shannon divergence on the student's 100 likeliest tokens and one bucket for all others.
    opd.divergence.kind=jsd opd.divergence.beta=0.5
    opd.divergence.support=topk opd.divergence.k=100 opd.divergence.topk_by=student opd.divergence.tail=bucket
    opd.divergence.temperature=1.0 # the rollout temperature
    opd.credit.kind=uniform
    opd.credit.importance_cap=2.0 # current over old policy; 1 with one update per batch
    opd.credit.rollout_cap=2.0    # old policy over vLLM's
    actor_rollout_ref.rollout.calculate_log_probs=true
    opd.reduction=seq-mean-token-mean opd.denominator=trained # samples without a teacher count in the mean, with 0

    # Rewards only say which rollouts are correct.
    reward.custom_reward_function.path=pkg://opd_ext.rewards.math_dual

    # Data: 32 prompts with 8 rollouts each per step.
    data.train_batch_size=32
    actor_rollout_ref.rollout.n=8
    data.apply_chat_template_kwargs.enable_thinking=false

    # Lengths in tokens: template 512 + prompt 2,048 + demonstration 8,192 + response 8,192 for the pair.
    data.max_prompt_length=2048
    data.max_response_length=8192
    opd.rollout.train_tokens=8192
    opd.rollout.val_tokens=8192
    actor_rollout_ref.rollout.max_model_len=18944
    opd.max_pair_length=18944
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=20480

    # Sampling: untempered in training, 16 samples per problem in validation.
    actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.top_p=1.0
    actor_rollout_ref.rollout.top_k=-1
    actor_rollout_ref.rollout.val_kwargs.do_sample=true
    actor_rollout_ref.rollout.val_kwargs.temperature=0.6
    actor_rollout_ref.rollout.val_kwargs.top_p=0.95
    actor_rollout_ref.rollout.val_kwargs.top_k=-1
    actor_rollout_ref.rollout.val_kwargs.n=16

    # Optimiser: AdamW, one step per batch.
    actor_rollout_ref.actor.ppo_mini_batch_size=32
    actor_rollout_ref.actor.optim.lr=1e-5
    actor_rollout_ref.actor.optim.lr_scheduler_type=constant
    actor_rollout_ref.actor.optim.lr_warmup_steps=10
    "actor_rollout_ref.actor.optim.betas=[0.9,0.999]"
    actor_rollout_ref.actor.optim.weight_decay=0.01
    actor_rollout_ref.actor.grad_clip=1.0

    # Precision: bf16 compute, fp32 master weights.
    actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
    actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16
    actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32
    actor_rollout_ref.ref.fsdp_config.model_dtype=fp32 # a moving average in bf16 would lose its small changes

    # The machine: a vLLM replica per GPU and FSDP2 over all GPUs, no offload. None of it enters the maths.
    trainer.nnodes=1
    actor_rollout_ref.model.enable_gradient_checkpointing=true
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 # vLLM's share while it generates; it sleeps during the update

    # The run. Published: five hours on four GH200, scored by the best validation, one every 5 steps.
    trainer.total_training_steps=200
    trainer.val_before_train=true
    trainer.test_freq=5
    trainer.save_freq=10 # published: none. Keep the best one: SDPO can collapse late
    trainer.max_actor_ckpt_to_keep=3
    trainer.experiment_name=sdpo-qwen3-8b
    "${inputs[@]}" # model, data, GPUS and OUT
)

exec opd train "${settings[@]}" "$@"
