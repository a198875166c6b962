#!/bin/sh
# Set up an environment for this checkout: install.sh PYTHON FOLDER
#
# Uses uv, which takes seconds where pip takes minutes: one on the PATH, else one that is installed
# into a small environment of its own (FOLDER-uv). Our packages come last, in a command of their own,
# so that the `fairchem` script is ours and not fairchem-core's.
set -eu

python=$1
venv=$2
here=$(dirname "$0")

if uv --version >/dev/null 2>&1; then
    uv=uv
else
    uv=$venv-uv/bin/uv
    if ! "$uv" --version >/dev/null 2>&1; then
        "$python" -m venv "$venv-uv"
        "$venv-uv/bin/python" -m pip install --quiet uv
    fi
fi

# uv does not read pip's configuration: hand on what it says about where packages come from.
setting() { # setting VARIABLE KEY
    eval "value=\${$1:-}"
    for section in global install; do
        [ -n "$value" ] || value=$("$python" -m pip config get "$section.$2" 2>/dev/null || true)
    done
    echo "$value"
}
find_links=$(setting PIP_FIND_LINKS find-links)
index=$(setting PIP_INDEX_URL index-url)
extra=$(setting PIP_EXTRA_INDEX_URL extra-index-url)
cert=$(setting PIP_CERT cert)
if [ -n "$cert" ] && [ -z "${SSL_CERT_FILE:-}" ]; then
    export SSL_CERT_FILE="$cert"
fi
set -- --python "$venv/bin/python" --compile-bytecode
for url in $find_links; do set -- "$@" --find-links "$url"; done
[ -z "$index" ] || set -- "$@" --index-url "$index"
for url in $extra; do set -- "$@" --extra-index-url "$url"; done
# As pip does: the best version of all indexes, not the first index that has one.
[ -z "$extra" ] || set -- "$@" --index-strategy unsafe-best-match

install() {
    "$uv" pip install "$@"
}
dependencies() {
    install "$@" --override "$here/overrides.txt" -r "$here/../setup.cfg" \
        --extra collisions --extra plots --extra test --extra docs --extra dev
}

"$uv" venv --quiet --allow-existing --python "$python" "$venv"
if [ -z "$find_links$index$extra" ] && [ -z "${UV_TORCH_BACKEND:-}" ] && [ "$(uname)" = Linux ]; then
    # The build of torch that fits this machine's GPU driver, or the much smaller one for CPUs; where
    # PyTorch's own index cannot be reached, the one on PyPI.
    dependencies "$@" --torch-backend auto || dependencies "$@"
else
    dependencies "$@"
fi
install "$@" --no-deps --reinstall "$here/../compat" --editable "$here/.."
