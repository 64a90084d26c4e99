#!/usr/bin/env bash
# run.sh
#
# Starts `ddk train CONFIG --run.dir RUN_DIR ARGS` on every host, under a supervisor that starts it
# again after a crash (at most three times in a row without a new checkpoint) and that outlives the
# ssh session. A host where it is running already is left alone. A run directory with checkpoints is
# continued. Needs bootstrap.sh first.

set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

while [ $# -gt 0 ]; do common_option "$@" && shift "$TAKEN"; done
load_settings
# shellcheck source=/dev/null
. "$SETUP/cloud.sh"

on_hosts all "$(host_command "STAGE CONFIG RUN_DIR ARGS LIBTPU_INIT_ARGS" start)" ||
    die 1 "not every host has started: status.sh says which, stop.sh stops the others"
if [ "$DRY_RUN" = no ]; then say "started; next: logs.sh --follow, and watch.sh for a spot TPU"; fi
