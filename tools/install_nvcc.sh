#!/bin/sh
# Installs nvcc from its Python packages into a folder, for machines without a CUDA toolkit: install_nvcc.sh PYTHON FOLDER
# Prints the folder to add to PATH.
set -eu

python=$1
folder=$2
release=13.0.88

[ -x "$folder/nvidia/cu13/bin/nvcc" ] ||
  "$python" -m pip --disable-pip-version-check install --quiet --no-deps --target "$folder" \
    "nvidia-cuda-nvcc==$release" "nvidia-cuda-crt==$release" "nvidia-nvvm==$release" \
    "nvidia-cuda-runtime==$release" "nvidia-cuda-cccl==13.0.85" >&2

# nvcc and CMake look for lib64 and for the unversioned name, which the packages leave out.
cuda=$(cd "$folder/nvidia/cu13" && pwd)
ln -sfn lib "$cuda/lib64"
ln -sf libcudart.so.13 "$cuda/lib/libcudart.so"
"$cuda/bin/nvcc" --version >/dev/null
echo "$cuda/bin"
