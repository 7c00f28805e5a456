#!/usr/bin/env bash
# What goes with every method, one thing at a time: on a CPU in the miniature world, or as a recipe's run on a node.
#   examples/wide/run.sh                                   all of it on this machine, four steps each, then one table
#   examples/wide/run.sh async                             one of them
#   examples/wide/run.sh async method=sdpo                 with settings of your own behind it
#   NODE=1 examples/wide/run.sh sequence_parallel --dry-run    on 8 GPUs: the plan; without --dry-run the run
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=recipes/common.sh
. recipes/common.sh
ALL=(async separate sequence_parallel horizon served_teacher likeliest lora)
OUT=${OUT:-$PWD/runs/wide}

settings() { # NAME: what it is made of, one override per line
    case ${NODE:+node_}$1 in
        async) set -- method=crisp asynchronous=one_step_off ;;
        separate) set -- method=crisp asynchronous=separate_cpu ;;
        sequence_parallel) set -- method=crisp trainer.n_gpus_per_node=2 \
            actor_rollout_ref.actor.ulysses_sequence_parallel_size=2 ;;
        horizon) set -- method=opd 'opd.horizon={start: 0.1, end: 0.5, steps: 3, stop: true}' ;;
        served_teacher) set -- method=crisp teacher_server=vllm_cpu ;;
        likeliest) set -- method=opd teacher_server=cpu_tiny 'opd.divergence={kind: forward_kl, support: topk, k: 8}' ;;
        lora) set -- method=sdpo actor_rollout_ref.model.lora_rank=16 actor_rollout_ref.model.lora.merge=true \
            actor_rollout_ref.actor.optim.lr=1e-3 ;;
        node_async) set -- recipe=crisp/qwen3_8b asynchronous=one_step_off ;;
        node_separate) set -- recipe=crisp/qwen3_8b asynchronous=separate_node_8xh200 ;;
        node_sequence_parallel) set -- recipe=crisp/qwen3_8b opd.rollout.train_tokens=32768 \
            data.max_response_length=32768 opd.max_pair_length=34816 actor_rollout_ref.rollout.max_model_len=34816 \
            actor_rollout_ref.actor.ulysses_sequence_parallel_size=4 \
            actor_rollout_ref.actor.ppo_max_token_len_per_gpu=9216 ;;
        node_horizon) set -- recipe=opd/qwen3_0_6b 'opd.horizon={start: 0.1, end: 0.5, steps: 100, stop: true}' ;;
        node_served_teacher) set -- recipe=crisp/qwen3_8b trainer.n_gpus_per_node=4 teacher_server=vllm_node_8xh200 ;;
        node_likeliest) set -- recipe=opd/qwen3_0_6b teacher_server=node_8xh200 trainer.n_gpus_per_node=4 \
            'opd.divergence={kind: forward_kl, support: topk, k: 64}' ;;
        node_lora) set -- recipe=sdpo/qwen3_8b actor_rollout_ref.model.lora_rank=64 \
            actor_rollout_ref.model.lora.merge=true actor_rollout_ref.actor.optim.lr=1e-5 ;;
        *) die "there is no $1: choose one of ${ALL[*]}" ;;
    esac
    printf '%s\n' "$@"
}

one() { # NAME SETTINGS...
    local name=$1 found
    found=$(settings "$name")
    mapfile -t found <<<"$found"
    shift
    if [[ -z ${NODE:-} ]]; then
        found+=(scale=cpu_tiny trainer.total_training_steps=4 trainer.test_freq=4 trainer.save_freq=4 data.val_max_samples=32)
    fi
    opd train "${found[@]}" "opd.run_dir='$OUT/$name'" "$@"
}

find_opd "bash setup.sh"
if (($#)); then
    [[ -n ${NODE:-} ]] || only_plans "$@" || build_world base large
    one "$@"
else
    [[ -z ${NODE:-} ]] || die "NODE=1 needs the name of one: choose one of ${ALL[*]}"
    build_world base large
    for name in "${ALL[@]}"; do one "$name"; done
    opd ls "$OUT"
fi
