# Shape of the job and its rendezvous: nodes, tasks, host of rank 0. Sourced by launch.sh, never run.
# shellcheck shell=bash disable=SC2154

nodes=1 tasks_per_node=1

asked_for() { # FILE OPTION -> the value in its #SBATCH line
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
    local file
    nodes=$asked_nodes
    for file in "$recipe" "$checkout/$recipe" "$checkout/recipes/$recipe.yaml" "$1"; do
        [ -n "$nodes" ] || [ ! -f "$file" ] || nodes=$(asked_for "$file" nodes)
    done
    nodes=${nodes:-1}
    tasks_per_node=${asked_gpus:-$(asked_for "$1" ntasks-per-node)} tasks_per_node=${tasks_per_node:-1}
    if [ "$mode" = run ]; then
        local gpus=${ITT_LOCAL_PROCESSES:-$(count_gpus)}
        nodes=1 tasks_per_node=$gpus
        if [ "$gpus" = 0 ]; then
            tasks_per_node=1
            tasks_per_node=$(plan minimum) || exit
        fi
    fi
}

# The job id of an array's last task is that of the whole array: its index in the array identifies it.
this_job() {
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; else echo "$SLURM_JOB_ID"; fi
}
show_this_job() { timeout 60 scontrol --oneliner show job "$(this_job)"; }

count_gpus() { # visible to a program here: CUDA reads CUDA_VISIBLE_DEVICES up to the first invalid entry
    local total seen='' device form='' num_seen=0
    total=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
    if [ -z "${CUDA_VISIBLE_DEVICES+set}" ] || [ "$total" = 0 ]; then echo "$total"; return; fi
    while read -rd, device; do
        [[ $device =~ ^(GPU-|MIG-|[0-9]{1,6}$) ]] || break
        [[ $device == [GM]* ]] || { device=$((10#$device)) && ((device < total)); } || break
        [ "${form:=${device:0:3}}" = "${device:0:3}" ] || [[ $form$device =~ ^[0-9]+$ ]] || break # ordinals or names, not both
        [[ ,$seen != *,"$device",* ]] || { num_seen=0; break; } # with a duplicate, CUDA sees none
        seen+=$device, num_seen=$((num_seen + 1))
        [[ $device != MIG-* ]] || break # a process sees one MIG instance
    done <<<"$CUDA_VISIBLE_DEVICES,"
    echo "$num_seen"
}

name_array_log() { # link NAME-ARRAY_TASK.log to NAME-JOBID.log, whose name does not identify the task
    local log
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
    say "task $SLURM_ARRAY_TASK_ID of array job $SLURM_ARRAY_JOB_ID"
    log=$(show_this_job | sed -n 's/.* StdOut=\(.*\.log\).*/\1/p')
    [ "${log##*/}" != "$SLURM_JOB_NAME-$SLURM_JOB_ID.log" ] ||
        ln -sfn "${log##*/}" "${log%/*}/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID.log"
}

find_host_of_rank_0() { # sets MASTER_ADDR and MASTER_PORT from the hosts of the job; each must resolve
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
            [ "$attempt" = 3 ] || sleep 2 # a name server may fail for a moment
        done
        fail "host $host of this job does not resolve on $(hostname); correct ITT_MASTER_SUFFIX in cluster.env or DNS"
    done
    export MASTER_ADDR=${hosts[0]}${ITT_MASTER_SUFFIX:-}
    export MASTER_PORT=$((10000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))
}
