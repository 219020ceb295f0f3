# One run folder, one job at a time: the claim on it, restarts without progress, the snapshot of code and recipe.
# Sourced by launch.sh, never run.
#
#   RUN/in_use                who holds the folder
#   RUN/restarts              restarts in a row from the same checkpoint, its name, and what was submitted
#   RUN/finished              all steps are done (written by the training)
#   RUN/diverged, refused     why it must not be started again by itself (written by the training and by task.py)
#   RUN/stopped               why later restarts, links of a chain and tasks of an array do nothing
# shellcheck shell=bash disable=SC2154

claim='' first_checkpoint='' num_stuck=0 run_dir='' snapshot=''

newest_checkpoint() { cat "$run_dir/checkpoints/latest" 2>/dev/null || echo none; }
owner_of_run_folder() { cat "$run_dir/in_use" 2>/dev/null; }

claim_run_folder() { # a claim whose owner is gone is taken over, and so is that of an earlier start of the same job
    local mine owner
    if in_slurm; then mine="job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0}"; else mine="process $$ on $(hostname)"; fi
    if ! (set -o noclobber && echo "$mine" >"$run_dir/in_use") 2>/dev/null; then
        owner=$(owner_of_run_folder)
        [ -n "$owner" ] || { sleep 1; owner=$(owner_of_run_folder); } # just made, not yet written
        [ "${owner% start *}" = "${mine% start *}" ] || ! is_alive "$owner" || fail "$run_dir is in use by ${owner% start *};" \
            "wait for it or cancel it, or choose another logging.run_dir (if it is gone, remove $run_dir/in_use)"
        # Asking Slurm takes seconds, in which another may have taken over.
        [ "$(owner_of_run_folder)" = "$owner" ] || fail "$run_dir has just been taken by $(owner_of_run_folder)"
        echo "$mine" >"$run_dir/in_use" || fail "logging.run_dir is $run_dir, which cannot be written"
        sleep 1 # two that take over at once: the last to write goes on
        [ "$(owner_of_run_folder)" = "$mine" ] || fail "$run_dir has just been taken by $(owner_of_run_folder)"
    fi
    claim=$mine
    export ITT_CLAIM=$mine # the training leaves a folder alone that is claimed by another
}

is_alive() { # OWNER; one that cannot be asked about counts as alive
    local kind name host state
    read -r kind name _ host <<<"$1"
    case $kind in
        job)
            state=$(squeue -h -j "$name" -o %T 2>&1) || { [[ $state != *"Invalid job id"* ]]; return; }
            [[ $state =~ RUNNING|COMPLETING|SUSPENDED|STOPPED ]] ;;
        process) [ "$host" != "$(hostname)" ] || kill -0 "$name" 2>/dev/null ;;
        *) false ;;
    esac
}

# A node that was cut off may come back while a later start of its job runs elsewhere.
is_overtaken() { [ -n "$claim" ] && [ -f "$run_dir/in_use" ] && [ "$(owner_of_run_folder)" != "$claim" ]; }
release_run_folder() { [ -z "$claim" ] || is_overtaken || rm -f "$run_dir/in_use"; }

# What a person submitted: the links of a chain and the tasks of an array have it in common.
submission() { echo "${SLURM_ARRAY_JOB_ID:-${ITT_CHAIN:-${SLURM_JOB_ID:-$$}}}"; }

count_restart() { # restarts in a row that began at the same checkpoint, the one being started included
    local before='' seen='' of=''
    num_stuck=0 first_checkpoint=$(newest_checkpoint)
    read -r before seen of 2>/dev/null <"$run_dir/restarts"
    if [ "$of" = "$(submission)" ] || [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
        [ ! -f "$run_dir/stopped" ] || { say "not continued: $(cat "$run_dir/stopped")"; exit 1; }
        [ ! -f "$run_dir/diverged" ] || stop 2 "$(cat "$run_dir/diverged")" # and its node died before it could say so
        [ "$seen" != "$first_checkpoint" ] || num_stuck=$((before + 1))
    else
        rm -f "$run_dir/stopped" "$run_dir/diverged" # submitted by a person, who knows
    fi
    rm -f "$run_dir/refused"
    echo "$num_stuck $first_checkpoint $(submission)" >"$run_dir/restarts" || fail "logging.run_dir is $run_dir, which cannot be written"
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
