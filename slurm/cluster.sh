# The settings of slurm/cluster.env, each checked before anything starts. Sourced by launch.sh, never run.
# shellcheck shell=bash disable=SC2154

container=() planner='' placed=()
KNOWN_SETTINGS="ITT_PYTHON ITT_MODULES ITT_CONTAINER_IMAGE ITT_CONTAINER_MOUNTS ITT_SRUN_OPTIONS ITT_DATA_ROOT
ITT_RUN_ROOT ITT_MASTER_SUFFIX ITT_PREFLIGHT ITT_MAX_RESTARTS ITT_STRAGGLER_S
ITT_GPU ITT_ASSUMED_MFU ITT_LOCAL_PROCESSES"

load_cluster() {
    local file=${ITT_CLUSTER_ENV:-$checkout/slurm/cluster.env} name
    if [ -f "$file" ]; then
        while read -r name; do
            [[ " ${KNOWN_SETTINGS//$'\n'/ } " == *" $name "* ]] ||
                fail "$file sets $name, which is no setting of this launcher; compare it with slurm/cluster.env.example"
        done < <(sed -nE 's/^[[:space:]]*(export[[:space:]]+)?(ITT_[A-Za-z0-9_]*)=.*/\2/p' "$file")
        set +u
        # shellcheck source=/dev/null
        source "$file" || fail "$file cannot be read"
        set -u
    elif in_slurm || [ "$mode" = submit ]; then
        fail "$file is missing; copy slurm/cluster.env.example to it and fill in what this cluster needs"
    fi
    find_python "$file"
    local setting folder
    for setting in ITT_DATA_ROOT ITT_RUN_ROOT; do # absolute: a job may start in any folder
        [ -n "${!setting:-}" ] || continue
        folder=$(cd "$checkout" && cd "${!setting}" 2>/dev/null && pwd) ||
            fail "$setting is ${!setting}, which is not a folder here; correct it in $file"
        printf -v "$setting" %s "$folder"
    done
    [ -z "${ITT_DATA_ROOT:-}" ] || plan_options+=("--data-root=$ITT_DATA_ROOT")
    [ -z "${ITT_RUN_ROOT:-}" ] || plan_options+=("--run-root=$ITT_RUN_ROOT")
    [[ ${ITT_MAX_RESTARTS:=3} =~ ^[0-9]+$ ]] || fail "ITT_MAX_RESTARTS is $ITT_MAX_RESTARTS; give a number"
    [[ ${ITT_STRAGGLER_S:=60} =~ ^[1-9][0-9]*$ ]] || fail "ITT_STRAGGLER_S is $ITT_STRAGGLER_S; give seconds, 1 or more"
    use_modules "$file"
    use_container "$file"
    export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
}

moved() { # ARGUMENT...: sets placed, with data/... and runs/... in the folders of this cluster, also after `=`
    local argument before path root
    placed=()
    for argument in "$@"; do
        before='' path=$argument
        while [[ $path == *=* && ! $path =~ ^(\./)?(data|runs)/ ]]; do
            before+=${path%%=*}= path=${path#*=}
        done
        root=''
        [[ ! $path =~ ^(\./)?data/ ]] || root=${ITT_DATA_ROOT:-}
        [[ ! $path =~ ^(\./)?runs/ ]] || root=${ITT_RUN_ROOT:-}
        path=${path#./}
        if [ -z "$root" ]; then placed+=("$argument"); else placed+=("$before$root${path:4}"); fi
    done
}

find_python() { # CLUSTER_FILE
    if [ -z "${ITT_PYTHON:-}" ]; then
        ! in_slurm || [ -n "${ITT_CONTAINER_IMAGE:-}" ] || [ -x "$checkout/.venv/bin/python" ] ||
            fail "ITT_PYTHON is not set and there is no .venv; name the environment's python in $1, or run make install"
        ITT_PYTHON=python3
        [ ! -x "$checkout/.venv/bin/python" ] || [ -n "${ITT_CONTAINER_IMAGE:-}" ] || ITT_PYTHON=$checkout/.venv/bin/python
    fi
    [ -n "${ITT_CONTAINER_IMAGE:-}" ] || command -v "$ITT_PYTHON" >/dev/null ||
        fail "ITT_PYTHON is $ITT_PYTHON, which does not run here; correct it in $1"
    planner=$ITT_PYTHON
    if [ -n "${ITT_CONTAINER_IMAGE:-}" ] && ! in_slurm; then # outside jobs no container is available
        planner=python3
        [ ! -x "$checkout/.venv/bin/python" ] || planner=$checkout/.venv/bin/python
        "$planner" -c 'import filelock, pydantic, tyro, yaml' 2>/dev/null || fail "$planner of this host cannot read recipes:" \
            "pip install filelock pydantic pyyaml tyro, or run make install; or call sbatch itself, which needs none"
    fi
}

use_modules() { # CLUSTER_FILE
    [ -n "${ITT_MODULES:-}" ] || return 0
    type module >/dev/null 2>&1 || fail "ITT_MODULES is $ITT_MODULES, but this host has no module command; see $1"
    local name
    for name in $ITT_MODULES; do
        module load "$name" || fail "module load $name failed; correct ITT_MODULES in $1"
    done
}

use_container() { # CLUSTER_FILE; sets how a task enters the container, which sees the same paths as the host
    in_slurm && [ -n "${ITT_CONTAINER_IMAGE:-}" ] || return 0
    [[ $ITT_CONTAINER_IMAGE != /* ]] || [ -f "$ITT_CONTAINER_IMAGE" ] ||
        fail "ITT_CONTAINER_IMAGE is $ITT_CONTAINER_IMAGE, which does not exist; correct it in $1"
    local mounts=$checkout:$checkout root runtime
    for root in "${ITT_DATA_ROOT:-}" "${ITT_RUN_ROOT:-}"; do [ -z "$root" ] || mounts+=,$root:$root; done
    mounts+=${ITT_CONTAINER_MOUNTS:+,$ITT_CONTAINER_MOUNTS}
    if [[ $ITT_CONTAINER_IMAGE == *.sif ]]; then
        runtime=$(command -v apptainer || command -v singularity) ||
            fail "ITT_CONTAINER_IMAGE is $ITT_CONTAINER_IMAGE, but this node has neither apptainer nor singularity; see $1"
        container=("$runtime" exec --nv --pwd "$checkout" --bind "$mounts" "$ITT_CONTAINER_IMAGE")
    else
        srun --help 2>/dev/null | grep -q -- --container-image ||
            fail "ITT_CONTAINER_IMAGE is $ITT_CONTAINER_IMAGE, but this srun has no --container-image (pyxis); see $1"
        container=("--container-image=$ITT_CONTAINER_IMAGE" "--container-workdir=$checkout" "--container-mounts=$mounts")
    fi
}

run_python() { # one process with the python of the tasks; only the command writes to standard output
    if [ ${#container[@]} -gt 0 ]; then
        PYTHONPATH=$code srun --nodes=1 --ntasks=1 --mpi=none "${container[@]}" "$ITT_PYTHON" "$@"
    else
        (cd "$checkout" && PYTHONPATH=$code "$planner" "$@")
    fi
}
