#!/usr/bin/env bash
# Launcher of every .sbatch file of this folder. `bash slurm/itt_466m_x4.sbatch --help` lists its options, and
# slurm/README.md explains a job. Inside a Slurm job it starts one task per GPU; elsewhere it uses this machine.
#
#   launch.sh JOB_FILE train RECIPE [options] [section.key=value ...]
#   launch.sh JOB_FILE train @FILE [options]     a line of FILE (RECIPE section.key=value ...) for each task of an array
#   launch.sh JOB_FILE evaluate RUN_FOLDER [options of tools/evaluate.py]
#   launch.sh JOB_FILE preprocess [--parts=N] [options of tools/preprocess.py]
#
# Exit code 0: finished, or stopped with a checkpoint and (under Slurm) requeued; 1: failed; 2: bad input.
set -uo pipefail

code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # the checkout, or a run's snapshot of it
checkout=${ITT_CHECKOUT:-$code}
mode=run num_links=1 asked_nodes='' asked_gpus='' recipe='' list=''
overrides=() allowed=() plan_options=()
export SLURM_EXPORT_ENV=ALL # `sbatch --export=NONE`, some sites' default, would keep this environment from every srun

say() { echo "[launch $(date +%F_%T)] $*"; }
fail() { echo "error: $*" >&2; exit 2; }
in_slurm() { [ -n "${SLURM_JOB_ID:-}" ] && [ "$mode" = run ]; }

# shellcheck source=slurm/cluster.sh
source "$code/slurm/cluster.sh" # the settings of cluster.env
# shellcheck source=slurm/job_shape.sh
source "$code/slurm/job_shape.sh" # nodes, tasks, the host of rank 0
# shellcheck source=slurm/run_folder.sh
source "$code/slurm/run_folder.sh" # claim, restarts, snapshot
# shellcheck source=slurm/processes.sh
source "$code/slurm/processes.sh" # the tasks: start, signal, wait
# shellcheck source=slurm/other_jobs.sh
source "$code/slurm/other_jobs.sh" # preprocess and evaluate

usage() {
    cat <<TEXT
usage: sbatch $1 [options] [section.key=value ...]     a Slurm job
       bash   $1 [options] [section.key=value ...]     this machine: its GPUs if any, else its CPU
options:
  --dry-run             print the job, what it costs and what would refuse it; start nothing
  --submit              read cluster.env (partition, account, ...), check recipe, run folder and data, then sbatch
  --chain=N             submit N jobs, one after the other, for clusters that do not requeue
  --nodes=N             nodes, for --dry-run, --submit and --chain (default: what the recipe or the file asks for)
  --gpus-per-node=N     GPUs of a node, and tasks, for the same (default: what the file asks for)
  --relayout            let parallel.*, batch.micro and thinking.recompute differ: the same run on other nodes
  --allow-changed=KEY   let a setting differ from what the run was started with; repeat for several
example: bash slurm/itt_466m_x4.sbatch --dry-run --nodes=4 batch.micro=2
TEXT
}

parse_arguments() { # JOB_FILE ARGUMENT...
    local key job_file=$1; shift
    while [ $# -gt 0 ]; do
        case $1 in
            --dry-run) mode=dry_run ;;
            --submit) mode=submit ;;
            --chain=*) mode=submit num_links=${1#*=} ;;
            --nodes=*) asked_nodes=${1#*=} ;;
            --gpus-per-node=*) asked_gpus=${1#*=} ;;
            --allow-changed=*) allowed+=("$1") ;;
            --relayout) for key in parallel batch.micro thinking.recompute; do allowed+=("--allow-changed=$key"); done ;;
            -h | --help) usage "$job_file"; exit 0 ;;
            -*) fail "unknown option $1; bash $job_file --help lists them" ;;
            *.*=*) overrides+=("$1") ;;
            *) fail "argument $1 must look like section.key=value, for example schedule.steps=100" ;;
        esac
        shift
    done
    [[ $num_links =~ ^[1-9][0-9]*$ ]] || fail "--chain is $num_links; give a number of jobs, 1 or more"
    [ "$mode" != run ] || [ -z "$asked_nodes$asked_gpus" ] ||
        fail "--nodes and --gpus-per-node are for --dry-run, --submit and --chain; a job's own are options of sbatch"
    [[ ${asked_nodes:-1} =~ ^[1-9][0-9]*$ ]] || fail "--nodes is $asked_nodes; give a number of nodes, 1 or more"
    [[ ${asked_gpus:-1} =~ ^[1-9][0-9]*$ ]] || fail "--gpus-per-node is $asked_gpus; give a number of GPUs, 1 or more"
}

plan() { # ACTION OPTION...
    run_python "$code/tools/launch.py" "$1" "$recipe" "${overrides[@]}" --nodes "$nodes" \
        --tasks-per-node "$tasks_per_node" "${plan_options[@]}" "${allowed[@]}" "${@:2}"
}

# --- life cycle -------------------------------------------------------------------------------------------------------

next_action() { # -> done | stop | cancelled | stuck | again, by the files of the run: the exit code of srun is 0 after a node died
    if [ -f "$run_dir/finished" ]; then echo 'done'
    elif [ -f "$run_dir/diverged" ] || [ -f "$run_dir/refused" ]; then echo stop
    elif [ -n "$cancelled" ] && ! is_out_of_time; then echo cancelled
    elif [ "$(newest_checkpoint)" = "$first_checkpoint" ] && [ "$num_stuck" -ge "$ITT_MAX_RESTARTS" ]; then echo stuck
    else echo again
    fi
}

finish_job() { # STATUS
    local progress outcome
    if is_overtaken; then
        say "$run_dir has been taken over by $(owner_of_run_folder); this start leaves it alone"
        exit 1
    fi
    progress="$(newest_checkpoint), was $first_checkpoint"
    case $(next_action) in
        'done')
            say "finished: $run_dir"
            rm -f "$(job_note)" "$run_dir/restarts"
            exit 0 ;;
        stop)
            [ ! -f "$run_dir/refused" ] || undo_change
            stop 2 "$(cat "$run_dir/diverged" "$run_dir/refused" 2>/dev/null | head -1)" ;;
        cancelled) say "cancelled; newest checkpoint $progress; the same command continues"; exit 0 ;;
        stuck)
            find_cause "$1"
            stop 1 "$((num_stuck + 1)) attempts in a row made no progress beyond $first_checkpoint ($cause)" ;;
    esac
    find_cause "$1"
    outcome="not finished ($cause); newest checkpoint $progress"
    release_run_folder
    if ! in_slurm; then
        say "$outcome; the same command continues"
    elif queue_again; then
        say "$outcome; queued again"
        exit 0
    else
        say "$outcome; this job cannot be queued again; the next of its chain, or the same command, continues"
    fi
    [ -z "$warned" ] || exit 0
    exit "$(($1 == 0 ? 1 : $1))"
}

queue_again() { # fails if the cluster does not requeue, or if a later start of this job exists
    trap '' TERM # a requeued job receives it
    [[ $(show_this_job) =~ Restarts=([0-9]+) ]] && [ "${BASH_REMATCH[1]}" = "${SLURM_RESTART_COUNT:-0}" ] &&
        timeout 60 scontrol requeue "$(this_job)"
}

take_line() { # JOB_FILE FILE ARGUMENT...: sets list, and taken, the arguments of this task of an array
    local line words=()
    list=$2
    [[ $list == /* || -f $list ]] || list=$checkout/$list
    line=$(sed -n "${SLURM_ARRAY_TASK_ID:-1}p" "$list" 2>/dev/null)
    [ -n "$line" ] || fail "$list has no line ${SLURM_ARRAY_TASK_ID:-1}; itt sweep writes it, with a line for each task of the array"
    mapfile -t words < <(xargs -n1 printf '%s\n' <<<"$line") # quotes as in a shell
    taken=("$1" "${words[@]}" "${@:3}")
}

train() { # JOB_FILE RECIPE ARGUMENT...
    local job_file=$1 status
    case ${2:-} in
        -h | --help) usage "$job_file"; exit 0 ;;
        '' | -* | *=*) fail "name the recipe first: sbatch $job_file recipes/466m/itt_x4.yaml [options]" ;;
    esac
    if [[ $2 == @* ]]; then take_line "$1" "${2#@}" "${@:3}"; set -- "${taken[@]}"; fi
    recipe=$2
    shift 2
    [ -f "$checkout/$recipe" ] || [ ! -f "$recipe" ] || recipe=$(realpath "$recipe")
    parse_arguments "$job_file" "$@"
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    trap 'on_signal INT' INT
    load_cluster
    continue_from_snapshot "$job_file" train "$recipe" "$@"
    find_shape "$job_file"
    if [ "$mode" != run ]; then
        find_ended_owner
        "$mode" "$job_file"
        exit
    fi
    find_run_folder
    claim_run_folder
    trap 'release_run_folder; rm -f "$failures"' EXIT
    use_run_folder
    [ ! -f "$run_dir/finished" ] || { say "$run_dir is finished already"; exit 0; }
    count_restart
    find_host_of_rank_0
    check_nodes || finish_job 1
    [ -z "$warned$cancelled" ] || finish_job 0
    say "$recipe: $nodes node(s) x $tasks_per_node, rank 0 at $MASTER_ADDR:$MASTER_PORT, from $first_checkpoint"
    local command=("$ITT_PYTHON" "$snapshot/slurm/task.py" "$snapshot/recipe.yaml" "${allowed[@]}")
    if in_slurm; then start_on_cluster "${command[@]}"; else start_here "${command[@]}"; fi
    wait_for_children
    finish_job "$status"
}

dry_run() { # JOB_FILE
    local limit
    plan show "--gpu=${ITT_GPU:-a100-80gb}" "--mfu=${ITT_ASSUMED_MFU:-0.35}" || return
    limit=${SBATCH_TIMELIMIT:-$(asked_for "$1" time)} # sbatch prefers the variable as well
    echo "job          ${1##*/}, time limit ${limit:-of the partition}, partition ${SBATCH_PARTITION:-default}," \
        "account ${SBATCH_ACCOUNT:-default}"
    echo "software     ${ITT_CONTAINER_IMAGE:-no container}, $ITT_PYTHON"
}

submit() { # JOB_FILE
    local options=() given=() link folder job_file
    job_file=$(realpath "$1")
    dry_run "$1" || return
    plan check || return
    folder=$(plan run-dir) || return
    [ -n "$list" ] || [[ $folder != *$'\nfinished' ]] || { say "not submitted: ${folder%%$'\n'*} is finished already"; return; }
    ! grep -q ' train "\$@"$' "$1" || given=("$recipe") # a job file for any recipe
    [ -z "$list" ] || { given=("@$(realpath "$list")") overrides=(); options+=("--array=1-$(wc -l <"$list")"); }
    [ ${#given[@]} = 0 ] && [ "$num_links" = 1 ] || options+=("--job-name=${folder##*/}")
    [ "$nodes" = "$(asked_for "$1" nodes)" ] || options+=("--nodes=$nodes")
    [ -z "$asked_gpus" ] || options+=("--gpus-per-node=$asked_gpus" "--ntasks-per-node=$asked_gpus")
    [ "$num_links" = 1 ] || options+=(--dependency=singleton --no-requeue "--export=ALL,ITT_CHAIN=chain-$(date +%s)-$$")
    for ((link = 0; link < num_links; link++)); do
        (cd "$checkout" && sbatch "${options[@]}" "$job_file" "${given[@]}" "${allowed[@]}" "${overrides[@]}") || return
    done
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    name_array_log
    action=${2:-}
    case $action in
        train | evaluate | preprocess) "$action" "$1" "${@:3}" ;;
        *) fail "this is called by the .sbatch files beside it; try bash slurm/itt_466m_x4.sbatch --help" ;;
    esac
fi
