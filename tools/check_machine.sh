#!/bin/sh
# Says in one line what this machine lacks before anything is downloaded: check_machine.sh PYTHON

python=$1

fail() {
  echo "error: $1" >&2
  exit 1
}

command -v "$python" >/dev/null || fail "no Python 3.11 or newer found; install Python 3.11 or newer, or say make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$("$python" --version 2>&1) is too old; install Python 3.11 or newer, or say make PYTHON=/path/to/python3"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python has no venv module; install it (Debian and Ubuntu: apt-get install python3-venv)"
headers='import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
"$python" -c "$headers" || fail "$python has no headers to build against; install them (Debian and Ubuntu: apt-get install python3-dev)"

compiler=${CXX:-$(command -v c++ || command -v g++ || command -v clang++)}
[ -n "$compiler" ] || fail "no C++ compiler found; install one (Debian and Ubuntu: apt-get install g++), or set CXX"
# CXX may hold options, so it is split on purpose.
echo '#include <span>' | $compiler -std=c++20 -fsyntax-only -x c++ - 2>/dev/null ||
  fail "the C++ compiler '$compiler' does not work or has no C++20; install g++ 10 or newer, or set CXX"
