#!/usr/bin/env bash
# logs.sh [--follow] [--worker N|all] [--lines N]
#
# Prints the end of the log of a host (supervisor and training together), or of all, with the name
# of the host before each line.
#
#   --follow       go on with what is being written; Ctrl-C ends it, and only it
#   --worker N     host within the slice, or all (default: 0)
#   --lines N      lines from the end (default: 50)
#
# Logs of hosts that are gone are in the bucket: gcloud storage ls gs://BUCKET/ddk/NAME/logs/

set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

words=()
worker=0
lines=50
while [ $# -gt 0 ]; do
    case "$1" in
        --follow) words+=(--follow) && shift ;;
        --worker) needs_value "$@" && worker="$2" && shift 2 ;;
        --lines) needs_count "$@" && lines="$2" && shift 2 ;;
        *) common_option "$@" && shift "$TAKEN" ;;
    esac
done
case "$worker" in all) ;; '' | *[!0-9]*) die "$USAGE_CODE" "--worker needs a number, or all" ;; esac
load_settings
# shellcheck source=/dev/null
. "$SETUP/cloud.sh"

on_hosts "$worker" "$(host_command '' log "$lines" ${words[@]+"${words[@]}"})"
