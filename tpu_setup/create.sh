#!/usr/bin/env bash
# create.sh [--timeout SECONDS] [--poll SECONDS] [--spot | --on-demand | --reserved]
#
# Asks for the TPU with a queued resource and waits until it is there, telling every change of
# state. Called again, it goes on waiting for the request made earlier. Waiting costs nothing; the
# TPU costs from the moment it is ACTIVE until delete.sh.
#
#   --timeout SECONDS   stop waiting after this time; 0: never (default: 86400)
#   --poll SECONDS      time between two looks (default: 30)
#   --spot, --on-demand, --reserved   in place of PROVISIONING
#
# Exits with 0 (ACTIVE), 1 (gcloud failed), 2 (not served: FAILED, SUSPENDED or timeout), 64
# (usage).

set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

timeout=86400
provisioning=''
while [ $# -gt 0 ]; do
    case "$1" in
        --timeout) needs_count "$@" && timeout="$2" && shift 2 ;;
        --poll) needs_count "$@" && POLL="$2" && shift 2 ;;
        --spot | --on-demand | --reserved) provisioning="${1#--}" && shift ;;
        *) common_option "$@" && shift "$TAKEN" ;;
    esac
done
load_settings
# shellcheck source=/dev/null
. "$SETUP/cloud.sh"

request() {
    local words=()
    if [ "$SLICES" -eq 1 ]; then
        words+=("--node-id=$NAME")
    else
        words+=("--node-count=$SLICES" "--node-prefix=$NAME")
    fi
    case "${provisioning:-$PROVISIONING}" in
        spot) words+=(--spot) ;;
        reserved) words+=(--reserved) ;;
    esac
    if [ -n "$NETWORK" ]; then words+=("--network=$NETWORK"); fi
    if [ -n "$SUBNETWORK" ]; then words+=("--subnetwork=$SUBNETWORK"); fi
    if [ -n "$SERVICE_ACCOUNT" ]; then words+=("--service-account=$SERVICE_ACCOUNT"); fi
    if [ "$SSH" != external ]; then words+=(--internal-ips); fi
    cloud compute tpus queued-resources create "$NAME" "--project=$PROJECT" "--zone=$ZONE" \
        "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" "${words[@]}" \
        "--valid-until-duration=$VALID" "--labels=ddk-run=$NAME" \
        --scopes=https://www.googleapis.com/auth/cloud-platform \
        "--metadata-from-file=startup-script=$STARTUP_SCRIPT" --quiet
}

not_served() {
    say "$1"
    cloud compute tpus queued-resources describe "$NAME" "--project=$PROJECT" "--zone=$ZONE" \
        '--format=yaml(state)' >&2 || true
    say "delete.sh removes the request, which counts against the quota as long as it exists;" \
        "then try another zone, ACCELERATOR or PROVISIONING, or again later (watch.sh does)"
    exit 2
}

wait_until_active() {
    local state before='' failures=0 start="$SECONDS"
    while true; do
        if state="$(request_state ACTIVE)"; then
            failures=0
        else
            failures=$((failures + 1))
            [ "$failures" -lt 10 ] || die 1 "gcloud has failed 10 times in a row, see above"
            state="$before"
        fi
        if [ "$state" != "$before" ]; then
            say "$(date +%H:%M:%S) $state"
            before="$state"
        fi
        case "$state" in
            ACTIVE) return ;;
            FAILED | SUSPENDED) not_served "the request for $NAME is $state:" ;;
            ABSENT) die 2 "the request for $NAME is gone: somebody deleted it" ;;
        esac
        if [ "$timeout" -gt 0 ] && [ $((SECONDS - start)) -ge "$timeout" ]; then
            say "still $state after $timeout seconds. The request stays in the queue, at most" \
                "$VALID in all: create.sh goes on waiting, delete.sh withdraws it"
            exit 2
        fi
        pause "$POLL"
    done
}

state="$(request_state ABSENT)" || die 1 "gcloud cannot say whether $NAME exists"
trap 'say "the request stays: create.sh goes on waiting, delete.sh withdraws it"; exit 130' INT TERM
case "$state" in
    ABSENT)
        request || die 1 "the request was refused, see above; README.md says what may be wrong"
        ;;
    ACTIVE) ;;
    FAILED | SUSPENDED) not_served "there is a request for $NAME already, and it is $state:" ;;
    *) say "$NAME was requested before: waiting for it" ;;
esac
wait_until_active
if [ "$DRY_RUN" = no ]; then
    say "$NAME is there, and costs from now on until delete.sh; next: bootstrap.sh"
fi
