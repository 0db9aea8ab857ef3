#!/usr/bin/env bash
# Install a lock and this checkout into .venv; does nothing where both are already there.
#
#     requirements/install.sh [LOCK]          (or: make setup)
#
# PYTHON names the interpreter. pip reads its indexes from the user's own settings; where they have
# no torch for CPUs, it comes from PyTorch's index (requirements/torch_wheel.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock=${1:-requirements/cpu.lock}
venv=.venv
stamp=$venv/.pte-setup

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

[ -f "$lock" ] || fail "there is no $lock"
key=$({ echo "$PWD"; cat "$lock" pyproject.toml requirements/install.sh; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && [ -x "$venv/bin/pte-vllm" ]; then
    exit 0
fi

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
python=
for candidate in "${PYTHON:-python3.11}" python3.11 python3; do
    if fits "$candidate"; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || fail "Python 3.11 is needed; ${PYTHON:-python3.11} and python3 are older or absent." \
    "Install it (Debian and Ubuntu: apt install python3.11 python3.11-venv) or run: make setup PYTHON=/path/to/python3.11"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$version" = 3.11 ] || echo "setup: the locks are made for Python 3.11; trying with $version" >&2

if ! fits "$venv/bin/python"; then
    echo "==> creating $venv with Python $version"
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "cannot create $venv (Debian and Ubuntu: apt install python3.11-venv)"
fi
rm -f "$stamp"
install() { "$venv/bin/python" -m pip --disable-pip-version-check install -qq --no-compile --no-deps "$@"; }

echo "==> installing torch"
"$venv/bin/python" requirements/torch_wheel.py "$lock" -q --no-compile || exit 1
echo "==> installing $(grep -c '^[^#]' "$lock") packages of $lock (1 to 3 minutes)"
install -r "$lock" || fail "pip cannot install $lock (see above)"
# Once and on all cores. Python does not write byte code where PYTHONDONTWRITEBYTECODE is set, as in
# many containers; then each process of a server would compile vLLM and torch anew, which takes longer
# than all else at its start. Some packages hold templates that are no Python; compileall reports them.
echo "==> compiling what was installed (1 minute)"
"$venv/bin/python" -W ignore -m compileall -qq -j 0 -x '/tests?/' "$venv"/lib/python*/site-packages || true
echo "==> installing this checkout"
install --no-build-isolation -e . || fail "pip cannot install this checkout (see above)"
echo "$key" >"$stamp"
echo "==> ready: $venv/bin/pte-vllm"
