#!/usr/bin/env bash
# Checks everything here that is not Python: Dockerfiles, shell scripts, compose files, manifests.
#
#     docker/lint.sh
#
# The tools come from pip, once, into .cache/docker-tools.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
[ -x "$python" ] || python=python3
tools=.cache/docker-tools
if ! cmp -s docker/tools.txt "$tools/installed"; then
    rm -rf "$tools"
    "$python" -m venv "$tools"
    "$tools/bin/python" -m pip --disable-pip-version-check install -qq --no-compile \
        -r docker/tools.txt
    cp docker/tools.txt "$tools/installed"
fi
PATH=$PWD/$tools/bin:$PATH

hadolint Dockerfile docker/trainer.Dockerfile
shellcheck docker/*.sh requirements/*.sh .ci/run
# Any value will do for the settings that have no default.
export PTE_MODEL=/models/model
docker-compose -f docker/compose.yaml --profile train config --quiet
docker-compose -f docker/compose.yaml -f docker/compose.cuda.yaml --profile train config --quiet
kubernetes-validate --strict --kubernetes-version 1.29 --quiet docker/kubernetes.yaml
kubernetes-validate --strict --quiet docker/kubernetes.yaml
