# One job at a time on a run folder: claim, restarts without progress, snapshot of code and recipe.
# Sourced by launch.sh, never run.
#
#   RUN/in_use                owner of the folder
#   RUN/restarts              restarts in a row from the same checkpoint, its name, and the submission
#   RUN/finished              all steps are done (written by the training)
#   RUN/diverged, refused     why it must not restart automatically (written by the training and by task.py)
#   RUN/stopped               why later restarts, links of a chain and tasks of an array do nothing
# shellcheck shell=bash disable=SC2034,SC2154

claim='' first_checkpoint='' num_stuck=0 run_dir='' snapshot='' has_locks=''

newest_checkpoint() { cat "$run_dir/checkpoints/latest" 2>/dev/null || echo none; }
owner_of_run_folder() { cat "$run_dir/in_use" 2>/dev/null; }

find_run_folder() { # sets run_dir, after a check that this recipe may use it; writes nothing in it
    if [ "$code" != "$checkout" ]; then
        run_dir=$(dirname "$code")
        return
    fi
    local said
    said=$(plan run-dir) || exit
    run_dir=${said%%$'\n'*}
    [[ $run_dir == /* ]] || run_dir=$checkout/$run_dir
    [[ $said != *$'\nfinished' ]] || { say "$run_dir is finished already"; exit 0; }
    mkdir -p "$run_dir" || fail "logging.run_dir is $run_dir, which cannot be written; choose another"
}

claim_run_folder() { # takes over a claim of an earlier start of the same job, or of an owner that is gone
    local mine owner code
    if in_slurm; then mine="job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0}"; else mine="process $$ on $(hostname)"; fi
    for _ in 1 2 3; do # it may be released, or taken over by another, between two steps
        ! guarded create_claim "$mine" || { claim=$mine; break; }
        owner=$(owner_of_run_folder)
        [ -e "$run_dir/in_use" ] || continue
        [ "${owner% start *}" = "${mine% start *}" ] || ! is_alive "$owner" || fail "$run_dir is in use by ${owner% start *};" \
            "wait for it or cancel it, or choose another logging.run_dir (if it is gone, remove $run_dir/in_use)"
        guarded replace_claim "$owner" "$mine"
        code=$?
        [ "$code" != 0 ] || { claim=$mine; break; }
        [ "$code" != 2 ] || fail "$run_dir/in_use was left behind by ${owner% start *}, and this file system has no locks," \
            "so it cannot be taken over safely; remove it, unless its owner is still at work"
    done
    [ -e "$run_dir/in_use" ] || fail "logging.run_dir is $run_dir, which cannot be written"
    [ -n "$claim" ] || fail "$run_dir has just been taken by $(owner_of_run_folder)"
    export ITT_CLAIM=$claim # the training does not touch a folder that another has claimed
}

guarded() { # COMMAND...: run it while no other process, on any node, changes the claim, as in megatron_itt/locks.py
    local guard=$run_dir/.in_use.lock lock status_of_lock status_of_command
    while true; do
        { exec {lock}>>"$guard"; } 2>/dev/null || return
        flock --timeout 20 --conflict-exit-code 99 "$lock" 2>/dev/null
        status_of_lock=$?
        [ "$status_of_lock" = 0 ] || break
        [ ! "$guard" -ef "/dev/fd/$lock" ] || break
        exec {lock}>&- # its last holder has removed it
    done
    [ "$status_of_lock" != 99 ] || fail "$guard has been held by another process for 20 s; remove it if there is none"
    [ "$status_of_lock" = 0 ] && has_locks=yes || has_locks=''
    "$@"
    status_of_command=$?
    rm -f "$guard" # before it is unlocked: a process that waits for it notices, and locks a new file
    exec {lock}>&-
    return "$status_of_command"
}

create_claim() { (set -o noclobber && echo "$1" >"$run_dir/in_use") 2>/dev/null; } # MINE

replace_claim() { # OWNER MINE -> 1: it is another's by now; 2: two could do this at once
    [ "$(owner_of_run_folder)" = "$1" ] || return 1
    [ -n "$has_locks" ] || [ "${1% start *}" = "${2% start *}" ] || return 2 # Slurm has one start of a job at a time
    echo "$2" >"$run_dir/.in_use.tmp" && mv -f "$run_dir/.in_use.tmp" "$run_dir/in_use"
}

remove_claim() { [ "$(owner_of_run_folder)" != "$1" ] || rm -f "$run_dir/in_use"; } # MINE

is_alive() { # OWNER; an owner of unknown state counts as alive
    local kind name host state
    read -r kind name _ host <<<"$1"
    case $kind in
        job)
            state=$(squeue -h -j "$name" -o %T 2>&1) || { [[ $state != *"Invalid job id"* ]]; return; }
            [[ $state =~ RUNNING|COMPLETING|SUSPENDED|STOPPED ]] ;;
        process) # on another host the state is unknown; malformed text is a damaged claim
            [[ $name =~ ^[0-9]+$ ]] && [ -n "$host" ] && { [ "$host" != "$(hostname)" ] || kill -0 "$name" 2>/dev/null; } ;;
        *) false ;;
    esac
}

find_ended_owner() { # before a submission: what the planner cannot ask Slurm itself
    local owner folder
    folder=$(plan run-dir 2>/dev/null) || return 0
    folder=${folder%%$'\n'*}
    [[ $folder == /* ]] || folder=$checkout/$folder
    owner=$(run_dir=$folder owner_of_run_folder)
    [ -z "$owner" ] || is_alive "$owner" || plan_options+=("--ended-owner=$owner")
}

# A node that was cut off may return while a later start of its job runs elsewhere.
is_overtaken() { [ -n "$claim" ] && [ -f "$run_dir/in_use" ] && [ "$(owner_of_run_folder)" != "$claim" ]; }
release_run_folder() { [ -z "$claim" ] || guarded remove_claim "$claim"; }

# Identifies what a person submitted: the same for all links of a chain and all tasks of an array.
submission() { echo "${SLURM_ARRAY_JOB_ID:-${ITT_CHAIN:-${SLURM_JOB_ID:-$$}}}"; }

count_restart() { # restarts in a row that began at the same checkpoint, the one being started included
    local before='' seen='' of=''
    num_stuck=0 first_checkpoint=$(newest_checkpoint)
    read -r before seen of 2>/dev/null <"$run_dir/restarts"
    if [ "$of" = "$(submission)" ] || [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
        [ ! -f "$run_dir/stopped" ] || { say "not continued: $(cat "$run_dir/stopped")"; exit 1; }
        [ ! -f "$run_dir/diverged" ] || stop 2 "$(cat "$run_dir/diverged")" # and its node died before it could report it
        [ "$seen" != "$first_checkpoint" ] || num_stuck=$((before + 1))
    else
        rm -f "$run_dir/stopped" "$run_dir/diverged" # resubmitted by a person
    fi
    rm -f "$run_dir/refused"
    echo "$num_stuck $first_checkpoint $(submission)" >"$run_dir/restarts" || fail "logging.run_dir is $run_dir, which cannot be written"
    [ "$num_stuck" -le "$ITT_MAX_RESTARTS" ] || stop 1 "$num_stuck restarts in a row ended at $first_checkpoint"
}

stop() { # STATUS REASON: for later links of a chain and tasks of an array as well
    echo "$2" >"$run_dir/stopped"
    say "stopped for good: $2; look into the log, then submit again"
    exit "$1"
}

job_note() { echo "${ITT_RUN_ROOT:-$checkout/runs}/.jobs/${SLURM_JOB_ID:-none}"; } # the file that names the snapshot of a job

use_run_folder() { # takes the snapshot at the first start and uses it after that
    if [ "$code" != "$checkout" ]; then recipe=$code/recipe.yaml overrides=(); fi
    snapshot=$(plan prepare) || exit
    [[ $snapshot == /* ]] || snapshot=$checkout/$snapshot
    if in_slurm && mkdir -p "$(dirname "$(job_note)")"; then echo "$snapshot" >"$(job_note)"; fi
}

undo_change() { # the training has refused, at its start, a change that --allow-changed permitted
    [ ! -f "$snapshot/previous.yaml" ] || [ "$(newest_checkpoint)" != "$first_checkpoint" ] || mv -f "$snapshot/previous.yaml" "$snapshot/recipe.yaml"
}

continue_from_snapshot() { # ARGUMENT...: a requeued job runs the launcher of its first start
    local kept
    in_slurm && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "$code" = "$checkout" ] || return 0
    kept=$(cat "$(job_note)" 2>/dev/null) && [ -f "$kept/slurm/launch.sh" ] || return 0
    say "continues with the code of its first start: $kept"
    ITT_CHECKOUT=$checkout exec bash "$kept/slurm/launch.sh" "$@"
}
