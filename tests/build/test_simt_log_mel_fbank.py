"""The CUDA source of ``log_mel_fbank``, run on the host in both thread orders, against the definition in float64."""

from __future__ import annotations

import ctypes
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spkfast import frontend_tables
from spkfast.frontends import FrontendSpec, frontend
from spkfast.ops.log_mel_fbank import _cuda_limit
from spkfast.reference.log_mel_fbank import log_mel_fbank, padded_frames
from tests.simt.host import ORDERS, ROOT, HostLibrary, SimtError, build

_POINTERS = ("waveforms", "lengths", "window", "mel", "cosines", "seeds", "masks", "features", "frame_lengths")
_SIZES = ("batch", "num_samples", "num_frames", "num_masks")
_INTEGERS = (
    "frame_length", "num_mels", "num_cosines", "frame_shift", "fft_size", "first_frame", "offset", "padding",
    "waveform_norm", "preemphasis_mode", "energy", "type",
)  # fmt: skip
_FLOATS = (
    "sample_scale", "preemphasis", "spectrum_low", "spectrum_high", "energy_floor", "log_floor", "log_offset",
    "log_scale", "top_db", "var_eps", "std_eps", "dither",
)  # fmt: skip
_BOOLS = ("is_int16", "remove_dc", "magnitude", "energy_last", "mean_norm", "std_norm", "std_unbiased")
_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # FloatType


class Params(ctypes.Structure):
    """``LogMelFbankParams``; the test of its size guards against drift."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_POINTERS, "workspace")),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in _INTEGERS),
        *((name, ctypes.c_float) for name in _FLOATS),
        *((name, ctypes.c_bool) for name in _BOOLS),
    )


class Budget(ctypes.Structure):
    """``LogMelFbankBudget``."""

    _fields_ = (("shared_bytes", ctypes.c_size_t), ("tile_frames", ctypes.c_int32), ("general", ctypes.c_bool))


def source_with_removable_barriers() -> tuple[str, int]:
    """The op with barrier n skipped where ``skipped_barrier == n`` and entry points added, and how many there are."""
    names = "_plan.cuh", "_signal.cuh", "_transform.cuh", ".cu"
    whole = "".join((ROOT / f"kernels/cuda/log_mel_fbank{name}").read_text() for name in names)
    whole = re.sub(r'#pragma once\n|#include "log_mel_fbank_\w+\.cuh"\n', "", whole)
    pieces = re.split(r"(__sync(?:threads|warp)\(\);)", whole)
    text = "".join(f"if (skipped_barrier != {n // 2}) {p}" if n % 2 else p for n, p in enumerate(pieces))
    entries = """
extern "C" {
int run(const spkfast::LogMelFbankParams* params) { return spkfast::launch_log_mel_fbank(*params, nullptr); }
int workspace(const spkfast::LogMelFbankParams* params, size_t* floats) {
  return spkfast::log_mel_fbank_workspace(*params, *floats);
}
int budget(const spkfast::LogMelFbankParams* params, spkfast::LogMelFbankBudget* out) {
  return spkfast::log_mel_fbank_budget(*params, *out);
}
bool takes(int64_t fft_size, int64_t frame_shift, int64_t num_mels, int64_t num_cosines) {
  return spkfast::log_mel_fbank_takes(fft_size, frame_shift, num_mels, num_cosines);
}
size_t params_size() { return sizeof(spkfast::LogMelFbankParams); }
void skip_barrier(int number) { skipped_barrier = number; }
}
"""
    return f"static int skipped_barrier = -1;\n{text}\n{entries}", len(pieces) // 2


_SOURCE, _NUM_BARRIERS = source_with_removable_barriers()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> HostLibrary:
    library = build(_SOURCE, Path(tmp_path_factory.mktemp("simt")))
    library.library.params_size.restype = ctypes.c_size_t
    library.library.takes.argtypes = [ctypes.c_int64] * 4
    library.library.takes.restype = ctypes.c_bool
    return library


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A NaN or -1 filled tensor, and the guard region around it that must stay as it is."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 128,), float("nan") if dtype.is_floating_point else -1, dtype=dtype)
    return whole[64 : 64 + size].view(shape), whole


def params(spec: FrontendSpec, batch: int, num_samples: int, dtype: torch.dtype, /, **fields: Any) -> Params:
    """Params without pointers."""
    settings = frontend_tables.settings(spec)
    values = {name: value for name, value in settings._asdict().items() if hasattr(Params, name)}
    values |= {"batch": batch, "num_samples": num_samples, "num_frames": padded_frames(num_samples, settings)}
    values |= {"frame_length": spec.frame_length, "num_mels": spec.n_mels or spec.fft_size // 2 + 1}
    values |= {"num_cosines": spec.output_size - spec.use_energy if spec.num_ceps else 0}
    return Params(**{**values, "type": _TYPES.index(dtype), **fields})


def run(
    library: HostLibrary,
    waveforms: Tensor,
    lengths: Tensor,
    spec: FrontendSpec,
    order: str = "ascending",
    seeds: Tensor | None = None,
    masks: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: tuple[int, int] = (1, 227),
    **changes: Any,
) -> tuple[Tensor, Tensor]:
    """Features (B, T, D) and frame counts (B,) of the host-built kernel; writes out of bounds fail."""
    tables = frontend_tables.tables(spec)
    window, mel = (torch.from_numpy(table).float() for table in (tables.window, tables.mel))
    cosines = None if tables.cosines is None else torch.from_numpy(tables.cosines).float()
    inner, inputs = guarded(*waveforms.shape, dtype=waveforms.dtype)
    inner.copy_(waveforms)  # Reads past the last row meet NaN.
    size = spec.output_size
    if "mel" in changes:
        mel = changes.pop("mel")
        changes["num_mels"] = size = len(mel)
    batch, num_samples = waveforms.shape
    fields = params(spec, batch, num_samples, dtype, is_int16=waveforms.dtype == torch.int16, **changes)
    features, all_features = guarded(batch, fields.num_frames, size, dtype=dtype)
    frame_lengths, all_lengths = guarded(batch, dtype=torch.int64)
    tensors = (inner, lengths, window, mel, cosines, seeds, masks, features, frame_lengths)
    for name, tensor in zip(_POINTERS, tensors, strict=True):
        setattr(fields, name, None if tensor is None else tensor.data_ptr())
    fields.num_masks = 0 if masks is None else masks.shape[1]
    library.library.simt_set_device(*device)
    floats = ctypes.c_size_t()
    library.call("workspace", ctypes.byref(fields), ctypes.byref(floats))
    workspace, all_workspace = guarded(floats.value, dtype=torch.float32)
    fields.workspace = workspace.data_ptr()
    library.call("run", ctypes.byref(fields), order=order)
    for whole in (all_features, all_workspace):
        assert whole[:64].isnan().all() and whole[-64:].isnan().all()
    assert torch.equal(inputs[64:-64].view(waveforms.shape).nan_to_num(), waveforms.nan_to_num())
    assert (all_lengths[:64] == -1).all() and (all_lengths[-64:] == -1).all()
    return features, frame_lengths


def reference(
    waveforms: Tensor,
    lengths: Tensor,
    spec: FrontendSpec,
    dtype: torch.dtype,
    seeds: Tensor | None = None,
    masks: Tensor | None = None,
    mel: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    settings, tables = frontend_tables.settings(spec), frontend_tables.tables(spec)
    window, filters, cosines = (None if table is None else torch.from_numpy(table).to(dtype) for table in tables)
    assert window is not None and filters is not None
    filters = filters if mel is None else mel.to(dtype)
    if waveforms.dtype != torch.int16:
        waveforms = waveforms.to(dtype)
    numbers = settings.integers, settings.floats
    return log_mel_fbank(waveforms, lengths, window, filters, cosines, seeds, masks, *numbers, dtype, False)


def speech_like(batch: int, num_samples: int) -> Tensor:
    """Noise under a tone whose level falls over the row, with an offset: bins far below the loudest one count too."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(num_samples) / 16000
    tone = 0.3 * torch.sin(2 * torch.pi * (200 + 50 * torch.arange(batch)[:, None]) * time)
    noise = torch.randn(batch, num_samples, generator=generator)
    return (tone + 0.03 * noise) * torch.logspace(0, -3, num_samples) + 0.01


_PRESETS = (
    "kaldi", "wespeaker", "3dspeaker", "speechbrain", "taoruijie", "clova_l", "clova_v2", "vgg", "thin", "redimnet",
    "redimnet2", "titanet", "mfcc",
)  # fmt: skip
_WESPEAKER = frontend("wespeaker")
_SPECS = {
    **{name: frontend(name) for name in _PRESETS},
    "raw energy first": frontend("kaldi", use_energy=True, n_mels=23),
    "raw energy of the pre-emphasised signal": frontend("titanet", use_energy=True, remove_dc=True),
    "windowed energy last": frontend("kaldi", use_energy=True, raw_energy=False, htk_compat=True, energy_floor=1.0),
    "cepstra with energy": frontend("mfcc", use_energy=True, mean_norm=True),
    "cepstra, zeroth last": frontend("mfcc", htk_compat=True, num_ceps=23),
    "frames at the middle of hops": frontend("wespeaker", snip_edges=False),
    "magnitude": frontend("kaldi", power=1.0),
    "variance, no mean": frontend("wespeaker", mean_norm=False, std_norm=True, std_unbiased=True),
    "decibels, floor, variance": frontend("speechbrain", std_norm=True, top_db=30.0),
    "floor alone": frontend("speechbrain", mean_norm=False, top_db=30.0),
    "waveform variance": frontend("redimnet2", waveform_norm="instance", n_mels=0),
    "no logarithm": frontend("wespeaker", log="none", spectrum_clip=(1e3, 1e7)),
    "full-band filters": frontend("wespeaker", n_mels=2, f_min=0.0),
    "48 kHz, 2048 points": frontend("kaldi", sample_rate=48000, n_mels=40),
    "22.05 kHz, 1024 points, normalised": frontend("wespeaker", sample_rate=22050, std_norm=True),
    "8 kHz, 256 points": frontend("wespeaker", sample_rate=8000, n_mels=33),
    "11.025 kHz, 270 points": frontend("kaldi", sample_rate=11025, n_fft=270, frame_length_ms=24.3, n_mels=20,
                                       round_to_power_of_two=False, use_energy=True, raw_energy=False),
    "a frame as long as the transform": frontend("kaldi", frame_length_ms=32.0),
    "odd hop, no offset removal": frontend("kaldi", remove_dc=False, preemphasis=0.0, frame_shift_ms=8.3125),
    "hop longer than the frame": frontend("kaldi", frame_shift_ms=30.0),
    "two points": frontend("kaldi", sample_rate=1000, frame_length_ms=2.0, frame_shift_ms=2.0, n_mels=1),
    "six points": frontend("kaldi", sample_rate=1000, frame_length_ms=6.0, frame_shift_ms=2.0, n_mels=0,
                           round_to_power_of_two=False, remove_dc=False),
}  # fmt: skip


def ragged(spec: FrontendSpec) -> Tensor:
    """Lengths of which the first gives two tiles, the others fewer frames, down to none."""
    frame, shift = spec.frame_length, spec.frame_shift
    return torch.tensor([frame + 34 * shift + 1, 0, 1, 2, frame - 1, frame, frame + shift, frame + 4 * shift + 1])


def assert_close(features: Tensor, expected: Tensor, plain: Tensor) -> None:
    """The rule of ``tests/parity.py``."""
    rounding = torch.finfo(torch.float32).eps * expected.abs().max()
    assert (features - expected).abs().max() <= 4 * torch.maximum((plain - expected).abs().max(), rounding)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", _SPECS)
def test_matches_the_definition(library: HostLibrary, name: str, order: str) -> None:
    spec = _SPECS[name]
    lengths = ragged(spec)
    waveforms = speech_like(len(lengths), int(lengths.max()) + 3)
    waveforms[torch.arange(waveforms.shape[1]) >= lengths[:, None]] = float("nan")
    features, frame_lengths = run(library, waveforms, lengths, spec, order)
    expected, expected_lengths = reference(waveforms, lengths, spec, torch.float64)
    assert torch.equal(frame_lengths, expected_lengths)
    assert (features[expected_lengths[:, None] <= torch.arange(features.shape[1])] == 0).all()
    assert_close(features, expected, reference(waveforms, lengths, spec, torch.float32)[0])


@pytest.mark.parametrize("name", ["wespeaker", "speechbrain", "titanet", "8 kHz, 256 points", "48 kHz, 2048 points"])
def test_a_row_alone_equals_the_row_in_a_batch(library: HostLibrary, name: str) -> None:
    spec = _SPECS[name]
    lengths = ragged(spec)
    waveforms = speech_like(len(lengths), int(lengths.max()))
    together, counts = run(library, waveforms, lengths, spec)
    for row, length in enumerate(lengths.tolist()):
        # With a processor for each tile, tiles are smaller.
        alone, count = run(library, waveforms[row : row + 1, :length], lengths[row : row + 1], spec, device=(99, 227))
        assert torch.equal(together[row, : counts[row]], alone[0, : count[0]])


def test_both_thread_orders_give_the_same_bits(library: HostLibrary) -> None:
    waveforms, lengths = speech_like(2, 3000), torch.tensor([3000, 1000])
    first, second = (run(library, waveforms, lengths, _SPECS["titanet"], order)[0] for order in ORDERS)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["wespeaker", "speechbrain", "titanet", "raw energy first"])
def test_noise_and_masks(library: HostLibrary, name: str) -> None:
    spec = FrontendSpec.from_dict({**_SPECS[name].to_dict(), "dither": 0.1 * _SPECS[name].sample_scale / 1000})
    lengths = ragged(spec)
    waveforms = speech_like(len(lengths), int(lengths.max()))
    extra: dict[str, Any] = {
        "seeds": torch.arange(len(lengths)) * 0x123456789ABCDEF - 7,
        "masks": torch.tensor([[2, 5, 0, 1000], [0, 1000, 3, 9], [4, 4, 0, 9]]).repeat(len(lengths), 1, 1),
    }
    features, _ = run(library, waveforms, lengths, spec, **extra)
    expected, _ = reference(waveforms, lengths, spec, torch.float64, **extra)
    assert_close(features, expected, reference(waveforms, lengths, spec, torch.float32, **extra)[0])
    assert (features[0, 2:5] == 0).all() and (features[0, :, 3:9] == 0).all()
    without, _ = run(library, waveforms, lengths, spec, masks=extra["masks"])
    assert not torch.equal(features, without)


@pytest.mark.parametrize("name", ["kaldi", "titanet", "two points"])
def test_int16(library: HostLibrary, name: str) -> None:
    lengths = ragged(_SPECS[name])
    waveforms = (speech_like(len(lengths), int(lengths.max()) + 1) * 32768).to(torch.int16)
    features, _ = run(library, waveforms, lengths, _SPECS[name])
    assert torch.equal(features, run(library, waveforms.float() / 32768, lengths, _SPECS[name])[0])


@pytest.mark.parametrize("dtype", _TYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["kaldi", "wespeaker", "titanet"])
def test_half_precision_is_rounded_once(library: HostLibrary, name: str, dtype: torch.dtype) -> None:
    lengths = ragged(_SPECS[name])
    waveforms = speech_like(len(lengths), int(lengths.max()))
    waveforms[1] *= 1e-6  # small features, and subnormal ones
    masks = torch.tensor([1, 3, 0, 5]).repeat(len(lengths), 1, 1)
    features, _ = run(library, waveforms, lengths, _SPECS[name], masks=masks, dtype=dtype)
    assert torch.equal(features, run(library, waveforms, lengths, _SPECS[name], masks=masks)[0].to(dtype))


@pytest.mark.parametrize("samples", [4001, 4002, 4003])
def test_rows_at_any_alignment(library: HostLibrary, samples: int) -> None:
    waveforms = speech_like(1, samples).repeat(4, 1)
    for rows in (waveforms, (waveforms * 32768).to(torch.int16)):
        features, _ = run(library, rows, torch.full((4,), samples), _WESPEAKER)
        assert all(torch.equal(features[0], row) for row in features[1:])


@pytest.mark.parametrize("kind", ["dense", "scattered", "one row", "rows without weights"])
@pytest.mark.parametrize("name", ["kaldi", "six points"])
def test_any_filters(library: HostLibrary, name: str, kind: str) -> None:
    spec = _SPECS[name]
    generator = torch.Generator().manual_seed(1)
    bins = spec.fft_size // 2 + 1
    mel = torch.rand(1 if kind == "one row" else 70, bins, generator=generator, dtype=torch.float64)
    if kind == "scattered":
        mel *= torch.rand(mel.shape, generator=generator) < 0.02
    elif kind == "rows without weights":
        mel[::2] = 0
    lengths = torch.tensor([spec.frame_length + 3 * spec.frame_shift])
    waveforms = speech_like(1, int(lengths))
    whole, _ = guarded(mel.numel() + 1, dtype=torch.float32)
    for shift in (0, 1):  # aligned for wide loads, and not
        mine = whole[shift : shift + mel.numel()].view(mel.shape).copy_(mel)
        features, _ = run(library, waveforms, lengths, spec, mel=mine)
        expected, plain = (reference(waveforms, lengths, spec, t, mel=mel)[0] for t in (torch.float64, torch.float32))
        assert_close(features, expected, plain)


@pytest.mark.parametrize("samples", [0, 1, 399])
@pytest.mark.parametrize("name", ["wespeaker", "redimnet2", "titanet"])
def test_hardly_any_samples(library: HostLibrary, name: str, samples: int) -> None:
    waveforms, lengths = speech_like(2, samples), torch.tensor([samples, 0])
    features, frame_lengths = run(library, waveforms, lengths, _SPECS[name])
    expected, expected_lengths = reference(waveforms, lengths, _SPECS[name], torch.float64)
    assert features.shape == expected.shape and torch.equal(frame_lengths, expected_lengths)
    if features.numel():
        assert_close(features, expected, reference(waveforms, lengths, _SPECS[name], torch.float32)[0])


def test_lengths_outside_the_row_read_nothing_there(library: HostLibrary) -> None:
    waveforms = speech_like(2, 2000)
    features, frame_lengths = run(library, waveforms, torch.tensor([-5, 10**12]), _SPECS["kaldi"])
    assert frame_lengths.tolist() == [0, 11]
    assert (features[0] == 0).all() and features[1].isfinite().all()


@pytest.mark.parametrize("name", ["kaldi", "raw energy first", "a frame as long as the transform", "thin"])
def test_nan_reaches_only_the_frames_that_hold_it(library: HostLibrary, name: str) -> None:
    spec = _SPECS[name] if name != "thin" else frontend("thin", mean_norm=False, std_norm=False)
    waveforms = speech_like(1, 2000)
    waveforms[0, 960 - 1] = float("nan")  # the last before a frame
    features, _ = run(library, waveforms, torch.tensor([2000]), spec)
    expected, _ = reference(waveforms, torch.tensor([2000]), spec, torch.float64)
    assert torch.equal(features.isnan(), expected.isnan()) and expected.isnan().any() and not expected.isnan().all()


@pytest.mark.parametrize("name", ["wespeaker", "speechbrain", "titanet", "floor alone"])
def test_nan_reaches_all_that_it_is_normalised_with(library: HostLibrary, name: str) -> None:
    waveforms, lengths = speech_like(2, 2000), torch.tensor([2000, 2000])
    waveforms[0, 900] = float("nan")
    features, _ = run(library, waveforms, lengths, _SPECS[name])
    expected, frame_lengths = reference(waveforms, lengths, _SPECS[name], torch.float64)
    frames = int(frame_lengths[0])
    assert torch.equal(features.isnan()[:, :frames], expected.isnan()[:, :frames])
    assert features[0, :frames].isnan().any() and (features[:, frames:] == 0).all()


@pytest.mark.parametrize(
    "changes",
    [{"fft_size": 1022}, {"fft_size": 511}, {"fft_size": 4096}, {"fft_size": 256}, {"frame_shift": 0},
     {"frame_shift": 513}, {"num_mels": 0}, {"num_mels": 1026}, {"num_samples": 2**30 + 1}],
    ids=str,
)  # fmt: skip
def test_sizes_that_the_kernel_cannot_take(library: HostLibrary, changes: dict[str, Any]) -> None:
    with pytest.raises(SimtError, match="cudaError_t 1"):
        run(library, torch.zeros(1, 400), torch.tensor([400]), _WESPEAKER, **changes)


@pytest.mark.parametrize("fft_size", [2, 4, 6, 10, 30, 54, 250, 360, 480, 768, 1000, 1250, 1458, 2048])
def test_any_fft_size(library: HostLibrary, fft_size: int) -> None:
    fields = {"n_fft": fft_size, "frame_length_ms": min(fft_size, 1200) / 16, "frame_shift_ms": min(fft_size, 160) / 16}
    spec = frontend("kaldi", **fields, round_to_power_of_two=False, n_mels=0, remove_dc=False)
    assert library.library.takes(fft_size, spec.frame_shift, fft_size // 2 + 1, 0)
    lengths = torch.tensor([spec.frame_length + 5 * spec.frame_shift])
    waveforms = speech_like(1, int(lengths))
    features, _ = run(library, waveforms, lengths, spec)
    expected, plain = (reference(waveforms, lengths, spec, t)[0] for t in (torch.float64, torch.float32))
    assert_close(features, expected, plain)


def budget(library: HostLibrary, spec: FrontendSpec, device: tuple[int, int], **fields: Any) -> Budget:
    out = Budget()
    library.library.simt_set_device(*device)
    library.call("budget", ctypes.byref(params(spec, 256, 48000, torch.float32, **fields)), ctypes.byref(out))
    return out


def test_shared_memory_lets_two_blocks_run_at_once_on_an_h200(library: HostLibrary) -> None:
    for name in _PRESETS:
        found = budget(library, frontend(name), (132, 227))
        assert not found.general and found.tile_frames == 32
        assert 2 * (found.shared_bytes + 1024) <= 228 * 1024
    assert budget(library, _WESPEAKER, (132, 99)).shared_bytes <= 99 * 1024


@pytest.mark.parametrize("use_energy", [False, True])
def test_every_size_fits_the_shared_memory_of_the_least_gpu(library: HostLibrary, use_energy: bool) -> None:
    spec = frontend("kaldi", n_fft=2048, frame_length_ms=128.0, frame_shift_ms=128.0, use_energy=use_energy)
    found = budget(library, spec, (132, 99), num_mels=1025, num_cosines=1025, cosines=1)
    assert found.general and found.shared_bytes <= 99 * 1024


@pytest.mark.parametrize("name", ["kaldi", "wespeaker", "titanet", "thin", "speechbrain"])
def test_bytes_moved(library: HostLibrary, name: str) -> None:
    """Samples of each tile once and features once: what the second kernel reads and writes again stays in the cache."""
    spec = frontend(name)
    batch, num_samples = 256, 48000
    found, fields = budget(library, spec, (132, 227)), params(spec, batch, num_samples, torch.float32)
    floats = ctypes.c_size_t()
    library.call("workspace", ctypes.byref(fields), ctypes.byref(floats))
    tiles = math.ceil(fields.num_frames / found.tile_frames)
    halo = (tiles - 1) * (spec.frame_length - spec.frame_shift)
    features = batch * fields.num_frames * spec.output_size
    least = batch * num_samples + features
    assert least + batch * halo + floats.value <= 1.3 * least


def test_a_gpu_with_little_shared_memory(library: HostLibrary) -> None:
    spec = frontend("wespeaker", n_mels=128)
    assert budget(library, spec, (1, 99)).general and not budget(library, spec, (1, 227)).general
    lengths = ragged(spec)
    waveforms = speech_like(len(lengths), int(lengths.max()))
    features, _ = run(library, waveforms, lengths, spec, device=(1, 99))
    expected, plain = (reference(waveforms, lengths, spec, t)[0] for t in (torch.float64, torch.float32))
    assert_close(features, expected, plain)


def test_params_have_the_layout_of_the_header(library: HostLibrary) -> None:
    assert library.library.params_size() == ctypes.sizeof(Params)


_BARRIER_SPECS = (
    FrontendSpec.from_dict({**_SPECS["cepstra with energy"].to_dict(), "power": 1.0, "std_norm": True, "dither": 1.0}),
    frontend("speechbrain", waveform_norm="instance", n_mels=70, use_energy=True, raw_energy=False),
    _SPECS["22.05 kHz, 1024 points, normalised"],
)


@pytest.mark.parametrize("barrier", range(_NUM_BARRIERS))
def test_each_barrier_is_needed(library: HostLibrary, barrier: int) -> None:
    def results(order: str) -> list[Tensor]:
        seeds = torch.tensor([5])
        rows = [(spec, speech_like(1, spec.frame_length + 40 * spec.frame_shift)) for spec in _BARRIER_SPECS]
        return [run(library, x, torch.tensor([x.shape[1]]), spec, order, seeds)[0] for spec, x in rows]

    right = results("ascending")
    library.library.skip_barrier(barrier)
    try:
        same = [torch.equal(a, b) for order in ORDERS for a, b in zip(right, results(order), strict=True)]
    except SimtError:
        return  # found by the shim
    finally:
        library.library.skip_barrier(-1)
    assert not all(same)


def test_rule_of_sizes_is_that_of_the_public_function(library: HostLibrary) -> None:
    settings = frontend_tables.settings(frontend("wespeaker"))
    for size in range(2, 2200):
        for shift in (1, size, size + 1):
            for rows in (1, 1025, 1026):
                reason = _cuda_limit(settings._replace(fft_size=size, frame_shift=shift), rows)
                assert library.library.takes(size, shift, rows, 0) == (not reason), (size, shift, rows)
