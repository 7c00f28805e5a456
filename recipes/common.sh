# shellcheck shell=bash
# What the recipes of this folder share. A recipe sources it from its own folder, from .. or from the installed package.
# It does nothing by itself.
#
#   die SENTENCE              complain and end with status 2
#   find_opd COMMAND          put `opd` on PATH; COMMAND is what installs it
#   only_plans ARGUMENTS...   true if they ask for a plan, the configuration or help: no inputs are needed
#   build_world MODEL...      the miniature world, unless it has these models
#   build_smollm2 NAME REQUEST   SmolLM2-135M-Instruct and, in the folder NAME, arithmetic that asks REQUEST besides,
#                             unless they are there
#   build_puzzles             puzzles and arithmetic of reasoning-gym, 3,200 and 500, unless they are there
#   input NAME DEFAULT        the environment variable NAME, or OPD_NAME (which Ray jobs pass on), or DEFAULT
#   check_inputs SET...       refuse a MODEL, TEACHER or data set that is not there, and more GPUS than there are
#   name_run ORIGINAL ARGUMENTS...
#                             a copy of recipes/ORIGINAL.sh gets a run folder and an experiment name of its own
#   gpu_run ORIGINAL TRAIN EVAL ARGUMENTS...
#                             find opd, check the inputs of a GPU recipe, whose data sets by default are TRAIN and EVAL
#                             in the folder data of OPD_HOME, or in the one that `data_folder` names
#
# The last two add to `inputs` what `opd train` is to be told; the script's own folder is `here`, and TEACHER is an
# input if `teacher_is_input` is set. A recipe for other than eight GPUs sets `gpus`, one whose data are not in the
# folder `data` sets `data_folder`. What nobody asked for is not among them: it stands in opd_ext/config/recipe.

inputs=()

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

build_smollm2() {
    local home=${OPD_HOME:-$HOME/.cache/opd_ext}
    [[ -f $home/models/smollm2/config.json ]] || opd data model smollm2
    [[ -f $home/$1/val.parquet ]] || opd data gym --out "$home/$1" --request "$2" --train 240 --val 120 \
        chain_sum min_terms=2 max_terms=2 min_digits=1 max_digits=1 \
        products min_terms=2 max_terms=2 min_digits=1 max_digits=1 \
        gcd min_numbers=2 max_numbers=2 min_value=2 max_value=20 \
        simple_equations min_terms=2 max_terms=2 max_value=9
}

build_puzzles() {
    local world=${OPD_HOME:-$HOME/.cache/opd_ext}/gym_puzzles
    [[ -f $world/val.parquet ]] || opd data gym --out "$world" --train 3200 --val 500 \
        chain_sum min_terms=4 max_terms=6 min_digits=3 max_digits=4 \
        products min_terms=2 max_terms=2 min_digits=3 max_digits=3 \
        countdown min_numbers=4 max_numbers=4 \
        prime_factorization min_value=100 max_value=5000 \
        calendar_arithmetic \
        knights_knaves
}

input() {
    local prefixed=OPD_$1
    printf '%s' "${!1:-${!prefixed:-$2}}"
}

check_inputs() { # the data sets
    local name
    for name in MODEL ${TEACHER:+TEACHER}; do check_model "$name"; done
    check_data "$@"
    check_gpus
}

check_model() {
    [[ -f ${!1}/config.json || ${!1} =~ ^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$ ]] ||
        die "$1=${!1} is neither a folder with a config.json nor a hub id like Qwen/Qwen3-8B."
}

check_data() {
    local name how
    for name in "$@"; do
        case $name in
            */*) how="with opd data ${name%%[-/]*}" ;;
            dapo_* | math500* | aime24* | aime25*) how="with opd data math" ;;
            *) how="as the recipe's README.md says" ;;
        esac
        [[ -f $DATA_DIR/$name.parquet ]] ||
            die "$DATA_DIR/$name.parquet is missing; make it $how, or set DATA_DIR, TRAIN or EVAL."
    done
}

check_gpus() {
    local visible
    if [[ -n ${RAY_ADDRESS:-} ]]; then return; fi # on a cluster it is Ray that finds the GPUs
    visible=$("$(dirname "$(realpath "$(command -v opd)")")/python" -c 'import torch; print(torch.cuda.device_count())')
    ((visible >= GPUS)) || die "PyTorch sees $visible GPUs, $GPUS are wanted; set GPUS or CUDA_VISIBLE_DEVICES."
}

name_run() {
    local original=$1 script=${0##*/} argument name
    script=${script%.sh}
    [[ ${here##*/}/$script != "$original" ]] || return 0 # its names stand in its YAML
    if [[ $script == tiny_cpu ]]; then
        name=cpu_tiny
    elif [[ $script =~ ^(.*)_([0-9]+)_([0-9]+b.*)$ ]]; then # qwen3_0_6b: 0.6 billion
        name=${BASH_REMATCH[1]}-${BASH_REMATCH[2]}.${BASH_REMATCH[3]}
    else
        name=$script
    fi
    if [[ $script != tiny_cpu ]]; then name=${name//_/-}; fi
    for argument in "${@:2}"; do # another method in the same folder would go on from this one's checkpoints
        case $argument in recipe=* | method=* | scale=*) name+=-${argument#*=} ;; esac
    done
    name=${here##*/}-$name
    inputs+=("trainer.experiment_name=${name//[^A-Za-z0-9._-]/-}")
}

gpu_run() {
    local original=$1 usual=$3 train eval folder name sets files=""
    train=$(input TRAIN "$2") eval=$(input EVAL "$3")
    shift 3
    find_opd "bash setup.sh --gpu"
    name_run "$original" "$@"
    take_model MODEL actor_rollout_ref.model.path "$@"
    if [[ -n ${teacher_is_input:-} ]]; then take_model TEACHER opd.teacher.path "$@"; fi

    folder=$(realpath -m "$(input DATA_DIR "${OPD_HOME:-$HOME/.cache/opd_ext}/${data_folder:-data}")")
    read -ra sets <<<"$eval"
    for name in "${sets[@]}"; do files+="${files:+,}'$folder/$name.parquet'"; done
    if given DATA_DIR; then inputs+=("opd.world='$folder'"); fi
    if given TRAIN; then inputs+=("data.train_files='$folder/$train.parquet'"); fi
    if given EVAL; then
        inputs+=("data.val_files=[$files]")
        for name in $usual; do # what the recipe says of a set that is left out
            name=${name%%/*} # opd data writes NAME/SPLIT.parquet, and NAME-WORDING/ for another wording
            [[ " $eval " == *" $name"[-/\ ]* ]] || inputs+=("opd.validation.sets.$name=null")
        done
    fi
    if given GPUS; then inputs+=("trainer.n_gpus_per_node=$(input GPUS "")"); fi
    if given OUT; then inputs+=("opd.run_dir='$(realpath -m "$(input OUT "")")'"); fi

    DATA_DIR=$folder GPUS=$(input GPUS "${gpus:-8}") # what the checks read
    if only_plans "$@"; then return; fi
    [[ " $*" == *" recipe="* ]] || check_data "$train" "${sets[@]}" # another's data: `opd train` looks itself
    check_gpus
}

given() { [[ -n $(input "$1" "") ]]; }

take_model() { # NAME KEY ARGUMENTS...
    local model
    given "$1" || return 0
    model=$(input "$1" "")
    if [[ -d $model ]]; then model=$(realpath "$model"); fi
    printf -v "$1" '%s' "$model"
    only_plans "${@:3}" || check_model "$1"
    inputs+=("$2='$model'")
}

# Of the pipelines, `opd ssd` and `opd t3s`, which have no trainer and name each of their models and data sets:
#
#   name_pipeline ORIGINAL ARGUMENTS...
#                             name_run for them: a copy gets a run folder of its own
#   pipeline_inputs NAME=KEY... NAME=KEY=SET... -- ARGUMENTS...
#                             inputs of a GPU recipe: models with the keys that they set, and data sets with those and
#                             with the SET that is the default, in the folder data of OPD_HOME; besides, DATA_DIR, OUT and GPUS

name_pipeline() {
    local named
    named=$(inputs=() && name_run "$@" && printf '%s' "${inputs[*]-}")
    if [[ -n $named ]]; then inputs+=("run_dir='${OPD_RUNS:-runs}/${named#*=}'"); fi
}

pipeline_inputs() {
    local folder name key set sets=()
    folder=$(realpath -m "$(input DATA_DIR "${OPD_HOME:-$HOME/.cache/opd_ext}/data")")
    while [[ $1 != -- ]]; do
        IFS='=' read -r name key set <<<"$1"
        shift
        if [[ -z $set ]]; then
            take_model "$name" "$key" "$@"
            continue
        fi
        set=$(input "$name" "$set")
        sets+=("$set")
        if given DATA_DIR || given "$name"; then inputs+=("$key='$folder/$set.parquet'"); fi
    done
    shift
    if given OUT; then inputs+=("run_dir='$(realpath -m "$(input OUT "")")'"); fi
    if given GPUS; then inputs+=("vllm.replicas=$(input GPUS "")" "train.ranks=$(input GPUS "")"); fi

    DATA_DIR=$folder GPUS=$(input GPUS 8) # what the checks read
    if only_plans "$@"; then return; fi
    [[ " $*" == *" recipe="* ]] || check_data "${sets[@]}" # another's data: `opd` looks itself
    check_gpus
}
