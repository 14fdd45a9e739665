#!/bin/sh
# Installs the Python bindings of TensorRT, not TensorRT itself, for the tests of names: install_tensorrt_bindings.sh PYTHON
# One folder a version in build/tensorrt: the oldest that is supported, the last 10.x, and the newest.
set -eu

python=$1
folder=$(cd "$(dirname "$0")/.." && pwd)/build/tensorrt

for package in tensorrt-cu12-bindings==10.12.0.36 tensorrt-cu13-bindings==10.16.1.11 tensorrt-cu13-bindings==11.4.0.106; do
  target=$folder/${package##*==}
  [ -e "$target/tensorrt_bindings/__init__.py" ] ||
    "$python" -m pip --disable-pip-version-check install --quiet --no-deps --no-compile --target "$target" "$package" >&2
done
echo "$folder"
