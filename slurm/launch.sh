#!/usr/bin/env bash
# The one launcher: every .sbatch file of this folder ends here. `bash slurm/itt_466m_x4.sbatch --help` says what it
# takes, slurm/README.md what it does. Inside a Slurm job it starts one task per GPU; elsewhere it uses this machine.
#
#   launch.sh JOB_FILE train RECIPE [options] [section.key=value ...]
#   launch.sh JOB_FILE evaluate RUN_FOLDER [options of tools/evaluate.py]
#   launch.sh JOB_FILE preprocess [options of tools/preprocess.py]
#
# Exit code 0: finished, or stopped with a checkpoint and (under Slurm) queued again; 1: failed; 2: bad input.
set -uo pipefail

STRAGGLER_S=60 # the other ranks' time to end by themselves after the first has ended

code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # the checkout, or a run's snapshot of it
checkout=${ITT_CHECKOUT:-$code}
# shellcheck source=slurm/cluster.sh
source "$code/slurm/cluster.sh"
mode=run num_links=1 asked_nodes='' nodes=1 tasks_per_node=1
overrides=() allowed=() plan_options=() container=() children=()
warned='' cancelled='' run_dir='' snapshot='' claimed=''

say() { echo "[launch $(date +%F_%T)] $*"; }
fail() { echo "error: $*" >&2; exit 2; }
in_slurm() { [ -n "${SLURM_JOB_ID:-}" ] && [ "$mode" = run ]; }
# Not the first job on its run folder: queued again, a later link of a chain, or a later task of an array.
is_continuation() { [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || [ -n "${ITT_CHAIN:-}${SLURM_ARRAY_TASK_ID:-}" ]; }

usage() {
    cat <<TEXT
usage: sbatch $1 [options] [section.key=value ...]     a Slurm job
       bash   $1 [options] [section.key=value ...]     this machine: its GPUs if any, else its CPU
options:
  --dry-run             print the job and what it costs; start nothing
  --submit              read cluster.env (partition, account, ...), check the recipe, then sbatch
  --chain=N             submit N jobs, one after the other, for clusters that do not requeue
  --nodes=N             nodes, for --dry-run, --submit and --chain (default: what the file asks for)
  --allow-changed=KEY   let a setting differ from what the run was started with; repeat for several
example: bash slurm/itt_466m_x4.sbatch --dry-run --nodes=4 batch.micro=2
TEXT
}

parse_arguments() { # JOB_FILE ARGUMENT...
    local job_file=$1; shift
    while [ $# -gt 0 ]; do
        case $1 in
            --dry-run) mode=dry_run ;;
            --submit) mode=submit ;;
            --chain=*) mode=submit num_links=${1#*=} ;;
            --nodes=*) asked_nodes=${1#*=} ;;
            --allow-changed=*) allowed+=("$1") ;;
            -h | --help) usage "$job_file"; exit 0 ;;
            -*) fail "unknown option $1; bash $job_file --help lists them" ;;
            *.*=*) overrides+=("$1") ;;
            *) fail "argument $1 must look like section.key=value, for example schedule.steps=100" ;;
        esac
        shift
    done
    [[ $num_links =~ ^[1-9][0-9]*$ ]] || fail "--chain is $num_links; give a number of jobs, 1 or more"
    [ "$mode" != run ] || [ -z "$asked_nodes" ] ||
        fail "--nodes is for --dry-run, --submit and --chain; a job's own nodes are an option of sbatch"
    [[ ${asked_nodes:-1} =~ ^[1-9][0-9]*$ ]] || fail "--nodes is $asked_nodes; give a number of nodes, 1 or more"
}

plan() { # ACTION
    run_python "$code/tools/launch_plan.py" "$1" "$recipe" "${overrides[@]}" --nodes "$nodes" \
        --tasks-per-node "$tasks_per_node" "${plan_options[@]}" "${allowed[@]}"
}

# --- the job's shape --------------------------------------------------------------------------------------------------

asked_for() { # JOB_FILE OPTION: what its #SBATCH line says
    sed -nE "s/^#SBATCH[[:space:]]+--$2=([^[:space:]]+).*/\1/p" "$1" | head -1
}

find_shape() { # JOB_FILE
    if in_slurm; then
        nodes=${SLURM_JOB_NUM_NODES:-1}
        local num_tasks=${SLURM_NTASKS:-$((nodes * ${SLURM_NTASKS_PER_NODE:-1}))}
        ((num_tasks % nodes == 0)) ||
            fail "the job has $num_tasks tasks on $nodes nodes; ask for --ntasks-per-node, the same on each node"
        tasks_per_node=$((num_tasks / nodes))
        local gpus=${SLURM_GPUS_ON_NODE:-0}
        [ "$gpus" = 0 ] || [ "$gpus" = "$tasks_per_node" ] ||
            fail "the job has $tasks_per_node tasks but $gpus GPUs per node; a task drives one GPU, so ask for as many"
        return
    fi
    nodes=${asked_nodes:-$(asked_for "$1" nodes)} nodes=${nodes:-1}
    tasks_per_node=$(asked_for "$1" ntasks-per-node) tasks_per_node=${tasks_per_node:-1}
    if [ "$mode" = run ]; then
        local gpus=${ITT_LOCAL_PROCESSES:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')}
        nodes=1 tasks_per_node=$gpus
        if [ "$gpus" = 0 ]; then
            tasks_per_node=1
            tasks_per_node=$(plan minimum) || exit
        fi
    fi
}

find_host_of_rank_0() { # MASTER_ADDR and MASTER_PORT from the job's real hosts; each must resolve
    local hosts host attempt
    if ! in_slurm; then
        export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + $$ % 10000))
        return
    fi
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    [ ${#hosts[@]} = "$nodes" ] || fail "scontrol lists ${#hosts[@]} hosts for a job of $nodes nodes"
    for host in "${hosts[@]}"; do
        host+=${ITT_MASTER_SUFFIX:-}
        for attempt in 1 2 3; do
            getent hosts "$host" >/dev/null && continue 2
            [ "$attempt" = 3 ] || sleep 2 # name servers have bad moments
        done
        fail "host $host of this job does not resolve on $(hostname); correct ITT_MASTER_SUFFIX in cluster.env or DNS"
    done
    export MASTER_ADDR=${hosts[0]}${ITT_MASTER_SUFFIX:-}
    export MASTER_PORT=$((10000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))
}

# --- the run folder ---------------------------------------------------------------------------------------------------

newest_checkpoint() { cat "$run_dir/checkpoints/latest" 2>/dev/null || echo none; }

claim_run_folder() { # one job at a time; a claim whose owner is gone is taken over
    local mine owner
    if in_slurm; then mine="job $SLURM_JOB_ID"; else mine="process $$ on $(hostname)"; fi
    if ! (set -o noclobber && echo "$mine" >"$run_dir/in_use") 2>/dev/null; then
        owner=$(cat "$run_dir/in_use" 2>/dev/null)
        [ "$owner" = "$mine" ] || ! is_alive "$owner" || fail "$run_dir is in use by $owner; wait for it or cancel it," \
            "or choose another logging.run_dir (if it is gone, remove $run_dir/in_use)"
        echo "$mine" >"$run_dir/in_use" || fail "logging.run_dir is $run_dir, which cannot be written"
        sleep 0.2 # two that take over at once: the last to write goes on
        [ "$(cat "$run_dir/in_use")" = "$mine" ] || fail "$run_dir has just been taken by $(cat "$run_dir/in_use")"
    fi
    claimed=yes
}

is_alive() { # OWNER
    local kind name host
    read -r kind name _ host <<<"$1"
    case $kind in
        job) [[ $(squeue -h -j "$name" -o %T 2>/dev/null) =~ RUNNING|COMPLETING|SUSPENDED|STOPPED ]] ;;
        process) [ "$host" != "$(hostname)" ] || kill -0 "$name" 2>/dev/null ;;
        *) false ;;
    esac
}

release_run_folder() { [ -z "$claimed" ] || rm -f "$run_dir/in_use"; }

count_restart() { # restarts in a row that began at the same checkpoint, the one being started included
    local before seen
    num_stuck=0 first_checkpoint=$(newest_checkpoint)
    if is_continuation; then
        [ ! -f "$run_dir/stopped" ] || { say "not continued: $(cat "$run_dir/stopped")"; exit 1; }
        read -r before seen 2>/dev/null <"$run_dir/restarts" && [ "$seen" = "$first_checkpoint" ] &&
            num_stuck=$((before + 1))
    else
        rm -f "$run_dir/stopped" # submitted by a person, who knows
    fi
    echo "$num_stuck $first_checkpoint" >"$run_dir/restarts" || fail "$run_dir cannot be written"
    [ "$num_stuck" -le "$ITT_MAX_RESTARTS" ] || stop 1 "$num_stuck restarts in a row ended at $first_checkpoint"
}

stop() { # STATUS REASON: later links of a chain and later tasks of an array stop as well
    echo "$2" >"$run_dir/stopped"
    say "stopped for good: $2; look into the log, then submit again"
    exit "$1"
}

job_note() { echo "${ITT_RUN_ROOT:-$checkout/runs}/.jobs/${SLURM_JOB_ID:-none}"; } # where a job finds its snapshot

use_run_folder() { # snapshot at the first start; after that what was kept
    if [ "$code" != "$checkout" ]; then
        snapshot=$code
    else
        snapshot=$(plan prepare) || exit
        [[ $snapshot == /* ]] || snapshot=$checkout/$snapshot
    fi
    run_dir=$(dirname "$snapshot")
    if in_slurm && mkdir -p "$(dirname "$(job_note)")"; then echo "$snapshot" >"$(job_note)"; fi
}

continue_from_snapshot() { # ARGUMENT...: a job that is queued again runs the launcher of its first start
    local kept
    in_slurm && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "$code" = "$checkout" ] || return 0
    kept=$(cat "$(job_note)" 2>/dev/null) && [ -f "$kept/slurm/launch.sh" ] || return 0
    say "continues with the code of its first start: $kept"
    ITT_CHECKOUT=$checkout exec bash "$kept/slurm/launch.sh" "$@"
}

# --- processes --------------------------------------------------------------------------------------------------------

# USR1 is the warning before a time limit; TERM and INT come from people, from preemption and from the limit itself.
# srun passes USR1 on to the tasks but would answer TERM by killing them; Slurm sends them its own TERM.
on_signal() {
    if [ "$1" = USR1 ]; then warned=yes; else cancelled=yes; fi
    say "received $1; all ranks save a checkpoint and stop"
    [ ${#children[@]} = 0 ] || kill -USR1 "${children[@]}" 2>/dev/null
}

start_on_cluster() { # COMMAND...
    local options=()
    read -ra options <<<"${ITT_SRUN_OPTIONS:-}"
    srun --nodes="$nodes" --ntasks="$((nodes * tasks_per_node))" --ntasks-per-node="$tasks_per_node" \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait="$STRAGGLER_S" --mpi=none \
        --chdir="$checkout" "${container[@]}" "${options[@]}" "$@" &
    children=($!)
}

start_here() { # COMMAND...
    local rank
    cd "$checkout" || exit
    for ((rank = 0; rank < tasks_per_node; rank++)); do
        RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$tasks_per_node "$@" &
        children+=($!)
    done
}

wait_for_children() { # sets status: the first that is not 0; a rank that ends gives the others STRAGGLER_S
    local child left code_of_child first_end=''
    status=0
    while [ ${#children[@]} -gt 0 ]; do
        left=()
        for child in "${children[@]}"; do
            if kill -0 "$child" 2>/dev/null; then left+=("$child"); continue; fi
            wait "$child"
            code_of_child=$?
            first_end=${first_end:-$SECONDS}
            [ "$status" != 0 ] || status=$code_of_child
        done
        children=("${left[@]}")
        [ -z "$first_end" ] || ((SECONDS - first_end < STRAGGLER_S)) || kill -KILL "${children[@]}" 2>/dev/null
        sleep 0.5 &
        wait $! # a trap interrupts this wait, not the sleep of a foreground process
    done
}

check_nodes() { # the doctor on every node
    [ "${ITT_PREFLIGHT:-yes}" = yes ] && in_slurm || return 0
    PYTHONPATH=$snapshot srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --mpi=none --label \
        "${container[@]}" "$ITT_PYTHON" "$snapshot/tools/doctor.py" >"$run_dir/preflight.txt" 2>&1 && return 0
    grep -E 'problem|rror' "$run_dir/preflight.txt" | head -20
    say "the preflight failed; see $run_dir/preflight.txt"
    return 1
}

# --- life cycle -------------------------------------------------------------------------------------------------------

next_action() { # STATUS -> done | stop | cancelled | stuck | again. Only the marker proves completion, no exit code.
    if [ -f "$run_dir/finished" ]; then echo 'done'
    elif [ "$1" = 2 ] || [ -f "$run_dir/diverged" ]; then echo stop
    elif [ -n "$cancelled" ]; then echo cancelled
    elif [ "$(newest_checkpoint)" = "$first_checkpoint" ] && [ "$num_stuck" -ge "$ITT_MAX_RESTARTS" ]; then echo stuck
    else echo again
    fi
}

finish_job() { # STATUS
    local progress
    progress="$(newest_checkpoint), was $first_checkpoint"
    case $(next_action "$1") in
        'done')
            say "finished: $run_dir"
            rm -f "$(job_note)" "$run_dir/restarts"
            exit 0 ;;
        stop) stop 2 "bad input, or loss or gradients are no longer finite (exit code $1)" ;;
        cancelled) say "cancelled; newest checkpoint $progress; the same command continues"; exit 0 ;;
        stuck) stop 1 "$((num_stuck + 1)) attempts in a row made no progress beyond $first_checkpoint (exit code $1)" ;;
    esac
    say "not finished (exit code $1); newest checkpoint $progress"
    release_run_folder
    trap '' TERM # what a job gets when it is queued again
    if ! in_slurm; then
        say "the same command continues"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "queued again"
        exit 0
    else
        say "this job cannot be queued again; the next of its chain, or the same command, continues"
    fi
    [ -z "$warned" ] || exit 0
    exit "$(($1 == 0 ? 1 : $1))"
}

train() { # JOB_FILE RECIPE ARGUMENT...
    local job_file=$1 status
    case ${2:-} in
        -h | --help) usage "$job_file"; exit 0 ;;
        '' | -* | *=*) fail "name the recipe first: sbatch $job_file recipes/466m/itt_x4.yaml [options]" ;;
    esac
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
    case $mode in
        dry_run) dry_run "$job_file"; exit ;;
        submit) submit "$job_file"; exit ;;
    esac
    use_run_folder
    [ ! -f "$run_dir/finished" ] || { say "$run_dir is finished already"; exit 0; }
    claim_run_folder
    trap release_run_folder EXIT
    count_restart
    find_host_of_rank_0
    check_nodes || finish_job 1
    [ -z "$warned$cancelled" ] || finish_job 0
    say "$recipe: $nodes node(s) x $tasks_per_node, rank 0 at $MASTER_ADDR:$MASTER_PORT, from $first_checkpoint"
    local command=("$ITT_PYTHON" "$snapshot/slurm/task.py" "$snapshot/recipe.yaml")
    if in_slurm; then start_on_cluster "${command[@]}"; else start_here "${command[@]}"; fi
    wait_for_children
    finish_job "$status"
}

dry_run() { # JOB_FILE
    local limit
    plan_options+=("--gpu=${ITT_GPU:-a100-80gb}" "--mfu=${ITT_ASSUMED_MFU:-0.35}")
    plan show || return
    limit=$(asked_for "$1" time)
    echo "job          ${1##*/}, time limit ${limit:-of the partition}, partition ${SBATCH_PARTITION:-default}," \
        "account ${SBATCH_ACCOUNT:-default}"
    echo "software     ${ITT_CONTAINER_IMAGE:-no container}, $ITT_PYTHON"
}

submit() { # JOB_FILE
    local options=() given=() link folder
    ! grep -q ' train "\$@"$' "$1" || given=("$recipe") # a job file for any recipe
    dry_run "$1" || return
    folder=$(plan run-dir) || return
    [ -z "$asked_nodes" ] || options+=("--nodes=$asked_nodes")
    [ "$num_links" = 1 ] || options+=("--job-name=${folder##*/}" --dependency=singleton --no-requeue "--export=ALL,ITT_CHAIN=1")
    for ((link = 0; link < num_links; link++)); do
        (cd "$checkout" && sbatch "${options[@]}" "$1" "${given[@]}" "${allowed[@]}" "${overrides[@]}") || return
    done
}

# --- other jobs: one task ---------------------------------------------------------------------------------------------

run_one() { # COMMAND...: stops at the warning and is queued again; the tools continue where they were
    trap 'on_signal USR1' USR1
    local status launch=()
    ! in_slurm || launch=(srun --nodes=1 --ntasks=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" --mpi=none "${container[@]}")
    cd "$checkout" || exit
    PYTHONPATH=$code "${launch[@]}" "$ITT_PYTHON" "$@" &
    children=($!)
    wait_for_children
    if [ -n "$warned" ] && in_slurm && scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi
    return "$status"
}

preprocess() { # JOB_FILE ARGUMENT...
    shift
    load_cluster
    local workers=()
    [[ " $* " == *" --workers"* ]] || [ -z "${SLURM_CPUS_PER_TASK:-}" ] || workers=(--workers "$SLURM_CPUS_PER_TASK")
    run_one tools/preprocess.py "$@" "${workers[@]}"
}

evaluate() { # JOB_FILE RUN_FOLDER ARGUMENT...
    [ $# -ge 2 ] || fail "name the run folder to evaluate: sbatch $1 runs/466m_itt_x4 [options of tools/evaluate.py]"
    local name tasks=()
    run_dir=$2
    shift 2
    load_cluster
    [ -z "${ITT_RUN_ROOT:-}" ] || [[ $run_dir != runs/* ]] || run_dir=$ITT_RUN_ROOT/${run_dir#runs/}
    [[ $run_dir == /* ]] || run_dir=$checkout/$run_dir
    name=$(newest_checkpoint)
    [ "$name" != none ] || fail "$run_dir has no checkpoint; name a run folder that holds checkpoints/latest"
    [[ " $* " == *" --tasks"* || " $* " == *" --heldout"* || " $* " == *" --task-dir"* ]] || tasks=(--tasks paper)
    if [ ! -f "$run_dir/export/$name/config.json" ]; then
        run_one tools/export_hf.py --checkpoint "$run_dir/checkpoints/$name" --output "$run_dir/export/$name" \
            --dtype bfloat16 || exit
    fi
    run_one tools/evaluate.py --model "$run_dir/export/$name" --output "$run_dir/evaluation/$name" --overwrite \
        "${tasks[@]}" "$@"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    action=${2:-}
    case $action in
        train | evaluate | preprocess) "$action" "$1" "${@:3}" ;;
        *) fail "this is called by the .sbatch files beside it; try bash slurm/itt_466m_x4.sbatch --help" ;;
    esac
fi
