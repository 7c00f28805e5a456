#!/usr/bin/env bash
# CISPO (arXiv 2506.13585) on Qwen3-8B-Base. The paper's controlled study trains a base model (Qwen2.5-32B) on DAPO's
# problems and discloses neither the cap of the weight nor learning rate, batch and group size: what is not published
# says so below. The published parts: the loss, 16 updates per batch, AdamW's betas and epsilon, the fp32 head.
#
#   opd data math --dapo FILE --aime24 FILE --out ~/.cache/opd_ext/math      once
#   recipes/cispo/qwen3_8b_base.sh                         train; run again, it goes on from the last checkpoint in OUT
#   recipes/cispo/qwen3_8b_base.sh --dry-run               the plan, without GPU, data or model
#   recipes/cispo/qwen3_8b_base.sh actor_rollout_ref.actor.clip_ratio_high=0.2     cap 1.2: another algorithm
#
# MODEL     hub id or folder                               Qwen/Qwen3-8B-Base
# DATA_DIR  what `opd data math` wrote                     ${OPD_HOME:-~/.cache/opd_ext}/math
# TRAIN     training set in DATA_DIR                       dapo_train
# EVAL      validation sets in DATA_DIR                    "aime24"
# OUT       run folder                                     ${OPD_RUNS:-runs}/cispo-qwen3-8b-base
# GPUS      on this node, a divisor of 512                 8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_MODEL, OPD_DATA_DIR, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -r $here/../common.sh ]] ||
    { echo "${0##*/}: ../common.sh is missing; keep this folder within recipes/." >&2; exit 2; }
. "$here/../common.sh"

MODEL=$(input MODEL Qwen/Qwen3-8B-Base)
TRAIN=$(input TRAIN dapo_train)
EVAL=$(input EVAL aime24)
OUT=$(input OUT "${OPD_RUNS:-runs}/cispo-qwen3-8b-base")
gpu_run "$@"

settings=(
    method=cispo scale=node_8xh200

    # The loss: log-prob x advantage x importance weight, the weight capped from above only and held constant.
    opd.policy.loss=cispo
    actor_rollout_ref.actor.clip_ratio_high=4.0 # cap 5. Not disclosed; others found 4 to 8 alike
    actor_rollout_ref.actor.clip_ratio_low=10   # bound 1 - 10: off. verl's 0.2 would raise small weights to 0.8
    opd.policy.prompt_mean=true                 # the paper's: a mean over the tokens of a group, then over groups
    actor_rollout_ref.actor.loss_agg_mode=token-sum  # prompt_mean has put the denominators into the advantages
    actor_rollout_ref.actor.use_kl_loss=false
    algorithm.use_kl_in_reward=false
    actor_rollout_ref.actor.entropy_coeff=0
    opd.head.fp32=true # trainer and sampler agree better: published correlation 0.987 -> 0.997

    # The advantage: reward minus the group's mean, over its standard deviation.
    algorithm.adv_estimator=grpo
    algorithm.norm_adv_by_std_in_grpo=true
    algorithm.filter_groups.enable=false # published: dynamic sampling, see README.md

    # Data: 16 updates per batch is what makes CISPO differ from REINFORCE. 512 x 16 is DAPO's, not disclosed.
    data.train_batch_size=512
    actor_rollout_ref.actor.ppo_mini_batch_size=32
    actor_rollout_ref.actor.ppo_epochs=1
    actor_rollout_ref.rollout.n=16
    data.apply_chat_template_kwargs.enable_thinking=true # adds nothing to the prompt; false would close a think block

    # Lengths in tokens. Ours: M1 went from 40,960 to 80,000, a base model of this size writes a few thousand.
    data.max_prompt_length=1024
    data.max_response_length=16384
    opd.rollout.train_tokens=8192
    opd.rollout.val_tokens=16384
    actor_rollout_ref.rollout.max_model_len=17408
    opd.max_pair_length=9216 # prompt + response
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=18432

    # Sampling: temperature 1 and top-p 0.95 are M1's evaluation; AIME 2024 is reported as a mean of 32.
    actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.top_p=1.0
    actor_rollout_ref.rollout.top_k=-1
    actor_rollout_ref.rollout.val_kwargs.do_sample=true
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0
    actor_rollout_ref.rollout.val_kwargs.top_p=0.95
    actor_rollout_ref.rollout.val_kwargs.top_k=-1
    actor_rollout_ref.rollout.val_kwargs.n=32

    # Optimiser: betas and epsilon as published, the rest not disclosed.
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.optim.lr_scheduler_type=constant
    actor_rollout_ref.actor.optim.lr_warmup_steps=0
    "actor_rollout_ref.actor.optim.betas=[0.9,0.95]"
    "actor_rollout_ref.actor.optim.override_optimizer_config={eps:1e-15}" # the usual 1e-8 drowns small gradients
    actor_rollout_ref.actor.optim.weight_decay=0.01
    actor_rollout_ref.actor.grad_clip=1.0 # lowered, with the cap, in M1's long-context stages: 0.5 there

    # Precision: bf16 compute, fp32 master weights.
    actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
    actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16
    actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32

    # The machine: a vLLM replica per GPU and FSDP2 over all GPUs, no offload. None of it enters the maths.
    trainer.nnodes=1
    actor_rollout_ref.model.enable_gradient_checkpointing=true
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 # vLLM's share while it generates; it sleeps during the update

    # The run. The paper's curves reach DAPO's final score in half of DAPO's steps, at about step 450.
    trainer.total_training_steps=450
    trainer.total_epochs=100 # steps end the run, not epochs: 512 of 13,918 problems per step are 27 steps an epoch
    trainer.val_before_train=true
    trainer.test_freq=25
    trainer.save_freq=25
    trainer.max_actor_ckpt_to_keep=3
    trainer.experiment_name=cispo-qwen3-8b-base
    "${inputs[@]}" # model, data, GPUS and OUT
)

exec opd train "${settings[@]}" "$@"
