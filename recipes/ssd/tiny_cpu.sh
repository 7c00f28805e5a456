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
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

find_opd "bash setup.sh"
only_plans "$@" || build_world base
name_pipeline ssd/tiny_cpu "$@"
exec opd ssd scale=cpu_tiny "${inputs[@]}" "$@"
