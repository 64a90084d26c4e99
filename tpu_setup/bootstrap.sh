#!/usr/bin/env bash
# bootstrap.sh [--staged]
#
# Prepares every host: copies this checkout (tracked files, and untracked ones that git does not
# ignore) through the bucket, makes an environment with the package, fetches the folders of SYNC,
# checks that all hosts see all chips, and runs `ddk doctor` on each. May be called again.
#
#   --staged   take source and package versions that an earlier call left in the bucket, so that a
#              run continues on new hosts with what it began with

set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

staged=no
while [ $# -gt 0 ]; do
    case "$1" in
        --staged) staged=yes && shift ;;
        *) common_option "$@" && shift "$TAKEN" ;;
    esac
done
load_settings
# shellcheck source=/dev/null
. "$SETUP/cloud.sh"

# Names of the files to copy, each ended by a zero byte. A tracked file may have been deleted.
source_files() {
    local file
    git -C "$CHECKOUT" ls-files -z --cached --others --exclude-standard |
        while IFS= read -r -d '' file; do
            if [ -e "$CHECKOUT/$file" ]; then printf '%s\0' "$file"; fi
        done
}

stage_source() {
    remark "the files of $CHECKOUT, packed by tar, go to the standard input of:"
    if [ "$DRY_RUN" = yes ]; then
        # shellcheck disable=SC2153 # of cloud.sh, and not STAGED
        show gcloud storage cp - "$STAGE/source.tar.gz"
    else
        # COPYFILE_DISABLE: no resource forks from a Mac.
        source_files | COPYFILE_DISABLE=1 tar -C "$CHECKOUT" --null -T - -czf - |
            gcloud storage cp - "$STAGE/source.tar.gz"
    fi
}

# The command that makes everything else on a host possible. It leaves a running training alone.
unpack="if systemctl is-active --quiet ddk-train; then"
unpack="$unpack echo 'a run is going on here: stop.sh first' >&2; exit 75; fi"
unpack="$unpack; mkdir -p ddk/work && cd ddk"
unpack="$unpack && gcloud storage cp $STAGE/source.tar.gz source.tar.gz"
unpack="$unpack && rm -rf source && mkdir source && tar -xzf source.tar.gz -C source && cd .."

if [ "$staged" = no ]; then
    git -C "$CHECKOUT" rev-parse --git-dir >/dev/null 2>&1 ||
        die "$USAGE_CODE" "$CHECKOUT is not a git checkout: which files belong to it?"
    say "copying this checkout to the bucket"
    stage_source || die 1 "cannot write to $STAGE: does the bucket exist, may you write to it?"
fi
export STAGED="$staged"
say "installing on every host (a few minutes)"
on_hosts all "$unpack && $(host_command "STAGE STAGED PYTHON PACKAGE EXTRAS SYNC" install)" ||
    die 1 "the installation failed on at least one host, see above"
all_hosts=$((HOSTS * SLICES))
all_chips=$((CHIPS * SLICES))
say "checking that $all_hosts hosts see $all_chips chips"
on_hosts all "$(host_command LIBTPU_INIT_ARGS chips "$all_hosts" "$all_chips")" ||
    die 1 "the chips are not all there, see above"
say "ddk doctor on every host"
on_hosts all "$(host_command "CONFIG RUN_DIR ARGS LIBTPU_INIT_ARGS" doctor)" ||
    die 1 "the run is not fit to start, see above"
if [ "$staged" = no ]; then
    remote "$(nodes | head -n 1)" 0 "$(host_command STAGE pin)" ||
        die 1 "the hosts cannot write to $STAGE: may their service account?"
fi
if [ "$DRY_RUN" = no ]; then say "every host is ready; next: run.sh"; fi
