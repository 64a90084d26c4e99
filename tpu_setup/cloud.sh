# shellcheck shell=bash
# Everything that is asked of Google Cloud. Sourced by the scripts after settings.sh.

exec 3>&1 # where a dry run prints, from within $( ) too

ERRORS="$(mktemp)"
trap 'rm -f "$ERRORS"' EXIT

# Prints words so that a shell reads the same words back.
quoted() {
    local word escape="'\\''" separator=''
    for word in "$@"; do
        case "$word" in
            '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$escape}'" ;;
        esac
        printf '%s%s' "$separator" "$word"
        separator=' '
    done
}

show() { printf '%s\n' "$(quoted "$@")" >&3; }

remark() { [ "$DRY_RUN" = no ] || printf '# %s\n' "$*" >&3; }

cloud() {
    if [ "$DRY_RUN" = yes ]; then
        show gcloud "$@"
    elif [ "${BACKGROUND:-no}" = yes ]; then
        exec gcloud "$@" </dev/null # in place of the subshell, so that it can be killed
    else
        gcloud "$@" </dev/null
    fi
}

pause() { [ "$DRY_RUN" = yes ] || sleep "$1"; }

# Prints one field of something, or ABSENT if there is no such thing; fails when gcloud fails in
# another way. A dry run assumes the first word.
lookup() { # ASSUMED gcloud's words...
    local assumed="$1" answer
    shift
    if [ "$DRY_RUN" = yes ]; then
        show gcloud "$@"
        printf '%s\n' "$assumed"
    elif answer="$(gcloud "$@" 2>"$ERRORS" </dev/null)"; then
        printf '%s\n' "${answer:-UNKNOWN}"
    elif grep -q -e NOT_FOUND -e 'not found: 404' "$ERRORS"; then
        printf 'ABSENT\n'
    else
        cat "$ERRORS" >&2
        return 1
    fi
}

request_state() { # ASSUMED
    lookup "$1" compute tpus queued-resources describe "$NAME" \
        "--project=$PROJECT" "--zone=$ZONE" '--format=value(state.state)'
}

node_state() { # NODE ASSUMED
    lookup "$2" compute tpus tpu-vm describe "$1" \
        "--project=$PROJECT" "--zone=$ZONE" '--format=value(state)'
}

# A node is a slice.
nodes() {
    local slice
    if [ "$SLICES" -eq 1 ]; then
        printf '%s\n' "$NAME"
    else
        for ((slice = 0; slice < SLICES; slice++)); do printf '%s-%s\n' "$NAME" "$slice"; done
    fi
}

remote() { # NODE WORKER COMMAND
    local track='' way=''
    case "$SSH" in
        internal) way=--internal-ip ;;
        iap) track=alpha way=--tunnel-through-iap ;;
    esac
    cloud ${track:+"$track"} compute tpus tpu-vm ssh "$1" "--project=$PROJECT" "--zone=$ZONE" \
        "--worker=$2" --quiet ${way:+"$way"} '--ssh-flag=-o ServerAliveInterval=30' "--command=$3"
}

# Runs a command on hosts of every slice at the same time; fails if it fails anywhere.
on_hosts() { # WORKER COMMAND
    local node pids='' pid code=0
    if [ "$SLICES" -eq 1 ] || [ "$DRY_RUN" = yes ]; then
        for node in $(nodes); do remote "$node" "$1" "$2" || code=$?; done
        return "$code"
    fi
    for node in $(nodes); do
        (BACKGROUND=yes && remote "$node" "$1" "$2") &
        pids="$pids $!"
    done
    # shellcheck disable=SC2064 # the processes of now
    trap "kill $pids 2>/dev/null; exit 130" INT TERM
    for pid in $pids; do wait "$pid" || code=$?; done
    trap - INT TERM
    return "$code"
}

HOST_SCRIPT=ddk/source/tpu_setup/host.sh

# A command for the hosts: what it needs to know, and host.sh with its words.
host_command() { # "KEY KEY ..." WORDS...
    local key settings=()
    for key in $1; do settings+=("$key=${!key}"); done
    shift
    if [ "${#settings[@]}" -eq 0 ]; then
        quoted bash "$HOST_SCRIPT" "$@"
    else
        quoted env "${settings[@]}" bash "$HOST_SCRIPT" "$@"
    fi
}

# What a host says of its run, one that was not bootstrapped yet too.
status_command() {
    local none='state=none code=- step=- restarts=0 since=- stop_requested=no'
    # shellcheck disable=SC2016 # for the host to expand
    printf 'if [ -f %s ]; then %s; else echo "ddk-status host=$(hostname) %s"; fi' \
        "$HOST_SCRIPT" "$(host_command '' status)" "$none"
}

# Folder of the bucket for source, versions and logs.
STAGE="gs://$BUCKET/ddk/$NAME"
export STAGE
