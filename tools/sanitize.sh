#!/usr/bin/env bash
# Builds the libraries with AddressSanitizer and UBSan beside the installed ones, and runs tests.fuzz with them.
# Usage: tools/sanitize.sh PYTHON [argument of tests.fuzz]...
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
build=$PWD/build/sanitize
compiler=${CXX:-g++}

# A program that is not sanitized itself, as python is, needs the run-time library before any other; and that needs
# the C++ one, whose exceptions it watches.
preload=
for library in libasan.so libstdc++.so; do
  path=$($compiler -print-file-name=$library)
  if [ ! -e "$path" ]; then
    echo "error: $compiler has no $library: make sanitize needs g++, or CXX=... that names one" >&2
    exit 1
  fi
  preload="$preload $path"
done

mkdir -p "$build/spkfast"
PATH=$(dirname "$(realpath -s "$python")"):$PATH
generator=
! command -v ninja >/dev/null || generator=Ninja
cmake -S . -B "$build/cmake" ${generator:+-G $generator} -DCMAKE_CXX_COMPILER="$compiler" \
  -DPython_EXECUTABLE="$(realpath -s "$python")" -DSPKFAST_OUTPUT="$build/spkfast" -DSPKFAST_CUDA=off \
  -DSPKFAST_SANITIZE=ON >"$build/log" || { cat "$build/log" >&2; exit 1; }
cmake --build "$build/cmake" --parallel >"$build/log" || { cat "$build/log" >&2; exit 1; }

# The package as it is, but for the libraries.
find "$build/spkfast" -maxdepth 1 -type l -delete
for entry in spkfast/*; do
  case $entry in
    *.so | */__pycache__) ;;
    *) ln -s "$PWD/$entry" "$build/spkfast/" ;;
  esac
done

# Python frees little before it ends. Memory is kept and stacks of allocations are short because that is a fifth faster.
# New memory starts as NaN: what nobody wrote shows.
ASAN_OPTIONS=max_malloc_fill_size=1000000000:malloc_fill_byte=255:detect_leaks=0:abort_on_error=1:allocator_release_to_os_interval_ms=-1:malloc_context_size=8
export ASAN_OPTIONS UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1
# One thread a process, so that two of them have a core each.
export LD_PRELOAD=$preload OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONPATH=$build:$PWD
exec "$python" -P -m tests.fuzz --sanitized "$@"
