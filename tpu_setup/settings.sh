# shellcheck shell=bash disable=SC2034 # what is set here is read elsewhere
# Reads and checks the settings (env.example lists them). Sourced by the scripts, not for execution.

LC_ALL=C # ranges in patterns are ASCII
export LC_ALL
SETUP="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
CHECKOUT="$(cd "$SETUP/.." && pwd)"
SCRIPT="$(basename "$0")"

ENV_FILE="$SETUP/env"
DRY_RUN=no
POLL=30

USAGE_CODE=64
KEYS="PROJECT ZONE NAME ACCELERATOR PROVISIONING SLICES VALID BUCKET CONFIG RUN_DIR ARGS SYNC"
KEYS="$KEYS PACKAGE EXTRAS PYTHON RUNTIME LIBTPU_INIT_ARGS STARTUP_SCRIPT NETWORK SUBNETWORK"
KEYS="$KEYS SERVICE_ACCOUNT SSH"

say() { printf '%s: %s\n' "$SCRIPT" "$*" >&2; }

die() { # CODE MESSAGE...
    local code="$1"
    shift
    say "$@"
    exit "$code"
}

# The comment at the top of the script is its help.
usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    printf '\nOptions of every script:\n'
    printf '  --env FILE      settings; default: tpu_setup/env, made from tpu_setup/env.example\n'
    printf '  --dry-run       print the commands that would be run, and run none of them\n'
    printf '  -h, --help      this text\n'
}

# Sets `TAKEN` to how many words it has understood, for the caller to shift.
common_option() {
    TAKEN=1
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --dry-run) DRY_RUN=yes ;;
        --env)
            needs_value "$@"
            ENV_FILE="$2"
            TAKEN=2
            ;;
        *) die "$USAGE_CODE" "unknown option $(printf '%q' "$1"): --help lists them" ;;
    esac
}

needs_value() { [ $# -ge 2 ] || die "$USAGE_CODE" "$1 needs a value"; }

needs_count() { # OPTION VALUE
    needs_value "$@"
    case "$2" in '' | *[!0-9]*) die "$USAGE_CODE" "$1 needs a whole number" ;; esac
}

# KEY=value lines, blank lines and comments. A value may stand in quotes; nothing is expanded.
read_settings() {
    local line key value number=0
    [ -f "$ENV_FILE" ] ||
        die "$USAGE_CODE" "no settings at $ENV_FILE: copy tpu_setup/env.example and fill it in"
    for key in $KEYS; do printf -v "$key" '%s' ''; done
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        line="${line%$'\r'}"
        case "$line" in
            '' | '#'*) continue ;;
            *=*) ;;
            *) refuse_line "$number" "is not KEY=value" ;;
        esac
        key="${line%%=*}"
        value="${line#*=}"
        case "$key" in '' | *[!A-Z_]*) refuse_line "$number" "is not KEY=value" ;; esac
        case " $KEYS " in
            *" $key "*) ;;
            *) refuse_line "$number" "sets $key, which is no setting: env.example lists them" ;;
        esac
        case "$value" in
            \"*\") value="${value#\"}" value="${value%\"}" ;;
            \'*\') value="${value#\'}" value="${value%\'}" ;;
            *)
                value="${value%% #*}"
                value="${value%"${value##*[! ]}"}"
                ;;
        esac
        printf -v "$key" '%s' "$value"
    done <"$ENV_FILE"
}

refuse_line() { die "$USAGE_CODE" "$ENV_FILE, line $1: $2"; }

refuse() { # KEY WHAT
    die "$USAGE_CODE" "$ENV_FILE: $1=$(printf '%q' "${!1}"): $2"
}

must_be() { # KEY PATTERN WHAT
    [[ "${!1}" =~ $2 ]] || refuse "$1" "$3"
}

words_must_be() { # KEY PATTERN WHAT; words are separated by single spaces
    local word words
    case "${!1}" in *[!\ -~]*) refuse "$1" "has characters that are not ASCII" ;; esac
    read -r -a words <<<"${!1}"
    for word in ${words[@]+"${words[@]}"}; do
        [[ "$word" =~ $2 ]] || refuse "$1" "$3"
    done
}

# Everything below ends up in command lines, here and on the hosts, so nothing passes that a shell
# could understand as more than a word.
check_settings() {
    local name='^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$' path='^[a-z][a-z0-9/-]*$'
    local object='gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/[A-Za-z0-9_.=-]+)+'
    must_be PROJECT '^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$' "is not the id of a project"
    must_be ZONE '^[a-z]+-[a-z]+[0-9]+-[a-z][a-z0-9]*$' "is not a zone, such as us-west4-a"
    must_be NAME "$name" "is not a name: lower-case letters, digits and -, at most 40"
    case "$ACCELERATOR" in
        tpu7x* | v7*) refuse ACCELERATOR "is not for queued resources: tpu_setup/newer_chips.md" ;;
        v5e-*) refuse ACCELERATOR "is spelt v5litepod-${ACCELERATOR#v5e-}" ;;
    esac
    must_be ACCELERATOR '^(v4|v5p|v5litepod|v6e)-[1-9][0-9]{0,4}$' \
        "is not v4-N, v5p-N, v5litepod-N or v6e-N"
    must_be PROVISIONING '^(spot|on-demand|reserved)$' "is not spot, on-demand or reserved"
    must_be SLICES '^[1-9][0-9]{0,2}$' "is not a number of slices"
    must_be VALID '^[1-9][0-9]*[mhd]$' "is not a time such as 90m, 24h or 7d"
    must_be BUCKET '^[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$' "is not a bucket's name (without gs://)"
    must_be CONFIG '^[A-Za-z0-9_][A-Za-z0-9_./-]*\.ya?ml$' \
        "is not the path of a YAML file in this checkout"
    case "$CONFIG" in *..*) refuse CONFIG "leaves this checkout" ;; esac
    [ -f "$CHECKOUT/$CONFIG" ] || refuse CONFIG "does not exist in $CHECKOUT"
    must_be RUN_DIR "^($object|(/[A-Za-z0-9_.-]+)+)$" \
        "is neither gs://BUCKET/FOLDER nor the absolute path of a folder that all hosts share"
    words_must_be ARGS '^[A-Za-z0-9_./:=,@+-]+$' \
        "has a word with other characters than letters, digits and _ . / : = , @ + -"
    words_must_be SYNC "^$object=[A-Za-z0-9_][A-Za-z0-9_./-]*$" \
        "has a word that is not gs://FROM=TO"
    case "$SYNC" in *..*) refuse SYNC "leaves the working directory" ;; esac
    must_be PACKAGE '^(git\+https://[a-z0-9.-]+(/[A-Za-z0-9_.-]+)+(@[A-Za-z0-9_./-]+)?)?$' \
        "is neither empty nor git+https://HOST/OWNER/REPOSITORY@REVISION"
    must_be EXTRAS '^[a-z][a-z0-9-]*(,[a-z][a-z0-9-]*)*$' "is not a list of extras, such as tpu"
    must_be PYTHON '^3\.1[1-9]$' "is not a version from 3.11 on"
    must_be RUNTIME '^[a-z][a-z0-9.-]*$' "is not a TPU software version"
    words_must_be LIBTPU_INIT_ARGS '^--[A-Za-z0-9_]+(=[A-Za-z0-9_.,-]+)?$' \
        "has a word that is not --flag=value"
    case "$STARTUP_SCRIPT" in *,*) refuse STARTUP_SCRIPT "has a comma, where gcloud splits" ;; esac
    [ -f "$STARTUP_SCRIPT" ] || refuse STARTUP_SCRIPT "does not exist"
    [ -z "$NETWORK" ] || must_be NETWORK "$path" "is not the name of a network"
    [ -z "$SUBNETWORK" ] || must_be SUBNETWORK "$path" "is not the name of a subnetwork"
    [ -z "$SERVICE_ACCOUNT" ] ||
        must_be SERVICE_ACCOUNT '^[a-z0-9-]+@[a-z0-9.-]+$' "is not an e-mail address"
    must_be SSH '^(external|internal|iap)$' "is not external, internal or iap"
    count_hosts
}

# HOSTS and CHIPS of one slice. A host of more than one has four chips.
count_hosts() {
    local size="${ACCELERATOR##*-}"
    case "$ACCELERATOR" in
        v4-* | v5p-*)
            [ $((size % 8)) -eq 0 ] || refuse ACCELERATOR "is not a multiple of 8 TensorCores"
            CHIPS=$((size / 2))
            HOSTS=$((CHIPS / 4))
            ;;
        *)
            CHIPS="$size"
            HOSTS=$((size <= 8 ? 1 : size / 4))
            case "$size" in
                1 | 4 | 8 | 16 | 32 | 64 | 128 | 256) ;;
                *) refuse ACCELERATOR "is not 1, 4, 8, 16, 32, 64, 128 or 256 chips" ;;
            esac
            ;;
    esac
}

default_of() { # KEY VALUE
    [ -n "${!1}" ] || printf -v "$1" '%s' "$2"
}

load_settings() {
    read_settings
    default_of PROVISIONING spot
    default_of SLICES 1
    default_of VALID 24h
    # shellcheck disable=SC2153 # read_settings sets NAME
    default_of RUN_DIR "gs://$BUCKET/runs/$NAME"
    default_of EXTRAS tpu,gcs
    default_of PYTHON 3.12
    default_of STARTUP_SCRIPT "$SETUP/startup.sh"
    default_of SSH external
    case "$ACCELERATOR" in
        v4-*) default_of RUNTIME tpu-ubuntu2204-base ;;
        v5litepod-*) default_of RUNTIME v2-alpha-tpuv5-lite ;;
        v5p-*) default_of RUNTIME v2-alpha-tpuv5 ;;
        *) default_of RUNTIME v2-alpha-tpuv6e ;;
    esac
    check_settings
}
