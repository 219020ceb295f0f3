# Jobs of one task: text to indexed data, export and evaluation. Sourced by launch.sh, never run.
# shellcheck shell=bash disable=SC2034,SC2154

run_one() { # COMMAND...: stops at the warning and is requeued; the commands continue where they stopped
    trap 'on_signal USR1' USR1
    local launch=()
    ! in_slurm || launch=(srun --nodes=1 --ntasks=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" --mpi=none "${container[@]}")
    cd "$checkout" || exit
    keep_failures
    PYTHONPATH=$code "${launch[@]}" "$ITT_PYTHON" "$@" 2>&"$errors" &
    children=($!)
    wait_for_children
    find_cause "$status"
    if [ -n "$warned" ] && in_slurm && queue_again; then exit 0; fi
    [ "$status" = 0 ] || say "$1 failed ($cause)"
    return "$status"
}

preprocess() { # JOB_FILE ARGUMENT...; in an array job each task makes a part, and the last to finish merges
    local argument parts='' given=() workers=() part=()
    for argument in "${@:2}"; do
        case $argument in
            --parts=*) parts=${argument#*=} ;;
            *) given+=("$argument") ;;
        esac
    done
    ! asks_for_help "${given[@]}" ||
        explain "$1 [--parts=N] [options of tools/preprocess.py]" preprocess "--input text/arxiv --tokenizer data/tokenizer --output-prefix data/redpajama/arxiv"
    load_cluster
    find_part "$1"
    moved "${given[@]}"
    given=("${placed[@]}")
    [[ " ${given[*]} " == *" --workers"* ]] || [ -z "${SLURM_CPUS_PER_TASK:-}" ] || workers=(--workers "$SLURM_CPUS_PER_TASK")
    run_one tools/preprocess.py "${given[@]}" "${workers[@]}" "${part[@]}"
}

asks_for_help() { [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; } # ARGUMENT...

explain() { # USAGE TOOL EXAMPLE
    cat <<TEXT
usage: sbatch $1     a Slurm job
       bash   $1     this machine
python tools/$2.py --help lists the options; data/... and runs/... are where cluster.env says.
example: sbatch slurm/$2.sbatch $3
TEXT
    exit 0
}

find_part() { # JOB_FILE: sets part from the index of this task in its array
    [[ ${parts:-1} =~ ^[1-9][0-9]*$ ]] || fail "--parts is $parts; give the number of parts, 1 or more"
    if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
        [ -z "$parts" ] || fail "--parts is for array jobs: sbatch --array=0-$((parts - 1)) $1 --parts=$parts ..."
        return
    fi
    # shellcheck disable=SC2153
    [ -n "$parts" ] || ((SLURM_ARRAY_TASK_MIN == 0 && SLURM_ARRAY_TASK_COUNT == SLURM_ARRAY_TASK_MAX + 1)) ||
        fail "the array does not run from 0 to N - 1 without gaps; use --array=0-15, or, to run some of 16 parts again," \
            "--array=3,7 and --parts=16 after the file"
    parts=${parts:-$SLURM_ARRAY_TASK_COUNT}
    part=(--part "$SLURM_ARRAY_TASK_ID/$parts")
}

evaluate() { # JOB_FILE RUN_FOLDER ARGUMENT...; --checkpoints=all, or names, in place of the newest
    ! asks_for_help "${@:2}" ||
        explain "$1 RUN_FOLDER [--checkpoints=newest|all|NAME,...] [options of tools/evaluate.py]" evaluate "runs/466m_itt_x4 --tasks paper"
    [[ ${2:--} != -* ]] || fail "name the run folder to evaluate: sbatch $1 runs/466m_itt_x4 [options of tools/evaluate.py]"
    local argument name which=newest names=() given=() tasks=()
    run_dir=$2
    for argument in "${@:3}"; do
        case $argument in
            --checkpoints=*) which=${argument#*=} ;;
            *) given+=("$argument") ;;
        esac
    done
    load_cluster
    moved "$run_dir" "${given[@]}"
    run_dir=${placed[0]} given=("${placed[@]:1}")
    [[ $run_dir == /* ]] || run_dir=$checkout/$run_dir
    find_checkpoints "$which"
    [[ " ${given[*]} " == *" --tasks"* || " ${given[*]} " == *" --heldout"* || " ${given[*]} " == *" --task-dir"* ]] ||
        tasks=(--tasks paper)
    for name in "${names[@]}"; do
        if [ ! -f "$run_dir/export/$name/config.json" ]; then
            run_one tools/export_hf.py --checkpoint "$run_dir/checkpoints/$name" --output "$run_dir/export/$name" \
                --dtype bfloat16 || exit
        fi
        # A requeued job keeps what it has measured; a single checkpoint is measured again.
        [ "${#names[@]}" = 1 ] || [ ! -f "$run_dir/evaluation/$name/results.json" ] || continue
        run_one tools/evaluate.py --model "$run_dir/export/$name" --output "$run_dir/evaluation/$name" --overwrite \
            "${tasks[@]}" "${given[@]}" || exit
    done
}

find_checkpoints() { # newest | all | NAME,...: sets names
    local name
    case $1 in
        newest)
            names=("$(newest_checkpoint)")
            if [ ! -f "$run_dir/checkpoints/${names[0]}/run_state.json" ]; then
                mapfile -t names < <(complete_checkpoints | tail -1)
                [ ${#names[@]} = 0 ] || say "latest names $(newest_checkpoint), which is no checkpoint; taking ${names[0]}"
            fi ;;
        all) mapfile -t names < <(complete_checkpoints) ;;
        *) IFS=, read -ra names <<<"$1" ;;
    esac
    [ "${names[0]:-none}" != none ] || fail "$run_dir has no checkpoint; name a run folder that holds checkpoints/latest"
    for name in "${names[@]}"; do
        [ -f "$run_dir/checkpoints/$name/run_state.json" ] ||
            fail "$run_dir/checkpoints/$name is no checkpoint; --checkpoints takes newest, all, or names like step_0001000"
    done
}

complete_checkpoints() { # by step
    local file
    for file in "$run_dir"/checkpoints/step_*/run_state.json; do
        [ ! -f "$file" ] || basename "$(dirname "$file")"
    done | sort -V
}
