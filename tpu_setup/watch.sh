#!/usr/bin/env bash
# watch.sh [--delete-when-done] [--poll SECONDS] [--max-failures N]
#
# Keeps a run going on TPUs that may be taken away, until it is finished. Looks at the queued
# resource, its nodes and the hosts, again and again, and does what is missing: asks for the TPU
# (anew, when it was SUSPENDED, FAILED or PREEMPTED), bootstraps the hosts, starts the run, which
# continues from its newest checkpoint. Enough by itself for a whole run. Interrupting it leaves
# everything as it is; called again, it goes on.
#
# Hosts that come later get the source and the package versions of the first ones. This checkout is
# taken when there is no queued resource at the start, or nothing in the bucket.
#
#   --delete-when-done   delete the TPU when the run has ended, however it ended
#   --poll SECONDS       time between two looks (default: 60)
#   --max-failures N     give up after so many failures of gcloud in a row (default: 20)
#
# Gives up, too, after five starts on one TPU without a new checkpoint, and when the run crashes on
# two TPUs after the same checkpoint.
#
# Exits with 0 when the run is finished or was stopped by stop.sh, with the exit code of the run
# where another attempt is of no use, and with 1 when it gives up.

set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

delete_when_done=no
max_failures=20
POLL=60
while [ $# -gt 0 ]; do
    case "$1" in
        --delete-when-done) delete_when_done=yes && shift ;;
        --poll) needs_count "$@" && POLL="$2" && shift 2 ;;
        --max-failures) needs_count "$@" && max_failures="$2" && shift 2 ;;
        *) common_option "$@" && shift "$TAKEN" ;;
    esac
done
load_settings
# shellcheck source=/dev/null
. "$SETUP/cloud.sh"

longest_pause=1800
most_starts=5
fresh=no      # whether the next bootstrap copies this checkout
renewals=0    # TPUs asked for since the newest checkpoint
starts=0      # of the run, on this TPU and since the newest checkpoint
failures=0    # of gcloud, in a row
newest=-      # checkpoint
crashed_at='' # newest checkpoint when the supervisors gave up the last time
last_words=''

tell() { # once
    if [ "$*" != "$last_words" ]; then say "$(date +%H:%M:%S) $*"; fi
    last_words="$*"
}

call() { # SCRIPT WORDS...
    local name="$1" words=(--env "$ENV_FILE")
    shift
    if [ "$DRY_RUN" = yes ]; then words+=(--dry-run); fi
    "$SETUP/$name" "${words[@]}" "$@"
}

finish() { # CODE MESSAGE...
    local code="$1"
    shift
    say "$@"
    if [ "$delete_when_done" = yes ]; then
        call delete.sh --yes
    else
        say "the TPU costs on until delete.sh"
    fi
    exit "$code"
}

# Pauses for POLL seconds, twice as long with every one of COUNT.
back_off() { # COUNT
    local seconds="$POLL" count="$1"
    while [ "$count" -gt 0 ] && [ "$seconds" -lt "$longest_pause" ]; do
        seconds=$((2 * seconds)) count=$((count - 1))
    done
    pause $((seconds < longest_pause ? seconds : longest_pause))
}

# A run that is going on needs nothing from here, so there is time.
failed() {
    failures=$((failures + 1))
    [ "$failures" -lt "$max_failures" ] ||
        die 1 "gave up after $failures failures in a row: $*. The TPU, if any, was left alone"
    tell "$*: trying again"
    back_off "$failures"
}

prepare() {
    local words=(--staged)
    if [ "$fresh" = yes ]; then words=(); fi
    starts=$((starts + 1))
    [ "$starts" -le "$most_starts" ] ||
        finish 1 "gave up after $most_starts starts without a checkpoint after $newest"
    if call bootstrap.sh ${words[@]+"${words[@]}"}; then
        fresh=no
        if call run.sh; then return; fi
    fi
    tell "the hosts could not be prepared"
    pause "$POLL"
}

wait_for_tpu() {
    local code=0
    call create.sh --timeout 0 --poll "$POLL" || code=$?
    case "$code" in
        0) prepare ;;
        2) ;; # the next look says why
        *) failed "the TPU could not be asked for" ;;
    esac
}

renew() { # WHY
    tell "$1: asking for a TPU"
    if [ "$renewals" -gt 0 ]; then back_off "$renewals"; fi
    renewals=$((renewals + 1)) starts=0
    if call delete.sh --yes; then
        wait_for_tpu
    else
        failed "the old TPU could not be deleted"
    fi
}

# The whole run failed: the code decides whether other machines could help.
consider_code() { # CODE STEP
    case "$1" in
        3 | 64 | 65 | 70 | 75 | 126 | 127 | 130)
            finish "$1" "the run ended with code $1, which another attempt would not change"
            ;;
    esac
    [ "$crashed_at" != "$2" ] ||
        finish "$1" "the run has crashed on two TPUs after checkpoint $2 (code $1)"
    crashed_at="$2"
    renew "the run keeps crashing here (code $1)"
}

value_of() { # KEY LINES: the largest value
    printf '%s\n' "$2" | sed -n "s/^ddk-status .* $1=\([^ ]*\).*/\1/p" | sort -n | tail -n 1
}

look_at_hosts() {
    local lines said code
    if ! lines="$(on_hosts all "$(status_command)" 2>"$ERRORS" | grep '^ddk-status ')" ||
        [ "$(printf '%s\n' "$lines" | wc -l)" -ne $((HOSTS * SLICES)) ]; then
        cat "$ERRORS" >&2
        failed "not all hosts answer"
        return
    fi
    said="$(value_of step "$lines")"
    if [ "$said" != - ] && [ "$said" != "$newest" ]; then newest="$said" renewals=0 starts=0; fi
    case "$lines" in
        *state=finished*) finish 0 "the run is finished: $RUN_DIR" ;;
        *state=failed*)
            code="$(printf '%s\n' "$lines" | sed -n 's/.* state=failed code=\([0-9]*\) .*/\1/p' |
                sort -n | head -n 1)"
            consider_code "$code" "$newest"
            ;;
        *stop_requested=yes*) finish 0 "stopped by stop.sh, newest checkpoint $newest" ;;
        *state=none* | *state=dead* | *state=stopped*)
            tell "not running on all hosts: starting it"
            # Those that run wait for the others, and hold chips that the check needs.
            if on_hosts all "if [ -f $HOST_SCRIPT ]; then $(host_command '' stop --again); fi"; then
                prepare
            else
                failed "not all hosts could be stopped"
            fi
            ;;
        *)
            failures=0
            tell "running, newest checkpoint $newest"
            pause "$POLL"
            ;;
    esac
}

look_at_nodes() {
    local node state
    for node in $(nodes); do
        state="$(node_state "$node" READY)" || { failed "gcloud failed" && return; }
        case "$state" in
            READY) ;;
            PREEMPTED | TERMINATED | STOPPED | ABSENT)
                renew "node $node is $state"
                return
                ;;
            *)
                tell "node $node is $state: waiting"
                pause "$POLL"
                return
                ;;
        esac
    done
    look_at_hosts
}

if [ "$DRY_RUN" = yes ]; then
    remark "looks at these, again and again:"
    request_state ACTIVE >/dev/null
    for node in $(nodes); do node_state "$node" READY >/dev/null; done
    on_hosts all "$(status_command)"
    remark "when the TPU was taken away:"
    renew "" 2>/dev/null # what the others would say
    exit 0
fi

until state="$(request_state ABSENT)"; do failed "gcloud failed"; done
until staged="$(lookup '' storage objects describe "$STAGE/source.tar.gz" \
    '--format=value(name)')"; do
    failed "gcloud failed"
done
if [ "$state" = ABSENT ] || [ "$staged" = ABSENT ]; then fresh=yes; fi
while true; do
    case "$state" in
        ABSENT) renew "there is no TPU" ;;
        FAILED | SUSPENDED) renew "the queued resource is $state" ;;
        ACTIVE) look_at_nodes ;;
        SUSPENDING | DELETING)
            tell "the queued resource is $state: waiting"
            pause "$POLL"
            ;;
        *) wait_for_tpu ;;
    esac
    until state="$(request_state ABSENT)"; do failed "gcloud failed"; done
done
