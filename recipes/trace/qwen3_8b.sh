#!/usr/bin/env bash
# TRACE (arXiv 2605.10194) on Qwen3-8B in thinking mode with the published settings; by default the model annotates its
# own rollouts ("online-self"), which needs nothing but the node.
# Settings: opd_ext/config/recipe/trace/qwen3_8b.yaml, on top of method/trace.yaml, world/math.yaml and
# scale/node_8xh200.yaml.
#
#   for set in dapo_math_17k math500 aime24 aime25; do opd data $set; done      once
#   recipes/trace/qwen3_8b.sh                              train; run again, it goes on from the last checkpoint in OUT
#   recipes/trace/qwen3_8b.sh --dry-run                    the plan, without GPU, data or model
#   recipes/trace/qwen3_8b.sh opd.divergence.key.clip_mode=none      without the clip: README.md says why to try it
#
# MODEL     hub id or folder                               Qwen/Qwen3-8B
# DATA_DIR  where `opd data` wrote                         ${OPD_HOME:-~/.cache/opd_ext}/data
# TRAIN     training set in DATA_DIR                       dapo_math_17k/train
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
common=$here/common.sh
[[ -r $common ]] || common=$here/../common.sh
[[ -r $common ]] || common=$(opd new --recipes 2>/dev/null || true)/common.sh # a folder outside recipes/
[[ -r $common ]] ||
    { echo "${0##*/}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh." >&2; exit 2; }
. "$common"

gpu_run trace/qwen3_8b dapo_math_17k/train "math500/test aime24/test aime25/test" "$@"
if given ANNOTATOR; then inputs+=("opd.credit.annotator.kind=$(input ANNOTATOR self)"); fi
if [[ $(input ANNOTATOR self) != self ]]; then
    url=$(input ANNOTATOR_URL "")
    inputs+=(
        "opd.credit.annotator.model='$(input ANNOTATOR_MODEL "")'"
        "opd.credit.annotator.base_url=$([[ -n $url ]] && echo "'$url'" || echo null)" # null: the api's own
        "opd.credit.annotator.api_key_env=$(input ANNOTATOR_KEY_ENV OPD_ANNOTATOR_KEY)"
        opd.credit.annotator.max_concurrency=16 # per agent-loop worker, of which there are eight
        opd.credit.annotator.timeout_s=60
    )
fi
exec opd train recipe=trace/qwen3_8b "${inputs[@]}" "$@"
