#!/usr/bin/env bash
# CRISP (arXiv 2603.05433) on Qwen3-14B: the published settings are those of the 8B model, so this is qwen3_8b.sh (read
# that) with another model and run folder. Same command line, same environment variables.
#
#   recipes/crisp/qwen3_14b.sh --dry-run
#   recipes/crisp/qwen3_14b.sh
#
# Memory, 14.8 B parameters over eight GPUs, 1.85 B per rank:
#     student  fp32 weights 6.9 + gradients 6.9 + AdamW moments 13.8 GiB        teacher  bf16 weights 3.4 GiB
#     20,480-token micro-batch: layer inputs 7.8 GiB                            head     about 9.3 GiB
# make about 49 GiB in the update, while vLLM sleeps; --dry-run prints this estimate. Generation keeps weights, moments
# and teacher (24 GiB) beside vLLM's 60 % of the GPU. An H200 (140 GiB) needs no offload for either. On 80 GB cards
# 24 + 48 GiB is tight: add actor_rollout_ref.actor.fsdp_config.optimizer_offload=true, which moves the moments
# (110 GiB on the node) to host memory between updates and costs seconds per step.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export MODEL=${MODEL:-${OPD_MODEL:-Qwen/Qwen3-14B}}
export OUT=${OUT:-${OPD_OUT:-${OPD_RUNS:-runs}/crisp-qwen3-14b}}

exec "$here/qwen3_8b.sh" trainer.experiment_name=crisp-qwen3-14b "$@"
