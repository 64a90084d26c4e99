#!/usr/bin/env bash
# host.sh install|chips|doctor|pin|start|stop|status|log: what the other scripts do on a TPU host.
#
# They call it through ssh, with the settings that it needs in its environment. Everything is under
# ~/ddk: source/ (the checkout), venv/, work/ (working directory of the run), log.txt, state.txt.

set -euo pipefail

base="$HOME/ddk"
unit=ddk-train
uv_version=0.13.9
grace=600 # seconds that a run may take to save once it is told to stop
host="$(hostname)"

say() { printf '%s: %s\n' "$host" "$*" >&2; }

running() { systemctl is-active --quiet "$unit"; }

# What a process that computes sees: an absent TPU is an error, not a reason to use the CPU. The
# hosts of a Cloud TPU find each other by themselves, those of other clusters by DDK_...
environment() {
    local key
    processes=("JAX_PLATFORMS=tpu,cpu" PYTHONUNBUFFERED=1)
    for key in LIBTPU_INIT_ARGS DDK_COORDINATOR DDK_NUM_PROCESSES DDK_PROCESS_ID; do
        if [ -n "${!key:-}" ]; then processes+=("$key=${!key}"); fi
    done
}

# The images have Python 3.10, which is too old. uv brings another one without root and without apt,
# which is often locked by its own updates in the first minutes of a host.
find_uv() {
    if command -v uv; then return; fi
    if [ ! -x "$base/uv/bin/uv" ]; then
        python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
            --target "$base/uv" "uv==$uv_version" >&2 ||
            { say "cannot install uv: does this host reach a package index?" && return 1; }
    fi
    printf '%s\n' "$base/uv/bin/uv"
}

install() {
    local uv package pair pairs pins=() version='import sys; print("%d.%d" % sys.version_info[:2])'
    uv="$(find_uv)"
    if [ "$STAGED" = yes ]; then
        if gcloud storage cp "$STAGE/pins.txt" "$base/pins.txt"; then
            pins=(--constraint "$base/pins.txt")
        else
            say "no versions are pinned yet: taking the newest ones"
        fi
    fi
    if [ "$("$base/venv/bin/python" -c "$version" 2>/dev/null)" != "$PYTHON" ]; then
        rm -rf "$base/venv"
        "$uv" venv --quiet --python "$PYTHON" "$base/venv"
    fi
    package=(-e "$base/source[$EXTRAS]")
    if [ -n "$PACKAGE" ]; then package=("ddk_jax[$EXTRAS] @ $PACKAGE"); fi
    "$uv" pip install --quiet --python "$base/venv/bin/python" ${pins[@]+"${pins[@]}"} \
        "${package[@]}"
    read -r -a pairs <<<"$SYNC"
    for pair in ${pairs[@]+"${pairs[@]}"}; do
        mkdir -p "$base/work/${pair##*=}"
        gcloud storage rsync --recursive "${pair%=*}" "$base/work/${pair##*=}"
    done
    say "installed"
}

chips() { # HOSTS CHIPS, all slices together
    environment
    env "${processes[@]}" timeout 600 "$base/venv/bin/python" "$base/source/tpu_setup/chips.py" "$@"
}

doctor() {
    local words
    environment
    read -r -a words <<<"$ARGS"
    cd "$base/work"
    env "${processes[@]}" "$base/venv/bin/ddk" doctor "$base/source/$CONFIG" --run.dir "$RUN_DIR" \
        ${words[@]+"${words[@]}"}
}

# Keeps the versions of all packages, so that hosts that come later get the same ones.
pin() {
    local uv
    uv="$(find_uv)"
    "$uv" pip freeze --python "$base/venv/bin/python" |
        sed '/^-e /d; /^ddk[-_]jax/d' >"$base/pins.txt"
    gcloud storage cp "$base/pins.txt" "$STAGE/pins.txt"
}

start() {
    local words setting settings=()
    if running; then
        say "running already"
        return
    fi
    environment
    for setting in "${processes[@]}" "PATH=$PATH"; do settings+=("--setenv=$setting"); done
    read -r -a words <<<"$ARGS"
    rm -f "$base/state.txt" "$base/stop_requested"
    # A service of its own outlives the ssh session, cannot be started twice, and gets SIGTERM and
    # the time to save when the machine shuts down, while the network is still there. Only the
    # supervisor gets it (mixed); it passes it on. The TPU's driver pins memory: services may pin
    # next to nothing by default, logins may.
    sudo systemd-run --quiet --collect "--unit=$unit" "--uid=$(id -u)" "--gid=$(id -g)" \
        "--working-directory=$base/work" --property=KillMode=mixed \
        "--property=TimeoutStopSec=$((grace + 60))" --property=After=network-online.target \
        --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 "${settings[@]}" -- \
        "$base/venv/bin/python" "$base/source/tpu_setup/supervise.py" --run-dir "$RUN_DIR" \
        --log "$base/log.txt" --state "$base/state.txt" --grace "$grace" \
        --copy-log-to "$STAGE/logs/$host.txt" -- \
        "$base/venv/bin/ddk" train "$base/source/$CONFIG" --run.dir "$RUN_DIR" \
        ${words[@]+"${words[@]}"}
    say "started"
}

# --again: it will be started again soon, so that watch.sh need not take it for the user's wish.
stop() {
    mkdir -p "$base"
    if [ "${1:-}" != --again ]; then touch "$base/stop_requested"; fi
    # It may have ended by itself in between.
    if running; then sudo systemctl stop "$unit" || ! running; fi
    status
}

status() {
    local key value state=none code=- step=- restarts=0 since=- requested=no
    if [ -f "$base/state.txt" ]; then
        while IFS='=' read -r key value; do
            case "$key" in
                state) state="$value" ;;
                code) code="$value" ;;
                step) step="$value" ;;
                restarts) restarts="$value" ;;
                since) since="$value" ;;
            esac
        done <"$base/state.txt"
    fi
    if running; then
        if [ "$state" = none ]; then state=running; fi
    else
        case "$state" in running | waiting) state=dead ;; esac
    fi
    if [ -f "$base/stop_requested" ]; then requested=yes; fi
    printf 'ddk-status host=%s state=%s code=%s step=%s restarts=%s since=%s stop_requested=%s\n' \
        "$host" "$state" "$code" "$step" "$restarts" "$since" "$requested"
    if [ -f "$base/log.txt" ]; then printf '    %s\n' "$(tail -n 1 "$base/log.txt")"; fi
}

log() { # LINES [--follow]
    local follow=''
    if [ "${2:-}" = --follow ]; then follow=-F; fi
    [ -f "$base/log.txt" ] || { say "no log yet" && return; }
    tail -n "$1" ${follow:+"$follow"} "$base/log.txt" | sed -u "s/^/$host: /"
}

case "${1:-}" in
    install | chips | doctor | pin | start | stop | status | log) "$@" ;;
    *)
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit 64
        ;;
esac
