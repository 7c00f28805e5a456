#!/usr/bin/env bash
# OPSD (arXiv 2601.18734) on Qwen3-8B: the settings of qwen3_1_7b.sh (read that) with another model, run folder and the
# clip that the authors use at this size. Same command line, same environment variables. Independent runs at 8B found
# next to nothing or a loss in thinking mode: see README.md before you spend a node on it.
#
#   recipes/opsd/qwen3_8b.sh --dry-run
#   recipes/opsd/qwen3_8b.sh
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export MODEL=${MODEL:-${OPD_MODEL:-Qwen/Qwen3-8B}}
export OUT=${OUT:-${OPD_OUT:-${OPD_RUNS:-runs}/opsd-qwen3-8b}}

exec "$here/qwen3_1_7b.sh" trainer.experiment_name=opsd-qwen3-8b opd.divergence.clip=0.06 "$@"
