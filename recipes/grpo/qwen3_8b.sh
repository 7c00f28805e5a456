#!/usr/bin/env bash
# GRPO (arXiv 2402.03300) with DAPO's clip-higher (arXiv 2503.14476) on Qwen3-8B in thinking mode: the settings of the
# GRPO run that TRACE (arXiv 2605.10194) compares itself with, so that this and recipes/trace are two arms of one study.
#
#   opd data math --dapo FILE --math500 FILE --aime24 FILE --aime25 FILE --out ~/.cache/opd_ext/math      once
#   recipes/grpo/qwen3_8b.sh                               train; run again, it goes on from the last checkpoint in OUT
#   recipes/grpo/qwen3_8b.sh --dry-run                     the plan, without GPU, data or model
#   recipes/grpo/qwen3_8b.sh opd.seed=2                    any setting can be overridden
#
# MODEL     hub id or folder                               Qwen/Qwen3-8B
# DATA_DIR  what `opd data math` wrote                     ${OPD_HOME:-~/.cache/opd_ext}/math
# TRAIN     training set in DATA_DIR                       dapo_train
# EVAL      validation sets in DATA_DIR                    "math500 aime24 aime25"
# OUT       run folder                                     ${OPD_RUNS:-runs}/grpo-qwen3-8b
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
OUT=$(input OUT "${OPD_RUNS:-runs}/grpo-qwen3-8b")
gpu_run "$@"

settings=(
    method=grpo scale=node_8xh200

    # The loss: PPO's clipped surrogate with more room upwards, no KL, no entropy bonus.
    opd.policy.loss=vanilla
    actor_rollout_ref.actor.clip_ratio_low=0.2
    actor_rollout_ref.actor.clip_ratio_high=0.28 # clip-higher: rare tokens may become likely
    actor_rollout_ref.actor.use_kl_loss=false
    algorithm.use_kl_in_reward=false
    actor_rollout_ref.actor.entropy_coeff=0
    # Not published for this run. Responses count alike, as in the TRACE recipe, which is this one from step 40 on.
    # DAPO itself has token-mean: tokens count alike.
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean

    # The advantage: reward minus the group's mean, over its standard deviation. Groups of equal rewards stay, with 0.
    algorithm.adv_estimator=grpo
    algorithm.norm_adv_by_std_in_grpo=true
    algorithm.filter_groups.enable=false
    # vLLM and the trainer differ a little in their log-probs: weights per token, capped.
    actor_rollout_ref.rollout.calculate_log_probs=true
    algorithm.rollout_correction.rollout_is=token
    algorithm.rollout_correction.rollout_is_threshold=2.0

    # Data: 32 prompts with 8 rollouts each per step.
    data.train_batch_size=32
    actor_rollout_ref.rollout.n=8
    data.apply_chat_template_kwargs.enable_thinking=true

    # Lengths in tokens. Validation may write 38,912, which fills the model's 40,960 positions.
    data.max_prompt_length=2048
    data.max_response_length=38912
    opd.rollout.train_tokens=32768
    opd.rollout.val_tokens=38912
    actor_rollout_ref.rollout.max_model_len=40960
    opd.max_pair_length=34816 # prompt + response
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=34816

    # Sampling; top-p and top-k of training are not published: none. Qwen3's recommendation in validation.
    actor_rollout_ref.rollout.temperature=0.6
    actor_rollout_ref.rollout.top_p=1.0
    actor_rollout_ref.rollout.top_k=-1
    actor_rollout_ref.rollout.val_kwargs.do_sample=true
    actor_rollout_ref.rollout.val_kwargs.temperature=0.6
    actor_rollout_ref.rollout.val_kwargs.top_p=0.95
    actor_rollout_ref.rollout.val_kwargs.top_k=20
    actor_rollout_ref.rollout.val_kwargs.n=8 # published for MATH-500; AIME has 16

    # Optimiser: AdamW, one step per batch.
    actor_rollout_ref.actor.ppo_mini_batch_size=32
    actor_rollout_ref.actor.optim.lr=1e-5 # the best of 1e-6, 5e-6 and 1e-5 in the published sweep
    actor_rollout_ref.actor.optim.lr_warmup_steps=10
    actor_rollout_ref.actor.optim.lr_scheduler_type=constant
    "actor_rollout_ref.actor.optim.betas=[0.9,0.999]"
    actor_rollout_ref.actor.optim.weight_decay=0.01
    actor_rollout_ref.actor.grad_clip=1.0

    # Precision: bf16 compute, fp32 master weights.
    actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
    actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16
    actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32

    # The machine: a vLLM replica per GPU and FSDP2 over all GPUs, no offload. None of it enters the maths.
    trainer.nnodes=1
    actor_rollout_ref.model.enable_gradient_checkpointing=true
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 # vLLM's share while it generates; it sleeps during the update

    # The run. The published table is from the checkpoint of step 250, chosen on held-out problems.
    trainer.total_training_steps=300
    trainer.val_before_train=true # the row "base" of the table
    trainer.test_freq=25
    trainer.save_freq=25
    trainer.max_actor_ckpt_to_keep=3
    trainer.experiment_name=grpo-qwen3-8b
    "${inputs[@]}" # model, data, GPUS and OUT
)

exec opd train "${settings[@]}" "$@"
