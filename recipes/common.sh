# shellcheck shell=bash
# What the recipes of this folder share. A recipe sources it as ../common.sh; it does nothing by itself.
#
#   die SENTENCE              complain and end with status 2
#   find_opd COMMAND          put `opd` on PATH; COMMAND is what installs it
#   only_plans ARGUMENTS...   true if they ask for a plan, the configuration or help: no inputs are needed
#   build_world MODEL...      the miniature world, unless it has these models
#   input NAME DEFAULT        the environment variable NAME, or OPD_NAME (which Ray jobs pass on), or DEFAULT
#   gpu_run ARGUMENTS...      find opd, complete and check the inputs of a GPU recipe, and put them into `inputs`
#
# gpu_run reads MODEL, TRAIN, EVAL and OUT, and TEACHER where a recipe has one; DATA_DIR and GPUS it finds itself.

die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 2; }

find_opd() {
    command -v opd >/dev/null || PATH=${OPD_VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}/bin:$PATH
    command -v opd >/dev/null || die "opd is not installed; run $1."
}

only_plans() { case " $* " in *" --dry-run "* | *" --cfg "* | *" --help "* | *" -h "*) ;; *) return 1 ;; esac; }

build_world() {
    local model world=${OPD_HOME:-$HOME/.cache/opd_ext}/tinymath
    for model in "$@"; do
        [[ -f $world/$model/config.json ]] || { opd data tinymath --models "$(IFS=, && echo "$*")"; return; }
    done
}

input() {
    local prefixed=OPD_$1
    printf '%s' "${!1:-${!prefixed:-$2}}"
}

gpu_run() {
    DATA_DIR=$(realpath -m "$(input DATA_DIR "${OPD_HOME:-$HOME/.cache/opd_ext}/math")") OUT=$(realpath -m "$OUT")
    GPUS=$(input GPUS 8)
    find_opd "bash setup.sh --gpu"
    if [[ -d $MODEL ]]; then MODEL=$(realpath "$MODEL"); fi
    if [[ -d ${TEACHER:-} ]]; then TEACHER=$(realpath "$TEACHER"); fi
    local eval_sets name val_files=""
    read -ra eval_sets <<<"$EVAL"
    only_plans "$@" || check_inputs "$TRAIN" "${eval_sets[@]}"
    for name in "${eval_sets[@]}"; do val_files+="${val_files:+,}'$DATA_DIR/$name.parquet'"; done
    inputs=(
        "data.train_files='$DATA_DIR/$TRAIN.parquet'"
        "data.val_files=[$val_files]"
        "actor_rollout_ref.model.path='$MODEL'"
        "trainer.n_gpus_per_node=$GPUS"
        "opd.run_dir='$OUT'"
    )
}

check_inputs() { # the data sets
    local name how visible
    for name in MODEL ${TEACHER:+TEACHER}; do
        [[ -f ${!name}/config.json || ${!name} =~ ^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$ ]] ||
            die "$name=${!name} is neither a folder with a config.json nor a hub id like Qwen/Qwen3-8B."
    done
    for name in "$@"; do
        case $name in
            dapo_* | math500* | aime24* | aime25*) how="with opd data math" ;;
            *) how="as the recipe's README.md says" ;;
        esac
        [[ -f $DATA_DIR/$name.parquet ]] ||
            die "$DATA_DIR/$name.parquet is missing; make it $how, or set DATA_DIR, TRAIN or EVAL."
    done
    if [[ -z ${RAY_ADDRESS:-} ]]; then # on a cluster it is Ray that finds the GPUs
        visible=$("$(dirname "$(realpath "$(command -v opd)")")/python" -c \
            'import torch; print(torch.cuda.device_count())')
        ((visible >= GPUS)) || die "PyTorch sees $visible GPUs, $GPUS are wanted; set GPUS or CUDA_VISIBLE_DEVICES."
    fi
}
