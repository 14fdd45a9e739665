"""log_mel_fbank: parity of each backend, an independent oracle, gradients, registration, awkward input, messages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spkfast
from spkfast import FrontendSpec, backends, frontend_tables, ops, reference
from spkfast.reference.log_mel_fbank import gaussian_noise
from tests.parity import assert_parity

Backend = backends.Backend

WESPEAKER = spkfast.frontend("wespeaker")
PRESETS = {
    name: spkfast.frontend(name)
    for name in (
        "kaldi", "wespeaker", "3dspeaker", "speechbrain", "taoruijie", "clova_l", "clova_v2", "vgg", "thin", "redimnet",
        "redimnet2", "titanet", "mfcc",
    )
}  # fmt: skip
# One of each kind of normalisation and padding.
FEW = ("wespeaker", "speechbrain", "redimnet2", "titanet")
# What no preset asks for.
OTHERS = {
    "8k": spkfast.frontend("kaldi", sample_rate=8000, n_mels=40, window="hann"),
    "bare": spkfast.frontend("kaldi", preemphasis=0.0, remove_dc=False, window="rectangular", n_mels=23),
    "long frames": spkfast.frontend("wespeaker", frame_length_ms=50.0, frame_shift_ms=12.5, n_mels=128),
    "gaps": spkfast.frontend("3dspeaker", frame_length_ms=5.0, frame_shift_ms=7.5, n_mels=20, f_min=0.0),
    "400 points": spkfast.frontend("kaldi", round_to_power_of_two=False),
    "odd points": spkfast.frontend("kaldi", n_fft=405, round_to_power_of_two=False, window="blackman"),
    "prime points": spkfast.frontend("taoruijie", n_fft=409, round_to_power_of_two=False),
    "energy": spkfast.frontend("wespeaker", use_energy=True, energy_floor=1.0),
    "energy last": spkfast.frontend("kaldi", use_energy=True, raw_energy=False, htk_compat=True),
    "cepstra": spkfast.frontend("mfcc", num_ceps=20, n_mels=30, use_energy=True, raw_energy=False, mean_norm=True),
    "centred frames": spkfast.frontend("kaldi", snip_edges=False),
    "padded frames": spkfast.frontend("speechbrain", center=False, pad_samples=333, pad_mode="reflect"),
    "whole frames": spkfast.frontend("speechbrain", pad_mode="none", top_db=20.0, std_norm=True, std_eps=0.1),
    "instance": spkfast.frontend("titanet", waveform_norm="instance", drop_last_frame=False, pad_frames_to=3),
    "magnitude": spkfast.frontend("redimnet2", power=1.0, spectrum_clip=(0.5, 20.0), log="db", waveform_norm="none"),
    "linear": spkfast.frontend("clova_v2", log="none", std_unbiased=True),
    "noise": spkfast.frontend("taoruijie", dither=0.1),
}
SPECS = {**PRESETS, **OTHERS}
# Nothing that needs the whole utterance.
LOCAL: dict[str, Any] = {"mean_norm": False, "std_norm": False, "top_db": None, "waveform_norm": "none"}
# 26 samples a frame, 9 a shift: small enough for numerical differentiation.
TINY = spkfast.frontend("kaldi", sample_rate=1000, frame_length_ms=26.0, frame_shift_ms=9.0, n_mels=5, sample_scale=1.0)
# Around the first sample, the padding, the first and the second frame of several front-ends.
EDGES = [1000, 560, 559, 512, 401, 400, 399, 257, 256, 200, 81, 80, 3, 2, 1, 0]


def replace(spec: FrontendSpec, **fields: Any) -> FrontendSpec:
    return FrontendSpec.from_dict({**spec.to_dict(), **fields})


def voice(batch: int, samples: int, seed: int = 0) -> Tensor:
    """Harmonics under a slow envelope with some noise, float64 (B, S), within [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(samples, dtype=torch.float64) / 16000
    f0 = 90 + 120 * torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    x = torch.zeros(batch, samples, dtype=torch.float64)
    for k in range(1, 20):
        x += torch.sin(2 * math.pi * f0 * k * t + k * k) / k
    x = 0.1 * x * (1 + torch.sin(2 * math.pi * 3 * t))
    return (x + 0.01 * torch.randn(batch, samples, generator=generator, dtype=torch.float64)).clamp(-1, 1)


@pytest.fixture
def interpreted(backend: Backend, device: torch.device) -> bool:
    """Whether this is Triton without a GPU, which takes a third of a second for each row: few of them, then."""
    return backend == "triton" and device.type == "cpu"


def skip_unless(name: str, *names: str) -> None:
    if name not in names:
        pytest.skip("a few front-ends are enough for Triton interpreted")


def seeds_for(spec: FrontendSpec, batch: int, device: torch.device) -> Tensor | None:
    return torch.arange(batch, device=device) * 7919 - 3 if spec.dither else None


def arguments(spec: FrontendSpec, waveforms: Tensor, lengths: Tensor, **options: Any) -> list[Any]:
    """Arguments of the op below the public function."""
    dtype = waveforms.dtype if waveforms.is_floating_point() else torch.float32
    window, mel, cosines = (
        None if table is None else torch.from_numpy(table).to(waveforms.device, dtype)
        for table in frontend_tables.tables(spec)
    )
    settings = frontend_tables.settings(spec)
    seeds, masks = options.get("seeds"), options.get("masks")
    return [waveforms, lengths, window, mel, cosines, seeds, masks, settings.integers, settings.floats, dtype, True]


# Parity


@pytest.mark.parametrize("name", SPECS)
def test_matches_reference(backend: Backend, device: torch.device, interpreted: bool, name: str) -> None:
    if interpreted:
        skip_unless(
            name, *PRESETS, "energy last", "cepstra", "odd points", "whole frames", "instance", "magnitude", "noise"
        )
    samples, lengths = (1000, [777]) if interpreted else (2000, [2000, 1333])
    batch, spec = len(lengths), SPECS[name]
    options: dict[str, Any] = {"spec": spec, "seeds": seeds_for(spec, batch, device)}
    inputs = (voice(batch, samples).to(device), torch.tensor(lengths, device=device))
    assert_parity(ops.log_mel_fbank, inputs, backend=backend, **options)


@pytest.mark.parametrize("name", SPECS)
def test_matches_reference_at_edge_lengths(
    backend: Backend, device: torch.device, interpreted: bool, name: str
) -> None:
    if interpreted:
        skip_unless(name, "taoruijie", "titanet", "centred frames", "padded frames")
    edges = [257, 2, 0] if interpreted else EDGES
    # Without the normalisation, which divides by whatever deviation two frames happen to have.
    spec = replace(SPECS[name], **LOCAL)
    options: dict[str, Any] = {"spec": spec, "seeds": seeds_for(spec, len(edges), device)}
    inputs = (voice(len(edges), edges[0]).to(device), torch.tensor(edges, device=device))
    assert_parity(ops.log_mel_fbank, inputs, backend=backend, **options)


@pytest.mark.parametrize("samples", [0, 1, 399, 400])
def test_matches_reference_on_short_rows(
    backend: Backend, device: torch.device, interpreted: bool, samples: int
) -> None:
    lengths = torch.tensor([samples, samples // 2, 0], device=device)
    for preset in FEW[:1] if interpreted else PRESETS:
        spec = replace(PRESETS[preset], mean_norm=False, std_norm=False)
        assert_parity(ops.log_mel_fbank, (voice(3, samples).to(device), lengths), backend=backend, spec=spec)


def test_matches_reference_on_random_batches(backend: Backend, device: torch.device, interpreted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    longest = 2000 if interpreted else 20000
    for seed, name in enumerate(FEW[:1] if interpreted else PRESETS):
        lengths = (longest ** torch.rand(4, generator=generator)).long().clamp_min(1)
        lengths[0] = longest
        spec = replace(SPECS[name], mean_norm=False, std_norm=False)
        inputs = (voice(4, longest, seed).to(device), lengths.to(device))
        assert_parity(ops.log_mel_fbank, inputs, backend=backend, spec=spec)


def test_matches_reference_at_30_seconds() -> None:
    lengths = torch.tensor([480000, 1, 123457])
    assert_parity(ops.log_mel_fbank, (voice(3, 480000), lengths), backend="native", spec=WESPEAKER)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
def test_every_cpu_level_matches_reference(monkeypatch: pytest.MonkeyPatch, level: str, preset: str) -> None:
    levels = ["scalar", "avx2", "avx512", "avx512bf16"]
    has = spkfast.info()["cpu"]["level"]
    if levels.index(has) < levels.index(level):
        pytest.skip(f"this CPU has {has}")
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)
    lengths = torch.tensor([4000, 1333, 700])
    assert_parity(ops.log_mel_fbank, (voice(3, 4000), lengths), backend="native", spec=PRESETS[preset])


@pytest.mark.parametrize("preset", PRESETS)
def test_matches_reference_on_extreme_signals(
    backend: Backend, device: torch.device, interpreted: bool, preset: str
) -> None:
    if interpreted:
        skip_unless(preset, "wespeaker", "speechbrain")
    x = torch.zeros(6, 1600, dtype=torch.float64)
    x[1] = torch.where(torch.arange(1600) % 80 < 40, 1.0, -1.0)  # full scale
    x[2, 700] = 1
    x[3] = voice(1, 1600) * 2.0**-15
    x[4] = voice(1, 1600) * 1e-38  # denormal in float32
    x[5] = 0.25
    lengths = torch.full((6,), 1600, device=device)
    # In float32 the values are these very ones.
    inputs = (x.float().to(device), lengths)
    assert_parity(ops.log_mel_fbank, inputs, backend=backend, by_row=True, spec=PRESETS[preset])


@pytest.mark.parametrize("content", ["silence", "dc", "denormal"])
def test_signals_without_energy_give_the_floor(backend: Backend, device: torch.device, content: str) -> None:
    value = {"silence": 0.0, "dc": 0.25, "denormal": 1e-40}[content]
    x = torch.full((1, 1600), value, device=device)
    features, _ = ops.log_mel_fbank(x, spec=spkfast.frontend("3dspeaker", mean_norm=False), backend=backend)
    torch.testing.assert_close(features, torch.full_like(features, math.log(2**-23)), atol=1e-5, rtol=0)


def test_sums_that_overflow_are_no_bad_samples(backend: Backend, device: torch.device) -> None:
    x = torch.full((1, 800), 3e38, device=device)
    features, _ = ops.log_mel_fbank(x, spec=spkfast.frontend("3dspeaker"), backend=backend)
    assert features.shape == (1, 3, 80)


# Batches


@pytest.mark.parametrize("preset", PRESETS)
def test_batches_without_rows(backend: Backend, device: torch.device, preset: str) -> None:
    spec = PRESETS[preset]
    want, _ = ops.log_mel_fbank(torch.zeros(1, 800, device=device), spec=spec, backend="reference")
    features, frame_lengths = ops.log_mel_fbank(torch.zeros(0, 800, device=device), spec=spec, backend=backend)
    assert features.shape == (0, *want.shape[1:]) and frame_lengths.shape == (0,)


@pytest.mark.parametrize("name", SPECS)
def test_row_alone_equals_row_in_batch(backend: Backend, device: torch.device, interpreted: bool, name: str) -> None:
    if interpreted:
        skip_unless(name, "wespeaker", "redimnet2")
    spec = SPECS[name]
    lengths = [1000, 401] if interpreted else [5000, 2563, 1333, 401, 400, 200, 2, 1, 0]
    batch = len(lengths)
    x, seeds = voice(batch, lengths[0]).float().to(device), seeds_for(spec, batch, device)
    # Of any sign: the padding of neither must see it.
    for row, length in enumerate(lengths):
        x[row, length:] = 1e3 * (-1) ** row
    features, frame_lengths = ops.log_mel_fbank(
        x, torch.tensor(lengths, device=device), spec=spec, seeds=seeds, backend=backend
    )
    for row, length in enumerate(lengths):
        seed = None if seeds is None else seeds[row : row + 1]
        alone, frames = ops.log_mel_fbank(x[row : row + 1, :length], spec=spec, seeds=seed, backend=backend)
        count = int(frames)
        assert count == frame_lengths[row]
        assert torch.equal(alone[0, :count], features[row, :count])
        assert (features[row, count:] == 0).all() and (alone[0, count:] == 0).all()


def test_one_frame_less_its_mean_is_zero(backend: Backend, device: torch.device, interpreted: bool) -> None:
    for name in ("titanet",) if interpreted else ("wespeaker", "clova_v2", "thin", "titanet"):
        samples = 512 if name == "thin" else 400 if name == "wespeaker" else 159 if name == "clova_v2" else 319
        features, frames = ops.log_mel_fbank(voice(1, samples).float().to(device), spec=PRESETS[name], backend=backend)
        assert frames.item() == 1 and (features == 0).all()


def test_threads_change_nothing() -> None:
    lengths = torch.tensor([48000, 30000, 20000, 100])
    x, threads = voice(4, 48000).float(), torch.get_num_threads()
    try:
        for spec in SPECS.values():
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                seeds = seeds_for(spec, 4, x.device)
                found.append(ops.log_mel_fbank(x, lengths, spec=spec, seeds=seeds, backend="native")[0])
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]), spec
    finally:
        torch.set_num_threads(threads)


def test_non_contiguous_input(backend: Backend, device: torch.device) -> None:
    x = voice(2, 1000).float().to(device)
    lengths = torch.tensor([[1000, 0], [900, 0]], device=device)[:, 0]
    masks = torch.tensor([[[1, 2, 3, 9]], [[0, 2, 0, 4]]], device=device)
    spec, seeds = replace(WESPEAKER, dither=1.0), torch.tensor([5, 6], device=device)
    want = ops.log_mel_fbank(x, lengths.contiguous(), spec=spec, seeds=seeds, masks=masks, backend=backend)
    got = ops.log_mel_fbank(
        x.T.contiguous().T,
        lengths,
        spec=spec,
        seeds=seeds.repeat_interleave(2)[::2],
        masks=masks.transpose(0, 2).contiguous().transpose(0, 2),
        backend=backend,
    )
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("preset", FEW)
def test_samples_past_the_end_do_not_count(
    backend: Backend, device: torch.device, interpreted: bool, preset: str
) -> None:
    if interpreted:
        skip_unless(preset, "redimnet2")
    x = voice(2, 2000).float().to(device)
    lengths = torch.tensor([2000, 1111], device=device)
    dirty = x.clone()
    dirty[1, 1111:] = math.nan
    found = []
    for waveforms in (x, dirty):
        waveforms.requires_grad_()
        features, _ = ops.log_mel_fbank(waveforms, lengths, spec=PRESETS[preset], backend=backend)
        found.append((features.detach(), *torch.autograd.grad(features.square().sum(), waveforms)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert (found[0][1][1, 1111:] == 0).all()


@pytest.mark.parametrize("name", SPECS)
def test_int16_is_divided_by_32768(backend: Backend, device: torch.device, interpreted: bool, name: str) -> None:
    if interpreted:
        skip_unless(name, "redimnet2")
    samples = (voice(2, 1000) * 32000).round().to(torch.int16)
    samples[0, 100], samples[0, 101] = -32768, 32767
    lengths = torch.tensor([1000, 777], device=device)
    kwargs: dict[str, Any] = {"spec": SPECS[name], "seeds": seeds_for(SPECS[name], 2, device), "backend": backend}
    got, _ = ops.log_mel_fbank(samples.to(device), lengths, **kwargs)
    want, _ = ops.log_mel_fbank(samples.to(device).float() / 32768, lengths, **kwargs)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_are_rounded_last(
    backend: Backend, device: torch.device, interpreted: bool, dtype: torch.dtype
) -> None:
    x, lengths = voice(1, 1000).float().to(device), torch.tensor([777], device=device)
    for preset in ("titanet",) if interpreted else PRESETS:
        want, _ = ops.log_mel_fbank(x, lengths, spec=PRESETS[preset], backend=backend)
        got, _ = ops.log_mel_fbank(x, lengths, spec=PRESETS[preset], backend=backend, dtype=dtype)
        assert got.dtype == dtype
        if interpreted and dtype == torch.bfloat16:
            # Triton's interpreter cuts bits off where a GPU rounds.
            torch.testing.assert_close(got, want.to(dtype), rtol=2**-7, atol=0)
        else:
            assert torch.equal(got, want.to(dtype))


def test_frames_are_padded_to_a_multiple(backend: Backend, device: torch.device) -> None:
    for samples, frames, padded in ((160 * 16, 16, 16), (160 * 17 - 1, 16, 16), (160 * 17, 17, 32), (1, 0, 0)):
        x = voice(1, samples).float().to(device)
        features, count = ops.log_mel_fbank(x, spec=PRESETS["titanet"], backend=backend)
        assert features.shape[1] == padded and count.item() == frames
        assert (features[0, frames:] == 0).all() and (features[0, :frames] != 0).all()


def test_top_db_is_the_floor_of_each_utterance(backend: Backend, device: torch.device) -> None:
    x = voice(2, 3000).float().to(device)
    x[0] *= 100  # nothing of this utterance may reach the other
    x[:, 1000:2000] = 0
    lengths = torch.tensor([3000, 2000], device=device)
    spec = replace(PRESETS["speechbrain"], mean_norm=False, top_db=30.0)
    features, frames = ops.log_mel_fbank(x, lengths, spec=spec, backend=backend)
    plain, _ = ops.log_mel_fbank(x, lengths, spec=replace(spec, top_db=None), backend=backend)
    for row, count in enumerate(frames.tolist()):
        floor = plain[row, :count].max() - 30
        assert (plain[row, :count] < floor).any()
        torch.testing.assert_close(features[row, :count], plain[row, :count].clamp_min(floor), rtol=0, atol=0)


def test_masks_are_zeros(backend: Backend, device: torch.device) -> None:
    masks = torch.tensor(
        [
            # inside; past every edge; empty; turned round
            [[1, 4, 10, 20], [8, 999, 70, 999], [-5, 1, -9, 3], [3, 3, 0, 80], [6, 2, 30, 10]],
            [[0, 2**62, 5, 6], [-(2**62), 2, 40, 2**62], [2, 3, 0, 80], [0, 0, 0, 0], [5, 6, 79, 80]],
        ],
        device=device,
    )
    x, lengths = voice(2, 2000).float().to(device), torch.tensor([2000, 1333], device=device)
    plain, _ = ops.log_mel_fbank(x, lengths, spec=WESPEAKER, backend=backend)
    features, _ = ops.log_mel_fbank(x, lengths, spec=WESPEAKER, masks=masks, backend=backend)
    want = plain.cpu().numpy().copy()
    for row in range(2):
        for first_t, last_t, first_k, last_k in masks[row].tolist():
            want[row, max(first_t, 0) : max(last_t, 0), max(first_k, 0) : max(last_k, 0)] = 0
    assert (want == 0).sum() > (plain == 0).sum()
    np.testing.assert_array_equal(features.cpu().numpy(), want)
    none, _ = ops.log_mel_fbank(x, lengths, spec=WESPEAKER, masks=masks[:, :0], backend=backend)
    assert torch.equal(none, plain)


def test_no_gradient_comes_through_masks(backend: Backend, device: torch.device) -> None:
    masks = torch.tensor([[[0, 99, 0, 99]], [[0, 0, 0, 0]]], device=device)
    inputs = (voice(2, 1000).to(device), torch.tensor([1000, 900], device=device))
    assert_parity(ops.log_mel_fbank, inputs, backend=backend, spec=WESPEAKER, masks=masks)
    x = inputs[0].float().requires_grad_()
    ops.log_mel_fbank(x, spec=WESPEAKER, masks=masks, backend=backend)[0].square().sum().backward()
    assert x.grad is not None and (x.grad[0] == 0).all() and (x.grad[1] != 0).any()


# Noise


def philox(n: int, seed: int) -> tuple[int, int]:
    """Philox2x32-10 in whole numbers, counter (n, upper half of the seed) and key (lower half)."""
    seed %= 2**64
    low, high, key = n, seed >> 32, seed % 2**32
    for _ in range(10):
        product = 0xD256D193 * low
        low, high = product >> 32 ^ key ^ high, product % 2**32
        key = (key + 0x9E3779B9) % 2**32
    return low, high


def test_philox_gives_the_published_numbers() -> None:
    # Known answers of the Random123 library, kat_vectors, philox2x32 10.
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E)
    assert philox(0, 0) == (0xFF1DAE59, 0x6CD10DF2)
    assert philox(ones, ones << 32 | ones) == (0x2C3F628B, 0xAB4FD7AD)
    assert philox(pi[0], pi[1] << 32 | pi[2]) == (0xDD7CE038, 0xF62A4C12)


def test_noise_is_that_of_its_definition() -> None:
    seeds = [0, 1, -1, 2**32 - 1, 2**32, -(2**63), 2**63 - 1, 0x85A308D313198A2E - 2**64]
    noise = gaussian_noise(torch.tensor(seeds), 20, torch.float64)
    for row, seed in enumerate(seeds):
        for n in range(20):
            low, high = philox(n, seed)
            radius = math.sqrt(-2 * math.log(((low >> 9) + 0.5) / 2**23))
            want = radius * math.cos(2 * math.pi * (high >> 8) / 2**24)
            assert noise[row, n].item() == pytest.approx(want, abs=1e-12)


def test_noise_is_normal() -> None:
    noise = gaussian_noise(torch.tensor([11, 12]), 100000, torch.float64)
    assert noise.mean(dim=1).abs().max() < 0.015 and (noise.var(dim=1) - 1).abs().max() < 0.02
    assert ((noise.abs() < 1).double().mean(dim=1) - 0.6827).abs().max() < 0.006
    assert ((noise.pow(4)).mean(dim=1) - 3).abs().max() < 0.15
    pair = torch.cat([noise, noise[:, 1:], noise[:1].flip(1)[:, :-1]][:1])
    assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.015
    assert abs(torch.corrcoef(torch.stack([noise[0, 1:], noise[0, :-1]]))[0, 1].item()) < 0.015


@pytest.mark.parametrize("preset", FEW)
def test_noise_follows_from_the_seed_alone(
    backend: Backend, device: torch.device, interpreted: bool, preset: str
) -> None:
    if interpreted:
        skip_unless(preset, "redimnet2")
    spec = replace(PRESETS[preset], dither=0.01 * PRESETS[preset].sample_scale)
    seeds = torch.tensor([1, -(2**40), 1], device=device)
    x = voice(1, 1000).expand(3, -1).float().to(device)
    lengths = torch.tensor([1000, 1000, 1000], device=device)
    features, _ = ops.log_mel_fbank(x, lengths, spec=spec, seeds=seeds, backend=backend)
    plain, _ = ops.log_mel_fbank(x[:1], spec=spec, backend=backend)
    assert torch.equal(features[0], features[2])
    assert (features[0] - features[1]).abs().max() > 0.1 and (features[0] - plain[0]).abs().max() > 0.1
    # Seeds without dither are no noise, nor is dither without seeds.
    unused, _ = ops.log_mel_fbank(x[:1], spec=replace(spec, dither=0.0), seeds=seeds[:1], backend=backend)
    assert torch.equal(unused, plain)
    options: dict[str, Any] = {"spec": spec, "seeds": seeds[1:2]}
    assert_parity(ops.log_mel_fbank, (x[:1].double(), lengths[:1]), backend=backend, **options)


def test_autocast_changes_nothing(device: torch.device) -> None:
    x = voice(1, 2000).float().to(device)
    names: tuple[Backend, ...] = ("auto", "reference")
    for backend in names:
        found = []
        for enabled in (False, True):
            waveforms = x.clone().requires_grad_()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
                features, _ = ops.log_mel_fbank(waveforms, spec=WESPEAKER, backend=backend)
            found += [features, *torch.autograd.grad(features.square().sum(), waveforms)]
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


# Independent oracle; the recorded numbers of other toolkits are in tests/test_frontends.py


def kaldi_native_fbank(spec: FrontendSpec, samples: np.ndarray) -> Tensor:
    knf = pytest.importorskip("kaldi_native_fbank", reason="kaldi-native-fbank is not installed")
    options = knf.FbankOptions()
    frame, mel = options.frame_opts, options.mel_opts
    frame.dither, frame.samp_freq, frame.window_type = 0.0, spec.sample_rate, spec.window.replace("hann", "hanning")
    frame.frame_length_ms, frame.frame_shift_ms = spec.frame_length_ms, spec.frame_shift_ms
    frame.preemph_coeff, frame.remove_dc_offset = spec.preemphasis, spec.remove_dc
    frame.snip_edges, frame.round_to_power_of_two = spec.snip_edges, spec.round_to_power_of_two
    mel.num_bins, mel.low_freq, mel.high_freq = spec.n_mels, spec.f_min, spec.f_max
    options.use_energy, options.raw_energy, options.htk_compat = spec.use_energy, spec.raw_energy, spec.htk_compat
    fbank = knf.OnlineFbank(options)
    fbank.accept_waveform(spec.sample_rate, (samples * spec.sample_scale).tolist())
    fbank.input_finished()
    return torch.from_numpy(np.stack([fbank.get_frame(k) for k in range(fbank.num_frames_ready)]))


@pytest.mark.parametrize(
    "name", ["wespeaker", "kaldi", "3dspeaker", "8k", "bare", "400 points", "energy last", "centred frames"]
)
def test_definition_matches_kaldi_native_fbank(name: str) -> None:
    spec = replace(SPECS[name], mean_norm=False)
    x = voice(1, 16000).float()
    names: tuple[Backend, ...] = ("reference", "auto")
    for implementation in names:
        features, _ = ops.log_mel_fbank(x, spec=spec, backend=implementation)
        want = kaldi_native_fbank(spec, x[0].numpy())
        torch.testing.assert_close(features[0], want, atol=3e-4, rtol=0)


def test_real_speech_matches_kaldi_native_fbank(speech: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    path = sorted(speech.rglob("*.flac"))[0]
    samples, rate = soundfile.read(path, dtype="float32")
    spec = spkfast.frontend("wespeaker", mean_norm=False, sample_rate=rate)
    features, _ = ops.log_mel_fbank(torch.from_numpy(samples)[None], spec=spec)
    want = kaldi_native_fbank(spec, samples)
    loud = want.mean(dim=1) > math.log(1e3)  # in silent frames both are rounding noise
    assert loud.sum() > 50
    torch.testing.assert_close(features[0][loud], want[loud], atol=3e-4, rtol=0)


# Gradients


class Formula(torch.autograd.Function):
    """The definition with the gradient that the backends use, so that gradcheck looks at that."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.args = args
        return reference.log_mel_fbank(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (torch.ops.spkfast.log_mel_fbank_backward(grads[0], *ctx.args), *[None] * 10)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mean_norm": True, "sample_scale": 3.0},
        {"remove_dc": False, "preemphasis": 0.0, "round_to_power_of_two": False},
        {"n_fft": 27, "round_to_power_of_two": False, "mean_norm": True},
        {"preemphasis_mode": "signal", "remove_dc": False, "center": True},
        {"preemphasis_mode": "signal_zero", "center": True, "pad_mode": "constant", "drop_last_frame": True},
        {"snip_edges": False, "pad_frames_to": 4},
        {"pad_samples": 50, "preemphasis_mode": "signal"},
        {"mean_norm": True, "std_norm": True, "var_eps": 1e-3},
        {"std_norm": True, "std_unbiased": True, "std_eps": 1e-2},
        {"power": 1.0, "n_mels": 0, "log": "none", "mean_norm": True, "std_norm": True, "var_eps": 1e-3},
        {"waveform_norm": "mean_std", "log_offset": 0.1},
        {"waveform_norm": "instance", "log": "db"},
        {"num_ceps": 4, "use_energy": True, "mean_norm": True},
        {"num_ceps": 4, "use_energy": True, "raw_energy": False, "htk_compat": True},
        {"spectrum_clip": (0.5, 3.0), "log_floor": 0.0},
        {"top_db": 1.0, "mean_norm": True},
        {"dither": 0.5, "preemphasis_mode": "signal", "center": True},
    ],
    ids=str,
)
def test_gradient_formula(fields: dict[str, Any]) -> None:
    spec = replace(TINY, **fields)
    x = torch.randn(3, 44, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    seeds = torch.tensor([3, 4, 5]) if spec.dither else None
    masks = torch.tensor([[[1, 2, 1, 3]]] * 3) if spec.std_norm else None
    args = arguments(spec, x.detach(), torch.tensor([44, 35, 28]), seeds=seeds, masks=masks)
    assert torch.autograd.gradcheck(lambda x: Formula.apply(x, *args[1:])[0], (x,))


@pytest.mark.parametrize("preset", ["wespeaker", "mfcc"])
def test_gradient_below_the_floor_is_zero(backend: Backend, device: torch.device, preset: str) -> None:
    x = torch.zeros(1, 800, device=device, requires_grad=True)
    features, _ = ops.log_mel_fbank(x, spec=PRESETS[preset], backend=backend)
    features.square().sum().backward()
    assert x.grad is not None and (x.grad == 0).all()


def test_gradient_of_a_magnitude_of_zero_is_zero(backend: Backend, device: torch.device) -> None:
    x = torch.zeros(1, 1000, device=device, requires_grad=True)
    ops.log_mel_fbank(x, spec=PRESETS["thin"], backend=backend)[0].sum().backward()
    assert x.grad is not None and (x.grad == 0).all()


def test_gradient_has_the_type_of_the_waveforms(backend: Backend, device: torch.device) -> None:
    x = voice(1, 1000).float().to(device).requires_grad_()
    features, _ = ops.log_mel_fbank(x, spec=WESPEAKER, dtype=torch.bfloat16, backend=backend)
    (gradient,) = torch.autograd.grad(features.float().square().sum(), x)
    want, _ = ops.log_mel_fbank(x, spec=WESPEAKER, backend="reference")
    (expected,) = torch.autograd.grad(want.square().sum(), x)
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 0.01 * expected.norm()


def test_second_derivative_is_refused(backend: Backend, device: torch.device) -> None:
    x = voice(1, 400).float().to(device).requires_grad_()
    features, _ = ops.log_mel_fbank(x, spec=PRESETS["kaldi"], backend=backend)
    (gradient,) = torch.autograd.grad(features.square().sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="no second derivative here: use backend='reference'"):
        gradient.sum().backward()


# Registration


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_ceps": 3, "use_energy": True, "dither": 1.0, "pad_frames_to": 4, "center": True, "std_norm": True}],
    ids=str,
)
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(
    backend: Backend, device: torch.device, interpreted: bool, transposed: bool, fields: dict[str, Any]
) -> None:
    if interpreted and not (transposed and fields):
        pytest.skip("one of the four is enough for Triton interpreted")
    x = voice(2, 60).float().to(device)
    x = x.T.contiguous().T if transposed else x
    lengths = torch.tensor([60, 40], device=device)
    op = torch.ops.spkfast.log_mel_fbank if backend == "native" else torch.ops.spkfast.log_mel_fbank_triton
    spec = replace(TINY, **fields)
    seeds = torch.tensor([1, 2], device=device) if fields else None
    masks = torch.tensor([[[0, 1, 0, 2]]] * 2, device=device) if fields else None
    args = arguments(spec, x, lengths, seeds=seeds, masks=masks)
    torch.library.opcheck(op, tuple(args))
    torch.library.opcheck(op, (x.detach().requires_grad_(), *args[1:]))
    grad = torch.randn_like(op(*args)[0])
    torch.library.opcheck(torch.ops.spkfast.log_mel_fbank_backward, (grad, *args))


def test_schemas_repeat_the_definition() -> None:
    from spkfast.ops._registration import gradient_of

    definitions: dict[str, Any] = {
        "log_mel_fbank": reference.log_mel_fbank,
        "log_mel_fbank_triton": reference.log_mel_fbank,
        "log_mel_fbank_backward": gradient_of(reference.log_mel_fbank),
    }
    for name, definition in definitions.items():
        schema = torch._C._get_schema(f"spkfast::{name}", "")
        inferred = torch._C.parse_schema(
            name + torch.library.infer_schema(definition, mutates_args=()).replace("SymInt", "int")
        )
        have = [(a.name, str(a.type)) for a in schema.arguments]
        # What Triton's schema calls SymInt is an integer here.
        have = [(argument, kind.replace("SymInt", "int")) for argument, kind in have]
        assert have == [(a.name, str(a.type)) for a in inferred.arguments]
        assert [str(r.type) for r in schema.returns] == [str(r.type) for r in inferred.returns]


class Layer(nn.Module):
    """The op as a part of a model."""

    def __init__(self, spec: FrontendSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return ops.log_mel_fbank(waveforms, lengths, spec=self.spec)


def test_compiles_whole() -> None:
    layer = Layer(replace(PRESETS["titanet"], dither=0.0))
    x, lengths = voice(2, 4000).float(), torch.tensor([4000, 3000])
    found = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        waveforms = x.clone().requires_grad_()
        features, frames = function(waveforms, lengths)
        found.append((features.detach(), frames, *torch.autograd.grad(features.square().sum(), waveforms)))
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("preset", FEW)
def test_exports_whole(preset: str) -> None:
    layer = Layer(PRESETS[preset])
    batch, samples = torch.export.Dim("batch"), torch.export.Dim("samples", min=560)
    x, lengths = voice(2, 4000).float(), torch.tensor([4000, 3000])
    program = torch.export.export(layer, (x, lengths), dynamic_shapes=({0: batch, 1: samples}, {0: batch}))
    x, lengths = voice(3, 5123).float(), torch.tensor([5123, 5000, 399])
    for have, want in zip(program.module()(x, lengths), layer(x, lengths), strict=True):
        assert torch.equal(have, want)


# Bad samples


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", SPECS)
def test_bad_samples_are_named(value: float, name: str) -> None:
    # In and between frames, at both ends, and where no frame reaches.
    for sample in (0, 77, 799, 850, 899):
        x = torch.zeros(3, 1000)
        x[1, sample] = value
        for backend in ("native", "reference"):
            message = f"waveforms row 1 holds a NaN or infinite value at sample {sample}: mend or drop that audio"
            bad(x, [1000, 900, 1000], spec=SPECS[name], backend=backend, match=message)


def test_the_first_bad_row_is_named() -> None:
    x = voice(4, 40000).float()
    x[1, 39999], x[2, 5], x[3, 0] = math.nan, math.inf, math.nan
    bad(x, match="waveforms row 1 holds a NaN or infinite value at sample 39999")


@pytest.mark.parametrize("name", SPECS)
def test_bad_samples_spoil_their_row_alone(
    backend: Backend, device: torch.device, interpreted: bool, name: str
) -> None:
    if interpreted:
        skip_unless(name, "kaldi", "titanet")
    spec = SPECS[name]
    lengths = torch.tensor([3400, 2900, 3400], device=device)
    kwargs: dict[str, Any] = {"spec": spec, "seeds": seeds_for(spec, 3, device), "backend": backend, "validate": False}
    x = voice(3, 3400).float().to(device)
    clean, frames = ops.log_mel_fbank(x, lengths, **kwargs)
    x[1, 1960] = math.nan
    features, _ = ops.log_mel_fbank(x, lengths, **kwargs)
    count = int(frames[1])
    assert torch.equal(features[[0, 2]], clean[[0, 2]])
    assert (features[1, count:] == 0).all()
    spoilt = features[1, :count].isnan()
    if spec.mean_norm or spec.std_norm or spec.top_db is not None or spec.waveform_norm != "none":
        assert spoilt.all()
    else:
        assert spoilt.any(dim=1).sum() in range(1, 5)
        assert torch.equal(features[1, :count][~spoilt], clean[1, :count][~spoilt])


def test_a_bad_sample_spoils_all_under_top_db(backend: Backend, device: torch.device, interpreted: bool) -> None:
    x = voice(2, 2000 if interpreted else 16000).float().to(device)
    x[0, 1000] = math.nan
    spec = replace(PRESETS["speechbrain"], mean_norm=False)
    features, _ = ops.log_mel_fbank(x, spec=spec, backend=backend, validate=False)
    assert features[0].isnan().all() and features[1].isfinite().all()


def test_bad_samples_leave_padding_frames_zero_in_the_definition() -> None:
    x = torch.full((1, 1000), math.nan)
    features, frames = ops.log_mel_fbank(x, spec=PRESETS["titanet"], backend="reference", validate=False)
    assert frames.item() == 6 and features[0, :6].isnan().all() and (features[0, 6:] == 0).all()


# Messages


def bad(waveforms: Any, lengths: list[int] | Tensor | None = None, match: str = "", **options: Any) -> None:
    if isinstance(lengths, list):
        lengths = torch.tensor(lengths)
    with pytest.raises(spkfast.InputError, match=match):
        ops.log_mel_fbank(waveforms, lengths, **{"spec": WESPEAKER, **options})


def test_error_messages() -> None:
    x = torch.zeros(2, 800)
    bad(x.numpy(), match="waveforms must be a torch tensor, got ndarray")
    bad(x[0], match=r"waveforms must have shape \(B, S\), got \(800,\)")
    bad(x.half(), match="waveforms must be float32, float64 or int16, got torch.float16")
    bad(x, torch.ones(2), match="lengths must be int64 counts of samples, got torch.float32")
    bad(x, [800], match=r"lengths must have shape \(B,\) = \(2,\), got \(1,\)")
    bad(x, [800, 801], match=r"lengths must lie in 0\.\.800, row 1 has 801")
    bad(x, [-1, 800], match=r"lengths must lie in 0\.\.800, row 0 has -1")
    bad(
        x,
        torch.ones(2, dtype=torch.int64, device="meta"),
        match="lengths must be on cpu, where waveforms are, got meta",
    )
    bad(x, seeds=torch.ones(2), match="seeds must be int64, got torch.float32")
    bad(x, seeds=torch.ones(3, dtype=torch.int64), match=r"seeds must have shape \(B,\) = \(2,\), got \(3,\)")
    bad(x, seeds=7, match="seeds must be a torch tensor, got int")
    bad(x, masks=torch.ones(2, 1, 4), match="masks must be int64 frames and bins, got torch.float32")
    masks = torch.ones(1, 1, 4, dtype=torch.int64)
    bad(x, masks=masks, match=r"masks must have shape \(B, N, 4\) with B = 2, got \(1, 1, 4\)")
    bad(x, masks=masks[0], match=r"masks must have shape \(B, N, 4\) with B = 2, got \(1, 4\)")
    bad(x, backend="fast", match="backend must be one of auto, reference, native, triton, got 'fast'")
    bad(x.double(), backend="native", match="cannot run log_mel_fbank on cpu: it computes in float32")


def test_kernel_checks_its_arguments() -> None:
    masks, seeds = torch.zeros(2, 1, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    spec = spkfast.frontend("mfcc")
    args = arguments(spec, torch.zeros(2, 800), torch.tensor([800, 800]), seeds=seeds, masks=masks)
    integers, floats = args[7], args[8]
    wrong: list[tuple[int, Any, str]] = [
        (0, torch.zeros(2, 800, dtype=torch.float64), "waveforms must be Float or Short, got Double"),
        (1, torch.tensor([800, 801]), r"lengths must lie in 0\.\.800, row 1 has 801"),
        (1, torch.tensor([800]), r"lengths must have shape \(2\), got \(1\)"),
        (2, torch.zeros(600), "window must have 1 to fft_size = 512 samples, got 600"),
        (3, torch.zeros(23, 256), r"mel must have shape \(any, 257\), got \(23, 256\)"),
        (4, torch.zeros(13, 22), r"cosines must have shape \(any, 23\), got \(13, 22\)"),
        (5, seeds[:1], r"seeds must have shape \(2\), got \(1\)"),
        (6, masks[..., :3], r"masks must have shape \(2, any, 4\), got \(2, 1, 3\)"),
        (7, integers[:-1], "integers must have 15 values, got 14"),
        (7, [0, *integers[1:]], "frame_shift must be positive, got 0"),
        (7, [integers[0], 400, *integers[2:]], r"mel must have shape \(any, 201\), got \(23, 257\)"),
        (7, [*integers[:5], 0, *integers[6:]], "frame_multiple must be positive, got 0"),
        (8, [*floats, 0.0], "floats must have 12 values, got 13"),
    ]
    for position, value, message in wrong:
        with pytest.raises(ValueError, match=message):
            torch.ops.spkfast.log_mel_fbank(*args[:position], value, *args[position + 1 :])


def test_tracing_a_new_front_end_leaves_later_calls_alone() -> None:
    # A front-end that no other test has, so that its tables are made while it is traced.
    spec = spkfast.frontend("kaldi", n_mels=37)
    x = voice(1, 2000).float()
    program = torch.export.export(spkfast.nn.Fbank(spec).eval(), (x,))
    features, _ = ops.log_mel_fbank(x, spec=spec)
    assert type(features) is Tensor and torch.equal(program.module()(x)[0], features)


def test_names_of_presets_are_no_specs() -> None:
    for use in (spkfast.nn.Fbank, spkfast.NumpyFbank, spkfast.StreamingFbank, spkfast.export.FbankGraph):
        with pytest.raises(spkfast.InputError, match=r"spec must be a FrontendSpec, as spkfast\.frontend"):
            use("kaldi")  # type: ignore[arg-type]
    with pytest.raises(spkfast.InputError, match="spec must be a FrontendSpec"):
        ops.log_mel_fbank(voice(1, 800), spec="kaldi")  # type: ignore[arg-type]
    with pytest.raises(
        spkfast.InputError, match=r"dtype must be float16, bfloat16, float32 or float64, got torch\.int16"
    ):
        ops.log_mel_fbank(voice(1, 800), spec=spkfast.frontend("kaldi"), dtype=torch.int16)
