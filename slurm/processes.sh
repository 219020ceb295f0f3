# Tasks of a job: check of every node, start, signals, wait. Sourced by launch.sh, never run.
# shellcheck shell=bash disable=SC2034,SC2154

children=() warned='' cancelled='' status=0 cause='' failures='' errors='' filter='' preflight=''

# USR1 is the warning before a time limit; TERM and INT come from people, from preemption and from the limit itself.
# srun passes USR1 on to the tasks but would answer TERM by killing them; Slurm sends them its own TERM.
on_signal() {
    if [ "$1" = USR1 ]; then warned=yes; else cancelled=yes; fi
    say "received $1; all ranks save a checkpoint and stop"
    [ ${#children[@]} = 0 ] || kill -USR1 "${children[@]}" 2>/dev/null
}

is_out_of_time() { # TERM came from the time limit, because the warning was late or left too little time
    in_slurm && [[ $(show_this_job) =~ JobState=TIMEOUT|Reason=TimeLimit ]]
}

check_nodes() { # run the doctor on every node; its report decides, not the exit code of srun
    [ "${ITT_PREFLIGHT:-yes}" = yes ] && in_slurm || return 0
    local report=$run_dir/preflight.txt unusable
    PYTHONPATH=$snapshot MASTER_PORT=$((MASTER_PORT + 1)) srun --nodes="$nodes" --ntasks="$nodes" \
        --ntasks-per-node=1 --mpi=none --label --chdir="$checkout" "${container[@]}" "$ITT_PYTHON" "$snapshot/tools/doctor.py" --speed \
        --recipe "$snapshot/recipe.yaml" >"$report" 2>&1
    grep -E '^ *0: (links|speed)' "$report"
    [ "$(grep -cE '^ *[0-9]+: healthy' "$report")" != "$nodes" ] || return 0
    grep -E 'problem|rror' "$report" | head -20
    # What no node can use is a fault of the recipe, which a restart would meet again.
    unusable=$(sed -nE 's/^ *([0-9]+): problem: .* cannot be used.*/\1/p' "$report" | sort -u | wc -l)
    [ "$unusable" != "$nodes" ] || stop 2 "$(sed -nE 's/^ *0: problem: (.* cannot be used.*)/\1/p' "$report" | head -1)"
    preflight="the preflight failed: $(grep -m1 -oE 'problem.*|error.*|Error.*' "$report"); see $report"
    return 1
}

# Standard error of the tasks passes through a filter that keeps lines about failures, for the last line of the log.
FAILURE='^error: |^[A-Za-z_.]*(Error|Exception)\b|[Oo]ut [Oo]f [Mm]emory|oom.kill|^Fatal |^(srun|slurmstepd): error: '

keep_failures() { # sets errors, the descriptor to write to
    failures=$(mktemp) || fail "TMPDIR is ${TMPDIR:-/tmp}, which cannot be written"
    exec {errors}> >(trap '' USR1 TERM INT; exec sed -uE "/$FAILURE/w $failures" >&2)
    filter=$!
}

find_cause() { # STATUS: sets cause, the first error: later ones of other ranks follow from it
    local pattern first=''
    cause=${preflight:-exit code $1}
    [ -n "$failures" ] || return 0
    exec {errors}>&-
    for _ in {1..50}; do kill -0 "$filter" 2>/dev/null || break; sleep 0.1; done
    for pattern in '^error: ' '^[A-Za-z_.]*(Error|Exception)\b' 'oom.kill|[Oo]ut [Oo]f [Mm]emory' '^'; do
        first=$(grep -m1 -E "$pattern" "$failures") && break
    done
    [ -n "$first" ] || [ "$1" -le 128 ] || first="a process was ended by signal $(($1 - 128))"
    [ -z "$first" ] || cause+=": ${first#error: }"
    rm -f "$failures"
    failures=''
}

start_on_cluster() { # COMMAND...
    local options=()
    keep_failures
    read -ra options <<<"${ITT_SRUN_OPTIONS:-}"
    srun --nodes="$nodes" --ntasks="$((nodes * tasks_per_node))" --ntasks-per-node="$tasks_per_node" \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait="$ITT_STRAGGLER_S" --mpi=none \
        --chdir="$checkout" "${options[@]}" "${container[@]}" "$@" 2>&"$errors" &
    children=($!)
}

start_here() { # COMMAND...
    local rank leash=()
    keep_failures
    cd "$checkout" || exit
    # Ranks end with their launcher; else the next one could claim the folder while they still write to it.
    ! setpriv --pdeathsig KILL true 2>/dev/null || leash=(setpriv --pdeathsig KILL)
    for ((rank = 0; rank < tasks_per_node; rank++)); do
        RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$tasks_per_node "${leash[@]}" "$@" 2>&"$errors" &
        children+=($!)
    done
}

wait_for_children() { # sets status: the first that is not 0; a rank that ends gives the others ITT_STRAGGLER_S
    local child left code_of_child first_end=''
    status=0
    [ -z "$warned$cancelled" ] || kill -USR1 "${children[@]}" 2>/dev/null # a signal that arrived before they were started
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
        [ -z "$first_end" ] || ((SECONDS - first_end < ITT_STRAGGLER_S)) || kill -KILL "${children[@]}" 2>/dev/null
        sleep 0.5 &
        wait $! # a trap interrupts this wait, not the sleep of a foreground process
    done
}
