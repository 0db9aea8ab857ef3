#!/bin/bash
# Entry point of the images: checks what the container was given, then becomes `pte-vllm`.
#
#     serve [MODEL] [flags]    MODEL may come from PTE_MODEL
#     train COMMAND [...]      below /runs
#     health [PORT]            whether the server in this container answers; for health checks
#     anything else            as `pte-vllm` takes it: adapter, plan, --version, ...
#
# VLLM_API_KEY_FILE, PTE_ADMIN_KEY_FILE and HF_TOKEN_FILE name files with secrets. PTE_SPOOL is where
# pushed adapters stay. `exec` throughout, so that a stop signal reaches the server itself.
set -euo pipefail
umask 0002 # group 0 keeps the volumes, whatever user id the platform picks

fail() {
    printf 'pte-vllm: error: %s\n' "$*" >&2
    exit 2
}

whoami_() { printf 'user %s, groups %s' "$(id -u)" "$(id -G | tr ' ' ',')"; }

# has_flag FLAG ARGUMENTS...
has_flag() {
    local flag=$1 argument
    shift
    for argument in "$@"; do
        [[ $argument == "$flag" || $argument == "$flag="* ]] && return 0
    done
    return 1
}

# check_secret VARIABLE: the file that it names has something in it.
check_secret() {
    local variable=$1
    local file=${!variable}
    [[ -e $file ]] || fail "$variable: there is no $file in the container; mount the secret there"
    [[ -f $file && -r $file ]] || fail "$variable: $file cannot be read by $(whoami_);" \
        "chown 10001 or chmod g+r (group 0) the file on the host"
    [[ -n $(tr -d '[:space:]' <"$file") ]] || fail "$variable: $file is empty"
}

# export_secret VARIABLE: takes it from the file that VARIABLE_FILE names, if it names one.
export_secret() {
    local variable=$1 value
    local from=${variable}_FILE
    [[ -n ${!from:-} ]] || return 0
    [[ -z ${!variable:-} ]] || fail "$variable and $from are both set; keep one"
    check_secret "$from"
    value=$(tr -d '[:space:]' <"${!from}")
    export "$variable=$value"
    unset "$from" # vLLM warns of variables that look like its own
}

# check_writable DIRECTORY VARIABLE PURPOSE
check_writable() {
    local directory=$1 variable=$2 purpose=$3
    mkdir -p "$directory" 2>/dev/null || true
    [[ -d $directory && -w $directory ]] || fail "$variable: $directory, for $purpose, cannot be" \
        "written by $(whoami_); mount a volume there that belongs to user 10001 or group 0"
}

# Docker mounts a tmpfs noexec; a library there does not load, with a message that names no cause.
check_executable() {
    local probe
    probe=$(mktemp "$1/probe.XXXXXX")
    printf '#!/bin/sh\n' >"$probe"
    chmod 700 "$probe"
    "$probe" 2>/dev/null || { rm -f "$probe" && fail "XDG_CACHE_HOME: $1 is mounted noexec, but" \
        "code compiled for this CPU is loaded from it; use a volume, or a tmpfs with exec"; }
    rm -f "$probe"
}

check_model() {
    local model=$1
    [[ $model == /* || $model == ./* || $model == ../* ]] || return 0 # a name, for the hub
    [[ -e $model ]] || fail "model $model does not exist in the container; mount it there, such as" \
        "--volume /path/on/the/host:$model:ro"
    [[ ! -d $model || -e $model/config.json ]] || fail "model $model holds no config.json that" \
        "$(whoami_) can see"
    [[ -r $model && ( ! -d $model || -r $model/config.json ) ]] ||
        fail "model $model cannot be read by $(whoami_); chmod -R go+rX it on the host"
}

serve() {
    if has_flag -h "$@" || has_flag --help "$@"; then
        exec pte-vllm serve "$@"
    fi
    if [[ $# -eq 0 || $1 == -* ]]; then
        [[ -n ${PTE_MODEL:-} ]] ||
            fail "no model: set PTE_MODEL, or give a directory or a name after serve"
        set -- "$PTE_MODEL" "$@"
    fi
    check_model "$1"
    check_writable "$XDG_CACHE_HOME" XDG_CACHE_HOME "compiled code and downloads"
    check_executable "$XDG_CACHE_HOME"
    if ! has_flag --pte-spool "$@"; then
        check_writable "$PTE_SPOOL" PTE_SPOOL "adapters pushed over HTTP"
        set -- "$@" --pte-spool "$PTE_SPOOL"
    fi
    export_secret VLLM_API_KEY
    if [[ -n ${PTE_ADMIN_KEY_FILE:-} ]]; then
        [[ -z ${PTE_ADMIN_KEY:-} ]] ||
            fail "PTE_ADMIN_KEY and PTE_ADMIN_KEY_FILE are both set; keep one"
        check_secret PTE_ADMIN_KEY_FILE
        if ! has_flag --pte-admin-key "$@" && ! has_flag --pte-admin-key-file "$@"; then
            set -- "$@" --pte-admin-key-file "$PTE_ADMIN_KEY_FILE"
        fi
    fi
    exec pte-vllm serve "$@"
}

train() {
    if [[ $# -gt 0 ]] && ! has_flag -h "$@" && ! has_flag --help "$@"; then
        check_writable "$XDG_CACHE_HOME" XDG_CACHE_HOME "downloads"
        check_writable "$PTE_RUNS" PTE_RUNS "checkpoints"
    fi
    export_secret VLLM_API_KEY
    export_secret PTE_ADMIN_KEY
    exec pte-vllm train "$@"
}

health() {
    local port=${1:-8000} status
    exec 2>/dev/null 3<>"/dev/tcp/127.0.0.1/$port" || {
        echo "nothing listens on port $port of the container"
        exit 1
    }
    printf 'GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3
    read -r _ status _ <&3 || status=nothing
    [[ $status == 200 ]] || { echo "/health answers ${status%$'\r'}" && exit 1; }
}

export_secret HF_TOKEN
command=${1:-serve}
[[ $# -eq 0 ]] || shift
case $command in
serve | train | health) "$command" "$@" ;;
*) exec pte-vllm "$command" "$@" ;;
esac
