"""The CUDA source of ``log_mel_fbank``, run on the host in both thread orders, against the definition in float64."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spkfast.frontends import FrontendSpec, frontend
from spkfast.reference.log_mel_fbank import fbank_tables, log_mel_fbank
from tests.simt.host import ORDERS, ROOT, HostLibrary, SimtError, build

_POINTERS = ("waveforms", "lengths", "window", "mel", "features", "frame_lengths", "mel_ranges")


class Params(ctypes.Structure):
    """``LogMelFbankParams``; the test of its size guards against drift."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("batch", "num_samples", "num_frames")),
        *((name, ctypes.c_int32) for name in ("frame_length", "frame_shift", "fft_size", "num_mels")),
        *((name, ctypes.c_float) for name in ("sample_scale", "preemphasis", "log_floor")),
        *((name, ctypes.c_bool) for name in ("remove_dc", "mean_norm")),
    )


def source_with_removable_barriers() -> tuple[str, int]:
    """The .cu with barrier n skipped where ``skipped_barrier == n`` and entry points added, and how many there are."""
    pieces = (ROOT / "kernels/cuda/log_mel_fbank.cu").read_text().split("__syncthreads();")
    text = pieces[0] + "".join(f"if (skipped_barrier != {n}) __syncthreads();{p}" for n, p in enumerate(pieces[1:]))
    entries = """
extern "C" {
int run(const spkfast::LogMelFbankParams* params) { return spkfast::launch_log_mel_fbank(*params, nullptr); }
size_t params_size() { return sizeof(spkfast::LogMelFbankParams); }
void skip_barrier(int number) { skipped_barrier = number; }
}
"""
    return f"static int skipped_barrier = -1;\n{text}\n{entries}", len(pieces) - 1


_SOURCE, _NUM_BARRIERS = source_with_removable_barriers()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> HostLibrary:
    return build(_SOURCE, Path(tmp_path_factory.mktemp("simt")))


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A NaN or -1 filled tensor, and the guard region around it that must stay as it is."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 128,), float("nan") if dtype.is_floating_point else -1, dtype=dtype)
    return whole[64 : 64 + size].view(shape), whole


def run(
    library: HostLibrary,
    waveforms: Tensor,
    lengths: Tensor,
    spec: FrontendSpec,
    order: str = "ascending",
    **changes: Any,
) -> tuple[Tensor, Tensor]:
    """Features (B, T, M) and frame counts (B,) of the host-built kernel; writes out of bounds fail."""
    window, mel = (table.float().contiguous() for table in fbank_tables(spec))
    batch, num_samples = waveforms.shape
    num_frames = max(0, (num_samples - spec.frame_length) // spec.frame_shift + 1)
    inner, inputs = guarded(batch, num_samples, dtype=torch.float32)
    inner.copy_(waveforms)  # Reads past the last row meet NaN.
    features, all_features = guarded(batch, num_frames, spec.n_mels, dtype=torch.float32)
    frame_lengths, all_lengths = guarded(batch, dtype=torch.int64)
    ranges = torch.full((spec.n_mels, 2), -1, dtype=torch.int32)
    tensors = (inner, lengths, window, mel, features, frame_lengths, ranges)
    fields = {
        **{name: getattr(spec, name) for name, _ in Params._fields_ if hasattr(spec, name)},
        **{name: tensor.data_ptr() for name, tensor in zip(_POINTERS, tensors, strict=True)},
        **{"batch": batch, "num_samples": num_samples, "num_frames": num_frames, "num_mels": spec.n_mels},
    }
    library.call("run", ctypes.byref(Params(**{**fields, **changes})), order=order)
    for whole in (all_features, inputs):
        assert whole[:64].isnan().all() and whole[-64:].isnan().all()
    assert (all_lengths[:64] == -1).all() and (all_lengths[-64:] == -1).all()
    return features, frame_lengths


def reference(waveforms: Tensor, lengths: Tensor, spec: FrontendSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    window, mel = (table.to(dtype) for table in fbank_tables(spec))
    names = ("frame_shift", "fft_size", "sample_scale", "preemphasis", "remove_dc", "log_floor", "mean_norm")
    return log_mel_fbank(waveforms.to(dtype), lengths, window, mel, *(getattr(spec, name) for name in names))


def speech_like(batch: int, num_samples: int) -> Tensor:
    """Noise under a tone whose level falls over the row, with an offset: bins far below the loudest one count too."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(num_samples) / 16000
    tone = 0.3 * torch.sin(2 * torch.pi * (200 + 50 * torch.arange(batch)[:, None]) * time)
    noise = torch.randn(batch, num_samples, generator=generator)
    return (tone + 0.03 * noise) * torch.logspace(0, -3, num_samples) + 0.01


_SPECS = {
    "wespeaker": frontend("wespeaker"),
    "kaldi": frontend("kaldi", n_mels=23),
    "3dspeaker": frontend("3dspeaker"),
    "48 kHz, 2048 points": frontend("kaldi", sample_rate=48000, n_mels=40),
    "8 kHz, 256 points": frontend("wespeaker", sample_rate=8000, n_mels=33),
    "no offset removal, odd hop": frontend("kaldi", remove_dc=False, preemphasis=0.0, frame_shift_ms=8.3),
    "two points": frontend("kaldi", sample_rate=1000, frame_length_ms=2.0, frame_shift_ms=2.0, n_mels=1),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", _SPECS)
def test_matches_the_definition(library: HostLibrary, name: str, order: str) -> None:
    spec = _SPECS[name]
    frame, shift = spec.frame_length, spec.frame_shift
    lengths = torch.tensor([frame + 8 * shift, 0, frame - 1, frame, frame + shift, frame + 4 * shift + 1])
    waveforms = speech_like(len(lengths), int(lengths.max()))
    features, frame_lengths = run(library, waveforms, lengths, spec, order)
    expected, expected_lengths = reference(waveforms, lengths, spec, torch.float64)
    own_error = (reference(waveforms, lengths, spec, torch.float32)[0] - expected).abs().max()
    assert torch.equal(frame_lengths, expected_lengths)
    assert frame_lengths.tolist() == [9, 0, 0, 1, 2, 5]
    assert (features[expected_lengths[:, None] <= torch.arange(features.shape[1])] == 0).all()
    assert (features - expected).abs().max() <= 4 * own_error


def test_a_row_alone_equals_the_row_in_a_batch(library: HostLibrary) -> None:
    waveforms, lengths = speech_like(3, 4000), torch.tensor([4000, 1777, 2600])
    together, _ = run(library, waveforms, lengths, _SPECS["wespeaker"])
    for row, length in enumerate(lengths.tolist()):
        alone, counts = run(library, waveforms[row : row + 1, :length], lengths[row : row + 1], _SPECS["wespeaker"])
        assert torch.equal(together[row, : counts[0]], alone[0])


def test_both_thread_orders_give_the_same_bits(library: HostLibrary) -> None:
    waveforms, lengths = speech_like(2, 3000), torch.tensor([3000, 1000])
    first, second = (run(library, waveforms, lengths, _SPECS["wespeaker"], order)[0] for order in ORDERS)
    assert torch.equal(first, second)


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_no_frames(library: HostLibrary, samples: int) -> None:
    features, frame_lengths = run(library, torch.zeros(2, samples), torch.tensor([samples, 0]), _SPECS["wespeaker"])
    assert features.shape == (2, 0, 80)
    assert frame_lengths.tolist() == [0, 0]


def test_nan_reaches_only_the_frames_that_hold_it(library: HostLibrary) -> None:
    waveforms = speech_like(1, 2000)
    waveforms[0, 900] = float("nan")
    features, _ = run(library, waveforms, torch.tensor([2000]), _SPECS["kaldi"])
    assert features[0].isnan().all(dim=1).tolist() == [160 * t <= 900 < 160 * t + 400 for t in range(11)]
    assert features[0].isnan().any(dim=1).tolist() == features[0].isnan().all(dim=1).tolist()


@pytest.mark.parametrize(
    "changes", [{"fft_size": 500}, {"fft_size": 4096}, {"fft_size": 256}, {"frame_shift": 0}], ids=str
)
def test_sizes_that_the_kernel_cannot_take(library: HostLibrary, changes: dict[str, int]) -> None:
    with pytest.raises(SimtError, match="cudaError_t 1"):
        run(library, torch.zeros(1, 400), torch.tensor([400]), _SPECS["wespeaker"], **changes)


def test_params_have_the_layout_of_the_header(library: HostLibrary) -> None:
    library.library.params_size.restype = ctypes.c_size_t
    assert library.library.params_size() == ctypes.sizeof(Params)


@pytest.mark.parametrize("barrier", range(_NUM_BARRIERS))
def test_each_barrier_is_needed(library: HostLibrary, barrier: int) -> None:
    waveforms, lengths = speech_like(1, 1000), torch.tensor([1000])
    right, _ = run(library, waveforms, lengths, _SPECS["wespeaker"])
    library.library.skip_barrier(barrier)
    try:
        results = [run(library, waveforms, lengths, _SPECS["wespeaker"], order)[0] for order in ORDERS]
    finally:
        library.library.skip_barrier(-1)
    assert not all(torch.equal(result, right) for result in results)
