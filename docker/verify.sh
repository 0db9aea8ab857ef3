#!/usr/bin/env bash
# Builds both images and runs them as docker/compose.yaml says, on a machine without a docker engine.
#
#     docker/verify.sh [--keep] [MODEL_DIR]      as root, after `make setup`
#
# buildah builds the Dockerfiles as they are, on a Debian made by debootstrap that goes by the name
# in their FROM. runc runs the services: read-only root, user 10001, no capabilities, no network.
# MODEL_DIR defaults to SmolLM2-135M. Needs 12 GB below .cache while it runs; --keep leaves it there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'verify: %s\n' "$*" >&2
    exit 1
}

keep=
[ "${1:-}" != --keep ] || { keep=1 && shift; }
model=${1:-.cache/models/smollm2}
work=$PWD/.cache/docker-verify
base=$(sed -n 's/^ARG BASE=//p' Dockerfile)
suite=bookworm # Debian 12, which BASE names

[ "$(id -u)" = 0 ] || fail "debootstrap, buildah and runc need root here"
for tool in buildah debootstrap runc unshare ip; do
    command -v "$tool" >/dev/null ||
        fail "$tool is missing: apt-get install buildah debootstrap runc util-linux iproute2"
done
[ -x .venv/bin/pte-vllm ] || fail "run make setup first"
[ -d "$model" ] || .venv/bin/pte-vllm model fetch smollm2 "$model"
docker/lint.sh # also gets docker-compose, which says what compose.yaml means

export BUILDAH_ISOLATION=chroot
# Where overlay cannot be mounted, as in some containers: STORAGE_DRIVER=vfs, and twice the disk.
storage=(buildah --storage-driver "${STORAGE_DRIVER:-overlay}" --root "$work/storage" --runroot "$work/run")
clean() {
    [ -z "$keep" ] || return 0
    "${storage[@]}" umount --all >/dev/null 2>&1 || true
    rm -rf "$work"
}
mkdir -p "$work"
trap clean EXIT

seconds() {
    local began=$SECONDS what=$1
    shift
    "$@"
    printf 'verify: %s took %d s\n' "$what" $((SECONDS - began))
}

make_base() {
    local container
    debootstrap --variant=minbase "$suite" "$work/base" >"$work/base.log" ||
        fail "debootstrap failed, see $work/base.log"
    container=$("${storage[@]}" from scratch)
    "${storage[@]}" add -q "$container" "$work/base" / >/dev/null
    "${storage[@]}" commit -q --rm "$container" "docker.io/library/$base" >/dev/null
    rm -rf "$work/base"
}

# This machine's pip settings reach the build as the secret `pip`; what they name on its disk is
# mounted below /run/host.
python3 docker/pip_settings.py "$work/pip.conf" >"$work/mounts"
mounts=()
while read -r path; do
    mounts+=(--volume "$path:/run/host$path:ro")
done <"$work/mounts"

build() {
    "${storage[@]}" build --format docker --pull-never --secret "id=pip,src=$work/pip.conf" \
        "${mounts[@]}" --file "$2" --tag "$1" . >"$work/${1##*-}.log" 2>&1 ||
        fail "$2 does not build, see the end of $work/${1##*-}.log: $(tail -5 "$work/${1##*-}.log")"
}

"${storage[@]}" inspect --type image "$base" >/dev/null 2>&1 || seconds "the base" make_base
seconds "building the server" build pte-vllm-server Dockerfile
seconds "building the trainer" build pte-vllm-trainer docker/trainer.Dockerfile
"${storage[@]}" images --format '{{.Name}} {{.Size}}'

for image in pte-vllm-server pte-vllm-trainer; do
    "${storage[@]}" inspect --type image "$image" >"$work/$image.json"
    container=$("${storage[@]}" from --pull-never "$image")
    ln -sfn "$("${storage[@]}" mount "$container")" "$work/$image"
done
# A network of their own, with loopback alone: nothing may be fetched, no port of this machine is
# taken, and 127.0.0.1 is all that the names of services lead to.
seconds "running" unshare --net bash -c 'ip link set lo up && exec "$@"' - \
    .venv/bin/python docker/verify.py "$work" "$(realpath "$model")"
