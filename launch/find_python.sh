#!/bin/sh
# Print the first Python 3.12 with venv: on PATH, then pyenv's and uv's, newest first. Prints nothing if there is none.
for candidate in python3.12 python3 python \
    $(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python 2>/dev/null | sort -rV) \
    $(ls -d "${XDG_DATA_HOME:-$HOME/.local/share}"/uv/python/cpython-3.12.*/bin/python3.12 2>/dev/null | sort -rV); do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
        command -v "$candidate"
        exit 0
    fi
done
