"""The SIMT shim catches planted bugs: without this, a passing host run of a kernel would prove little."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from tests.simt.host import ORDERS, HostLibrary, SimtError, build

_SOURCE = """
#include "common/reduce.cuh"

__global__ void sum_kernel(const float* in, float* out) { *out = spkfast::block_sum(in[threadIdx.x], out + 1); }

// Can leave out the barrier that the readers need.
__global__ void neighbour_kernel(const float* in, float* out, int skip) {
  SPKFAST_DYNAMIC_SHARED(float, shared);
  const int i = threadIdx.x, n = blockDim.x;
  shared[i] = in[i];
  if (!skip) __syncthreads();
  out[i] = shared[(i + 1) % n];
}

__global__ void unwritten_kernel(float* out) {
  SPKFAST_DYNAMIC_SHARED(float, shared);
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void overrun_kernel(float*) {
  SPKFAST_DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x] = 1;
}

__global__ void divergent_kernel(float* out) {
  if (threadIdx.x < 5) __syncthreads();
  else __syncthreads();
  *out = 0;
}

__global__ void exited_thread_kernel(float* out) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  *out = 0;
}

__global__ void exited_lane_kernel(float* out) {
  if (threadIdx.x == 7) return;
  *out = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void outside_mask_kernel(float* out) {
  if (threadIdx.x < 16) *out = __shfl_down_sync(0xffffu, 1.0f, 8);
}

__global__ void absent_lane_kernel(float* out) {
  if (threadIdx.x < 16) *out = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  else __syncthreads();
}

__global__ void collectives_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x;
  // Halves of the warp with masks of their own, then a lane whose value changes between collectives.
  unsigned value = lane;
  const unsigned mask = lane < 16 ? 0xffffu : 0xffff0000u;
  for (int i = 0; i < 3; ++i) value = __shfl_sync(mask, value, (lane & 16) + (lane + 1) % 16) + 1;
  __syncwarp();
  out[lane] = value + 1000 * __shfl_up_sync(0xffffffffu, lane, 1);
  out[32 + lane] = __ballot_sync(0xffffffffu, lane % 3 == 0);
}

#define ENTRY(name, block, shared, ...)                                 \\
  SPKFAST_LAUNCH(name##_kernel, 1, block, shared, nullptr, __VA_ARGS__); \\
  return cudaGetLastError()

extern "C" {
int sum(const float* in, float* out, int block) { ENTRY(sum, block, 0, in, out); }
int neighbour(const float* in, float* out, int skip) { ENTRY(neighbour, 64, 256, in, out, skip); }
int unwritten(float* out) { ENTRY(unwritten, 32, 128, out); }
int overrun(float* out) { ENTRY(overrun, 33, 128, out); }
int divergent(float* out) { ENTRY(divergent, 32, 0, out); }
int exited_thread(float* out) { ENTRY(exited_thread, 32, 0, out); }
int exited_lane(float* out) { ENTRY(exited_lane, 32, 0, out); }
int outside_mask(float* out) { ENTRY(outside_mask, 32, 0, out); }
int absent_lane(float* out) { ENTRY(absent_lane, 32, 0, out); }
int collectives(unsigned* out) { ENTRY(collectives, 32, 0, out); }
int too_large(float* out) { ENTRY(unwritten, 1025, 0, out); }
int too_much_shared(float* out) { ENTRY(unwritten, 32, 49 * 1024, out); }
}
"""


def line_of(text: str) -> int:
    lines = [number for number, line in enumerate(_SOURCE.split("\n"), 1) if text in line]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> HostLibrary:
    return build(_SOURCE, Path(tmp_path_factory.mktemp("simt")))


def floats(count: int) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * count)(*range(count))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", [32, 256, 1024])
def test_block_sum(library: HostLibrary, order: str, block: int) -> None:
    out = floats(33)
    library.call("sum", floats(block), out, block, order=order)
    assert out[0] == block * (block - 1) / 2


@pytest.mark.parametrize("order", ORDERS)
def test_collectives(library: HostLibrary, order: str) -> None:
    out = (ctypes.c_uint * 64)()
    library.call("collectives", out, order=order)
    for lane in range(32):
        rotated = (lane & 16) + (lane + 3) % 16 + 3
        assert out[lane] == rotated + 1000 * max(lane - 1, 0)
        assert out[32 + lane] == sum(1 << k for k in range(0, 32, 3))


def test_missing_barrier_gives_a_wrong_result_in_one_of_the_orders(library: HostLibrary) -> None:
    expected = [float((i + 1) % 64) for i in range(64)]
    right = {}
    for skip in (False, True):
        for order in ORDERS:
            out = floats(64)
            library.call("neighbour", floats(64), out, int(skip), order=order)
            right[skip, order] = list(out) == expected
    assert all(right[False, order] for order in ORDERS)
    assert not all(right[True, order] for order in ORDERS)


def test_unwritten_shared_memory_is_nan(library: HostLibrary) -> None:
    out = floats(32)
    library.call("unwritten", out)
    assert all(value != value for value in out)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("bug", "words", "at"),
    [
        ("overrun", "past the 128 bytes of dynamic shared memory", None),
        ("divergent", "barrier in divergent code", "if (threadIdx.x < 5) __syncthreads();"),
        ("exited_thread", "thread 7 has exited", None),
        ("exited_lane", "lane 7 is in the mask but has exited", None),
        ("outside_mask", "which is not in the mask", "__shfl_down_sync(0xffffu, 1.0f, 8)"),
        ("absent_lane", "waits for lanes of its mask that do not arrive", "16) *out = __shfl_xor_sync"),
        ("too_large", "cudaError_t 9", None),
        ("too_much_shared", "cudaError_t 1", None),
    ],
)
def test_misuse_is_an_error_that_names_the_line(
    library: HostLibrary, bug: str, words: str, at: str | None, order: str
) -> None:
    out = floats(1100)
    with pytest.raises(SimtError, match=words) as error:
        library.call(bug, out, order=order)
    if at:
        assert f".cpp:{line_of(at)}" in str(error.value)
    library.call("sum", floats(32), floats(33), 32, order=order)  # The shim is usable after an error.
