#!/usr/bin/env bash
# IW-OPD (arXiv 2606.22600) of Qwen3-4B-Instruct-2507 into Qwen3-0.6B, thinking off, with the settings of
# the published runs (recipes/opd is their baseline: this recipe without the weight).
#
#   opd data math --dapo FILE --aime24 FILE --aime25 FILE --out ~/.cache/opd_ext/math      once
#   recipes/iw_opd/qwen3_0_6b.sh                            train; run again, it goes on from the last checkpoint in OUT
#   recipes/iw_opd/qwen3_0_6b.sh --dry-run                  the plan, without GPU, data or model
#   recipes/iw_opd/qwen3_0_6b.sh opd.credit.gamma=1.0      any setting can be overridden
#
# MODEL     student: hub id or folder                      Qwen/Qwen3-0.6B
# TEACHER   likewise; its tokenizer must be the student's  Qwen/Qwen3-4B-Instruct-2507
# DATA_DIR  what `opd data math` wrote                     ${OPD_HOME:-~/.cache/opd_ext}/math
# TRAIN     training set in DATA_DIR                       dapo_train
# EVAL      validation sets in DATA_DIR                    "aime24 aime25"
# OUT       run folder                                     ${OPD_RUNS:-runs}/iw_opd-qwen3-0.6b
# GPUS      on this node, a divisor of 1024                8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_MODEL, OPD_DATA_DIR, ... there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -r $here/../common.sh ]] ||
    { echo "${0##*/}: ../common.sh is missing; keep this folder within recipes/." >&2; exit 2; }
. "$here/../common.sh"

MODEL=$(input MODEL Qwen/Qwen3-0.6B)
TEACHER=$(input TEACHER Qwen/Qwen3-4B-Instruct-2507)
TRAIN=$(input TRAIN dapo_train)
EVAL=$(input EVAL "aime24 aime25")
OUT=$(input OUT "${OPD_RUNS:-runs}/iw_opd-qwen3-0.6b")
gpu_run "$@"

settings=(
    method=iw_opd scale=node_8xh200

    # The teacher: another model that reads the same prompt, scored by the same engine as the student.
    opd.teacher.weights=external "opd.teacher.path='$TEACHER'"
    opd.context.kind=same

    # The loss: reverse KL on the sampled token as a policy gradient, no reward. The clips are inert with one update
    # per batch, where the ratio is 1.
    opd.divergence.kind=reverse_kl opd.divergence.support=sampled
    opd.divergence.ratio_clip=0.2 opd.divergence.dual_clip=3.0
    opd.credit.rollout_cap=5.0 # the trainer's old policy over vLLM's, per token
    actor_rollout_ref.rollout.calculate_log_probs=true
    opd.reduction=seq-mean-token-mean # what "token-mean" of verl 0.6.1 was at the published micro-batch of one sequence
    # The weight of a token: 1 + gamma x the share of the response's disagreement that still lies ahead of it.
    opd.credit.kind=position opd.credit.gamma=0.5

    # Data: one rollout of 1,024 prompts per step. Published: 57k problems of DeepMath-103K, difficulty 6 and above.
    data.train_batch_size=1024
    actor_rollout_ref.rollout.n=1
    data.apply_chat_template_kwargs.enable_thinking=false

    # Lengths in tokens.
    data.max_prompt_length=2048
    data.max_response_length=16384
    opd.rollout.train_tokens=16384
    opd.rollout.val_tokens=16384
    actor_rollout_ref.rollout.max_model_len=18432
    opd.max_pair_length=18432 # prompt + response
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=36864 # two pairs of full length

    # Sampling: untempered in training and validation alike, 32 samples per problem.
    actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.top_p=1.0
    actor_rollout_ref.rollout.top_k=-1
    actor_rollout_ref.rollout.val_kwargs.do_sample=true
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0
    actor_rollout_ref.rollout.val_kwargs.top_p=1.0
    actor_rollout_ref.rollout.val_kwargs.top_k=-1
    actor_rollout_ref.rollout.val_kwargs.n=32

    # Optimiser: AdamW, one step per batch, no warm-up.
    actor_rollout_ref.actor.ppo_mini_batch_size=1024
    actor_rollout_ref.actor.optim.lr=1e-5
    actor_rollout_ref.actor.optim.lr_scheduler_type=constant
    actor_rollout_ref.actor.optim.lr_warmup_steps=0
    "actor_rollout_ref.actor.optim.betas=[0.9,0.999]"
    actor_rollout_ref.actor.optim.weight_decay=0.01
    actor_rollout_ref.actor.grad_clip=1.0

    # Precision: bf16 compute, fp32 master weights. A bf16 teacher equals an fp32 one that computes in bf16.
    actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
    actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16
    actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32
    actor_rollout_ref.ref.fsdp_config.model_dtype=bf16

    # The machine. Published: 4 nodes, vLLM with tensor parallel 4. Here: a vLLM replica per GPU and FSDP2 over all
    # GPUs, no offload. None of it enters the maths.
    trainer.nnodes=1
    actor_rollout_ref.model.enable_gradient_checkpointing=true
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 # vLLM's share while it generates; it sleeps during the update

    # The run. Published: 3 epochs of 57k prompts, which are 167 steps; saved every 50.
    trainer.total_training_steps=167
    trainer.total_epochs=100 # steps end the run, not epochs, whatever the size of TRAIN
    trainer.val_before_train=true
    trainer.test_freq=10 # step 10 is a published point
    trainer.save_freq=50
    trainer.max_actor_ckpt_to_keep=3
    opd.seed=42
    trainer.experiment_name=iw_opd-qwen3-0.6b
    "${inputs[@]}" # model, data, GPUS and OUT
)

exec opd train "${settings[@]}" "$@"
