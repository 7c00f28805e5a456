#!/usr/bin/env bash
# TRACE (arXiv 2605.10194) on Qwen3-8B in thinking mode with the published settings; by default the model annotates its
# own rollouts ("online-self"), which needs nothing but the node.
#
#   opd data math --dapo FILE --math500 FILE --aime24 FILE --aime25 FILE --out ~/.cache/opd_ext/math      once
#   recipes/trace/qwen3_8b.sh                              train; run again, it goes on from the last checkpoint in OUT
#   recipes/trace/qwen3_8b.sh --dry-run                    the plan, without GPU, data or model
#   recipes/trace/qwen3_8b.sh opd.divergence.key.clip_mode=none      without the clip: README.md says why to try it
#
# MODEL     hub id or folder                               Qwen/Qwen3-8B
# DATA_DIR  what `opd data math` wrote                     ${OPD_HOME:-~/.cache/opd_ext}/math
# TRAIN     training set in DATA_DIR                       dapo_train
# EVAL      validation sets in DATA_DIR                    "math500 aime24 aime25"
# OUT       run folder                                     ${OPD_RUNS:-runs}/trace-qwen3-8b
# GPUS      on this node, a divisor of 256                 8
# recipes/ray/submit.sh passes on what begins with OPD_: set OPD_MODEL, OPD_DATA_DIR, ... there.
#
# ANNOTATOR          self, api (any OpenAI-compatible endpoint), server (a vLLM server of yours)      self
# ANNOTATOR_MODEL    api, server: name of the model at the endpoint
# ANNOTATOR_URL      api, server: the endpoint, e.g. http://host:8000/v1
# ANNOTATOR_KEY_ENV  api: name of the variable that holds the key                                     OPD_ANNOTATOR_KEY
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -r $here/../common.sh ]] ||
    { echo "${0##*/}: ../common.sh is missing; keep this folder within recipes/." >&2; exit 2; }
. "$here/../common.sh"

MODEL=$(input MODEL Qwen/Qwen3-8B)
TRAIN=$(input TRAIN dapo_train)
EVAL=$(input EVAL "math500 aime24 aime25")
OUT=$(input OUT "${OPD_RUNS:-runs}/trace-qwen3-8b")
gpu_run "$@"

annotator=("opd.credit.annotator.kind=$(input ANNOTATOR self)")
if [[ $(input ANNOTATOR self) != self ]]; then
    url=$(input ANNOTATOR_URL "")
    annotator+=(
        "opd.credit.annotator.model='$(input ANNOTATOR_MODEL "")'"
        "opd.credit.annotator.base_url=$([[ -n $url ]] && echo "'$url'" || echo null)" # null: the api's own
        "opd.credit.annotator.api_key_env=$(input ANNOTATOR_KEY_ENV OPD_ANNOTATOR_KEY)"
        opd.credit.annotator.max_concurrency=16 # per agent-loop worker, of which there are eight
        opd.credit.annotator.timeout_s=60
    )
fi

settings=(
    method=trace scale=node_8xh200

    # The teacher: a copy of the student, refreshed every 10 steps, that knows of what type the marked steps are.
    opd.teacher.weights=periodic opd.teacher.interval=10
    opd.context.kind=label opd.context.thinking=true

    # Where: at most a quarter of the tokens, on spans that an annotator marks in correct responses.
    opd.credit.kind=spans
    "${annotator[@]}"
    opd.credit.annotator.coverage=0.25

    # What: forward KL, teacher to student, on the teacher's 100 likeliest tokens; every entry clipped from above.
    opd.divergence.key.kind=forward_kl
    opd.divergence.key.support=topk opd.divergence.key.k=100
    opd.divergence.key.topk_by=teacher opd.divergence.key.tail=renorm # whose and what remains: not published
    opd.divergence.key.clip=0.05 opd.divergence.key.clip_mode=vocab_max
    opd.divergence.key.temperature=0.6 # the rollout temperature: not published
    opd.divergence.error=null # the pair (0, 1). On a weak base the paper finds (1, 0) better: see README.md

    # How long: weight 0.5 for 10 steps, then linearly to 0 at step 40. On the spans GRPO takes over meanwhile.
    opd.credit.weight=0.5 opd.credit.hold=10 opd.credit.decay=30
    opd.policy.loss=vanilla opd.policy.gate=complement
    opd.credit.inactive_span=nonspan # a class of spans without divergence has plain GRPO
    opd.reduction=seq-mean-token-mean # the mean over a response's tokens, then over responses, for both parts

    # GRPO, everywhere else and from step 40 on: recipes/grpo/qwen3_8b.sh has the same settings.
    algorithm.adv_estimator=grpo
    algorithm.norm_adv_by_std_in_grpo=true
    algorithm.filter_groups.enable=false # groups of equal rewards learn from the teacher
    actor_rollout_ref.actor.clip_ratio_low=0.2
    actor_rollout_ref.actor.clip_ratio_high=0.28
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
    actor_rollout_ref.actor.use_kl_loss=false
    algorithm.use_kl_in_reward=false
    actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.rollout.calculate_log_probs=true
    algorithm.rollout_correction.rollout_is=token
    algorithm.rollout_correction.rollout_is_threshold=2.0

    # Data: 32 prompts with 8 rollouts each per step. Published: maths of OpenThoughts-114k, up to 30k problems.
    data.train_batch_size=32
    actor_rollout_ref.rollout.n=8
    data.apply_chat_template_kwargs.enable_thinking=true # student and teacher alike

    # Lengths in tokens. Validation may write 38,912, which fills the model's 40,960 positions.
    data.max_prompt_length=2048
    data.max_response_length=38912
    opd.rollout.train_tokens=32768
    opd.rollout.val_tokens=38912
    actor_rollout_ref.rollout.max_model_len=40960
    opd.max_pair_length=35840 # prompt + note + response; a pair that is longer trains with GRPO alone
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=35840

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
    actor_rollout_ref.actor.optim.lr=1e-5
    actor_rollout_ref.actor.optim.lr_warmup_steps=10
    actor_rollout_ref.actor.optim.lr_scheduler_type=constant
    "actor_rollout_ref.actor.optim.betas=[0.9,0.999]"
    actor_rollout_ref.actor.optim.weight_decay=0.01
    actor_rollout_ref.actor.grad_clip=1.0

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

    # The run. The published table is from the checkpoint of step 250, chosen on held-out problems.
    trainer.total_training_steps=300
    trainer.val_before_train=true # the row "base" of the table
    trainer.test_freq=25
    trainer.save_freq=25
    trainer.max_actor_ckpt_to_keep=3
    trainer.experiment_name=trace-qwen3-8b
    "${inputs[@]}" # model, data, GPUS and OUT
)

exec opd train "${settings[@]}" "$@"
