#!/usr/bin/env bash
# status.sh
#
# Says in which state the queued resource, its nodes, and the supervisor on every host are:
#
#   running   training        waiting   between two attempts      none     not started
#   finished  to the end      stopped   told to stop, and saved   failed   ended for good, with code
#   dead      the host was started anew, or the supervisor was killed

set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

while [ $# -gt 0 ]; do common_option "$@" && shift "$TAKEN"; done
load_settings
# shellcheck source=/dev/null
. "$SETUP/cloud.sh"

state="$(request_state ACTIVE)" || die 1 "gcloud failed"
[ "$DRY_RUN" = yes ] || printf 'queued resource %s: %s\n' "$NAME" "$state"
[ "$state" = ACTIVE ] || exit 0
for node in $(nodes); do
    state="$(node_state "$node" READY)" || die 1 "gcloud failed"
    [ "$DRY_RUN" = yes ] || printf 'node %s: %s\n' "$node" "$state"
done
# gcloud's words on each connection are of interest only if one fails.
if ! on_hosts all "$(status_command)" 2>"$ERRORS"; then
    cat "$ERRORS" >&2
    die 1 "not all hosts answer"
fi
