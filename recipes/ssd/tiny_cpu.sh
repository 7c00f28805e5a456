#!/usr/bin/env bash
# SSD on a laptop: the real vLLM and FSDP on two CPU cores, no GPU, no download.
#
#   recipes/ssd/tiny_cpu.sh                            all of it, in minutes
#   recipes/ssd/tiny_cpu.sh --until train-control      stop there; the same command without it goes on
#   recipes/ssd/tiny_cpu.sh --dry-run                  the stages, and which of them are done
#   recipes/ssd/tiny_cpu.sh sweep=[]                   any setting can be overridden (here: only the named arms)
#
# 1. The first time: unpacks the miniature world (tokenizer, arithmetic problems, a base model that solves them with too
#    many words) in ${OPD_HOME:-~/.cache/opd_ext}/tinymath.
# 2. Samples one answer per problem in several ways, the mandatory control among them, and fine-tunes a model on each.
# 3. Evaluates all of them over several temperatures, prints the tables and writes them, with figures, into report/ of
#    the run folder: ${OPD_RUNS:-runs}/ssd-cpu_tiny. Run again, it goes on where it stopped; set OPD_RUNS to start
#    afresh.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -r $here/../common.sh ]] ||
    { echo "${0##*/}: ../common.sh is missing; keep this folder within recipes/." >&2; exit 2; }
. "$here/../common.sh"

find_opd "bash setup.sh"
only_plans "$@" || build_world base
exec opd ssd scale=cpu_tiny "$@"
