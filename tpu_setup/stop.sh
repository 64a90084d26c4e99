#!/usr/bin/env bash
# stop.sh
#
# Tells the run on every host to stop (SIGTERM): it finishes its step, saves, and ends. Returns when
# it has. run.sh continues it; the TPU goes on costing until delete.sh.

set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

while [ $# -gt 0 ]; do common_option "$@" && shift "$TAKEN"; done
load_settings
# shellcheck source=/dev/null
. "$SETUP/cloud.sh"

on_hosts all "$(host_command '' stop)" || die 1 "not every host has stopped: status.sh says which"
if [ "$DRY_RUN" = no ]; then say "stopped; the TPU costs on until delete.sh"; fi
