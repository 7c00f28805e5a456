#!/usr/bin/env bash
# OPSD (arXiv 2601.18734) on Qwen3-1.7B, the model of the released numbers, with the settings of the release of March
# 2026: forward KL with a clip. Thinking is off for the student and on for the teacher.
#
#   recipes/opsd/qwen3_1_7b.sh                             train; run again, it goes on from the last checkpoint in OUT
#   recipes/opsd/qwen3_1_7b.sh --dry-run                   the plan, without GPU, data or model
#   recipes/opsd/qwen3_1_7b.sh opd.divergence.clip_mode=none      any setting can be overridden
#
# The training set needs a solution for every problem; README.md says how to make it. `opd data math` makes the rest.
#
# MODEL     hub id or folder                               Qwen/Qwen3-1.7B
# DATA_DIR  folder of the data sets                        ${OPD_HOME:-~/.cache/opd_ext}/math
# TRAIN     training set in DATA_DIR                       openthoughts_solutions
# EVAL      validation sets in DATA_DIR                    "aime24 aime25"
# OUT       run folder                                     ${OPD_RUNS:-runs}/opsd-qwen3-1.7b
# GPUS      on this node, a divisor of 32                  8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_MODEL, OPD_DATA_DIR, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -r $here/../common.sh ]] ||
    { echo "${0##*/}: ../common.sh is missing; keep this folder within recipes/." >&2; exit 2; }
. "$here/../common.sh"

MODEL=$(input MODEL Qwen/Qwen3-1.7B)
TRAIN=$(input TRAIN openthoughts_solutions)
EVAL=$(input EVAL "aime24 aime25")
OUT=$(input OUT "${OPD_RUNS:-runs}/opsd-qwen3-1.7b")
gpu_run "$@"

settings=(
    method=opsd scale=node_8xh200

    # The teacher: the initial model, which reads the reference solution and thinks.
    opd.teacher.weights=frozen
    opd.context.kind=solution opd.context.thinking=true

    # The loss: forward KL, teacher to student, over the whole vocabulary; every entry's part is clipped from above.
    opd.divergence.kind=forward_kl opd.divergence.support=full
    opd.divergence.clip=0.05 opd.divergence.clip_mode=vocab_max # tokens of style would dominate without it
    opd.divergence.temperature=1.1 # divides both logits, as in sampling; the loss is not multiplied by its square
    opd.credit.kind=uniform
    opd.reduction=token-mean # the release averages per device

    # Data: OpenThoughts maths, 30k problems with solutions.
    data.train_batch_size=32
    actor_rollout_ref.rollout.n=1
    data.apply_chat_template_kwargs.enable_thinking=false # student, and validation too: see README.md

    # Lengths in tokens. The pair is 20,000 with the solution; the other limits follow from evaluation's 38,912.
    data.max_prompt_length=2048
    data.max_response_length=38912
    opd.rollout.train_tokens=1024
    opd.rollout.val_tokens=38912
    actor_rollout_ref.rollout.max_model_len=40960
    opd.max_pair_length=20000 # prompt + response; a pair that is longer on either side is dropped whole
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=20480

    # Sampling: warm in training; validation 12 samples per problem at temperature 1.
    actor_rollout_ref.rollout.temperature=1.1
    actor_rollout_ref.rollout.top_p=0.95
    actor_rollout_ref.rollout.top_k=20
    actor_rollout_ref.rollout.val_kwargs.do_sample=true
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0
    actor_rollout_ref.rollout.val_kwargs.top_p=0.95
    actor_rollout_ref.rollout.val_kwargs.top_k=-1
    actor_rollout_ref.rollout.val_kwargs.n=12

    # Optimiser. Published: LoRA (rank 64) with a linear decay to 0. Here: all weights, and verl's cosine to 0, since
    # verl has constant and cosine only.
    actor_rollout_ref.actor.ppo_mini_batch_size=32
    actor_rollout_ref.actor.optim.lr=5e-6
    actor_rollout_ref.actor.optim.lr_scheduler_type=cosine
    actor_rollout_ref.actor.optim.min_lr_ratio=0.0
    actor_rollout_ref.actor.optim.lr_warmup_steps=0
    "actor_rollout_ref.actor.optim.betas=[0.9,0.999]"
    actor_rollout_ref.actor.optim.weight_decay=0.0
    actor_rollout_ref.actor.grad_clip=0.1

    # Precision: bf16 compute, fp32 master weights. A bf16 teacher equals an fp32 one that computes in bf16.
    actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
    actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16
    actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32
    actor_rollout_ref.ref.fsdp_config.model_dtype=bf16

    # The machine: a vLLM replica per GPU and FSDP2 over all GPUs, no offload. None of it enters the maths.
    trainer.nnodes=1
    actor_rollout_ref.model.enable_gradient_checkpointing=true
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 # vLLM's share while it generates; it sleeps during the update

    # The run: every 25 steps a row of the released table.
    trainer.total_training_steps=100
    trainer.val_before_train=true # the column "base"
    trainer.test_freq=25
    trainer.save_freq=25
    trainer.max_actor_ckpt_to_keep=4
    trainer.experiment_name=opsd-qwen3-1.7b
    "${inputs[@]}" # model, data, GPUS and OUT
)

exec opd train "${settings[@]}" "$@"
