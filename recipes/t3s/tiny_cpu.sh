#!/usr/bin/env bash
# T3S on a laptop: the real vLLM and FSDP on two CPU cores, no GPU, no download.
#
#   recipes/t3s/tiny_cpu.sh                            all of it, in minutes
#   recipes/t3s/tiny_cpu.sh --until bottleneck         stop there; the same command without it goes on
#   recipes/t3s/tiny_cpu.sh --dry-run                  the stages, and which of them are done
#   recipes/t3s/tiny_cpu.sh always_keep_eos=true       any setting can be overridden (here: the end is always trained)
#
# 1. The first time: unpacks the miniature world (tokenizer, arithmetic problems, a base model that solves them with too
#    many words, a larger and better one that will be its teacher) in ${OPD_HOME:-~/.cache/opd_ext}/tinymath.
# 2. Samples the teacher, fine-tunes a pilot on its right answers, finds the checkpoint that is worst on the training
#    prompts, and fine-tunes the base again on the tokens whose confidence has not risen by then; controls beside it.
# 3. Prints the tables and writes them, with figures, into report/ of the run folder: ${OPD_RUNS:-runs}/t3s-cpu_tiny.
#    Run again, it goes on where it stopped; set OPD_RUNS to start afresh.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

find_opd "bash setup.sh"
only_plans "$@" || build_world base large
name_pipeline t3s/tiny_cpu "$@"
exec opd t3s scale=cpu_tiny "${inputs[@]}" "$@"
