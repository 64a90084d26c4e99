#!/usr/bin/env bash
# delete.sh [--yes]
#
# Deletes the queued resource with its nodes, and looks afterwards that nothing is left that costs.
# What is in the bucket stays. A run that is going on loses the steps since its newest checkpoint:
# stop.sh saves them first.
#
#   --yes   do not ask

set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

yes=no
while [ $# -gt 0 ]; do
    case "$1" in
        --yes) yes=yes && shift ;;
        *) common_option "$@" && shift "$TAKEN" ;;
    esac
done
load_settings
# shellcheck source=/dev/null
. "$SETUP/cloud.sh"

if [ "$yes" = no ] && [ "$DRY_RUN" = no ]; then
    [ -t 0 ] || die "$USAGE_CODE" "deletes $NAME in $ZONE: say --yes where nobody can be asked"
    read -r -p "Delete $NAME in $ZONE ($PROJECT)? [y/N] " answer
    case "$answer" in y | Y | yes) ;; *) die 1 "nothing was deleted" ;; esac
fi

state="$(request_state ACTIVE)" ||
    die 1 "gcloud cannot say whether $NAME exists: nothing was deleted"
if [ "$state" != ABSENT ]; then
    # --force deletes the nodes too; without it they would stay, and cost.
    cloud compute tpus queued-resources delete "$NAME" "--project=$PROJECT" "--zone=$ZONE" \
        --force --quiet || say "deleting the queued resource failed; looking what is left"
fi
for node in $(nodes); do
    state="$(node_state "$node" ABSENT)" ||
        die 1 "gcloud cannot say whether node $node is left: call delete.sh again"
    if [ "$state" != ABSENT ]; then
        cloud compute tpus tpu-vm delete "$node" "--project=$PROJECT" "--zone=$ZONE" --quiet ||
            say "deleting node $node failed; looking what is left"
    fi
done

# Not by what was asked for, but by what there is.
left=''
for kind in queued-resources tpu-vm; do
    found="$(cloud compute tpus "$kind" list "--project=$PROJECT" "--zone=$ZONE" \
        '--format=value(name.basename())')" ||
        die 1 "gcloud cannot list what is left: call delete.sh again"
    for item in $found; do
        case " $NAME $(nodes | tr '\n' ' ')" in *" $item "*) left="$left $kind/$item" ;; esac
    done
done
[ "$DRY_RUN" = yes ] && exit 0
[ -z "$left" ] || die 1 "still there, and perhaps costing:$left; call delete.sh again"
say "nothing of $NAME is left in $ZONE: boot disks went with the nodes, and there were no others"
say "storage that stays, and costs as storage does: $RUN_DIR and $STAGE"
