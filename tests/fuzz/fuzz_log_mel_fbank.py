"""Random cases of log_mel_fbank on the CPU: front-ends, ragged batches and signals that nobody would think of."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import spkfast
from spkfast import frontend_tables, ops
from spkfast.backends import Backend
from spkfast.errors import InputError
from spkfast.reference.log_mel_fbank import count_frames, padded_frames
from tests.fuzz.bounds_log_mel_fbank import Bounds, error_bounds
from tests.fuzz.surroundings import surroundings
from tests.parity import FACTOR

_PRESETS = (
    "kaldi", "wespeaker", "3dspeaker", "speechbrain", "taoruijie", "clova_l", "clova_v2", "vgg", "thin", "redimnet",
    "redimnet2", "titanet", "mfcc",
)  # fmt: skip
_ALL_LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")
_LEVELS = _ALL_LEVELS[: _ALL_LEVELS.index(spkfast.info()["cpu"]["level"]) + 1][:3]  # the last has no kernel of its own
_SIGNALS = (
    "noise", "noise", "voice", "voice", "onset", "silence", "dc", "square", "impulse", "ramp", "nyquist", "quiet",
    "denormal", "huge", "largest",
)  # fmt: skip
_NOISY = ("noise", "voice", "huge", "largest")
_MOST_SECONDS = 3.0
_MIB = 2.0**20


@dataclasses.dataclass
class Case:
    """One call of the op.

    Attributes:
        level: Instruction set.
        threads: Of a second call, which must give the same.
        bad: What the op must refuse: ``sample`` or ``length``; else empty.
        signals: What the rows hold.
    """

    spec: spkfast.FrontendSpec
    waveforms: Tensor
    lengths: Tensor | None
    seeds: Tensor | None
    masks: Tensor | None
    dtype: torch.dtype
    level: str
    threads: int
    bad: str
    signals: list[str]

    def __str__(self) -> str:
        default, fields = spkfast.FrontendSpec().to_dict(), self.spec.to_dict()
        own = ", ".join(f"{name}={value!r}" for name, value in fields.items() if value != default[name])
        layout = f"{self.waveforms.dtype} {tuple(self.waveforms.shape)} strides {self.waveforms.stride()}"
        lengths, seeds, masks = (None if x is None else x.tolist() for x in (self.lengths, self.seeds, self.masks))
        return (
            f"FrontendSpec({own})\n  frame {self.spec.frame_length}, shift {self.spec.frame_shift}, "
            f"fft {self.spec.fft_size}, waveforms {layout} {self.signals}, lengths {lengths}, seeds {seeds}, "
            f"masks {masks}, dtype {self.dtype}, level {self.level}, threads {self.threads}, bad {self.bad!r}"
        )


def draw(rng: np.random.Generator) -> Case:
    """A case."""
    spec = _draw_spec(rng)
    batch = int(rng.choice([0, 1, 2, 3, 4, 7], p=[0.01, 0.39, 0.3, 0.15, 0.1, 0.05]))
    samples, lengths = _draw_lengths(rng, spec, batch)
    whole, shorts = rng.random() < 0.1, rng.random() < 0.3
    if whole:
        lengths[:] = samples
    signals = [str(rng.choice(_SIGNALS)) for _ in range(batch)]
    waveforms = np.zeros((batch, samples), np.int16 if shorts else np.float32)
    for row, kind in enumerate(signals):
        x = _signal(rng, kind, samples, spec.sample_rate)
        # Whatever lies past the end must not count.
        x[lengths[row] :] = rng.choice([0.0, 0.5, -1.0] if shorts else [0.0, math.nan, math.inf, 1e30])
        waveforms[row] = np.clip(np.round(x * 32768), -32768, 32767) if shorts else x
    bad = str(rng.choice(["", "sample", "length"], p=[0.96, 0.03, 0.01]))
    victim = int(rng.integers(batch)) if batch else 0
    if bad == "sample" and batch and not shorts and lengths[victim] > 0:
        waveforms[victim, rng.integers(lengths[victim])] = rng.choice([math.nan, math.inf, -math.inf])
    elif bad == "length" and batch and not whole:
        lengths[victim] = rng.choice([-1, samples + 1, 2**62, -(2**63)])
    else:
        bad = ""
    seeds = masks = None
    if rng.random() < (0.7 if spec.dither else 0.2):
        low, high = (-(2**63), 2**63 - 1) if rng.random() < 0.5 else (0, 9)
        seeds = _laid_out(rng, rng.integers(low, high, batch))
    if rng.random() < 0.2:
        top = max(samples // spec.frame_shift, spec.output_size) + 3
        rectangles = rng.integers(-3, top, (batch, int(rng.integers(0, 4)), 4))
        rectangles[rng.random(rectangles.shape) < 0.03] = rng.choice([-(2**63), 2**63 - 1])
        masks = _laid_out(rng, rectangles)
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return Case(
        spec=spec,
        waveforms=_laid_out(rng, waveforms),
        lengths=None if whole else _laid_out(rng, lengths),
        seeds=seeds,
        masks=masks,
        dtype=dtypes[rng.choice(4, p=[0.7, 0.1, 0.1, 0.1])],
        level=_LEVELS[int(rng.integers(3)) % len(_LEVELS)],
        threads=int(rng.choice([1, 2, 3], p=[0.9, 0.05, 0.05])),
        bad=bad,
        signals=signals,
    )


def _draw_spec(rng: np.random.Generator) -> spkfast.FrontendSpec:
    while True:
        fields = spkfast.frontend(str(rng.choice(_PRESETS))).to_dict()
        drawn = _draw_fields(rng)
        # As often a toolkit's own front-end with a few changes as one that is random all over.
        kept = rng.choice([0.0, 0.05, 0.3, 1.0], p=[0.1, 0.2, 0.2, 0.5])
        fields |= {name: value for name, value in drawn.items() if rng.random() < kept}
        with contextlib.suppress(InputError):
            spec = spkfast.FrontendSpec.from_dict(fields)
            # Bands of no width give filters of no width.
            with np.errstate(all="ignore"):
                mel = frontend_tables.tables(spec).mel
            if np.isfinite(mel).all() and mel.max(initial=0) < 1e4:
                return spec


def _draw_fields(rng: np.random.Generator) -> dict[str, Any]:
    def one(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def power_of_ten(low: float, high: float) -> float:
        return float(10 ** rng.uniform(low, high))

    def flag(chance: float = 0.5) -> bool:
        return bool(rng.random() < chance)

    rate = int(one(16000, 16000, 8000, 11025, 44100, 1000, rng.integers(100, 48000)))
    length = int(2 ** between(1, one(6, 9, 9, 9, 10)))
    shift = int(length * between(0, one(1, 1, 1, 3)))
    nyquist = rate / 2
    low = one(0.0, 20.0, between(0, 0.9 * nyquist))
    mels = int(one(0, 1, 23, 40, 80, 128, rng.integers(1, 129)))
    clip = power_of_ten(-12, 6)
    return {
        "sample_rate": rate,
        "sample_scale": one(1.0, 32768.0, power_of_ten(-6, 6)),
        "waveform_norm": one("none", "none", "mean_std", "instance"),
        "preemphasis": one(0.0, 0.97, 1.0, between(-0.5, 1.5)),
        "preemphasis_mode": one("frame", "signal", "signal_zero"),
        "remove_dc": flag(),
        "frame_length_ms": (length + 0.5) * 1000 / rate,
        "frame_shift_ms": (shift + 0.5) * 1000 / rate,
        "n_fft": one(0, length, length + int(rng.integers(1, 40)), 2 * length, _prime_from(length)),
        "round_to_power_of_two": flag(),
        "window": one("hamming", "hann", "povey", "blackman", "rectangular"),
        "window_periodic": flag(),
        "snip_edges": flag(),
        "pad_samples": int(one(0, 0, rng.integers(0, 2 * length))),
        "center": flag(),
        "pad_mode": one("reflect", "constant", "none"),
        "drop_last_frame": flag(0.2),
        "power": one(1.0, 2.0),
        "spectrum_clip": one(None, None, (clip, clip * power_of_ten(1, 16)), (0.0, clip)),
        "n_mels": mels,
        "mel_scale": one("kaldi", "htk", "slaney", "speechbrain", "redimnet2"),
        "mel_norm": one("none", "slaney"),
        "f_min": low,
        "f_max": one(0.0, 0.0, -100.0, low + between(0.01, 1) * (nyquist - low)),
        "use_energy": flag(0.3),
        "raw_energy": flag(),
        "energy_floor": one(0.0, 1.0, power_of_ten(-8, 8)),
        "htk_compat": flag(),
        "num_ceps": int(one(0, 0, mels, rng.integers(0, mels + 1))),
        "cepstral_lifter": one(0.0, 22.0, between(1, 60)),
        "log": one("ln", "db", "none"),
        "log_floor": one(0.0, 2.0**-23, power_of_ten(-44, 2)),
        "log_offset": one(0.0, 1e-6, power_of_ten(-44, 2)),
        "top_db": one(None, None, 0.0, 80.0, between(0, 100)),
        "mean_norm": flag(),
        "std_norm": flag(0.3),
        "std_unbiased": flag(),
        "var_eps": one(0.0, 1e-5, power_of_ten(-12, 0)),
        "std_eps": one(0.0, 1e-5, power_of_ten(-12, 0)),
        "pad_frames_to": int(one(1, 1, 2, 16, rng.integers(1, 40))),
        "dither": one(0.0, 0.0, 1.0, power_of_ten(-6, 2)),
    }


def _prime_from(number: int) -> int:
    while any(number % divisor == 0 for divisor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number


def _draw_lengths(rng: np.random.Generator, spec: spkfast.FrontendSpec, batch: int) -> tuple[int, NDArray[np.int64]]:
    settings = frontend_tables.settings(spec)
    # A pass of the transform over a large prime takes that many steps a point.
    cost = settings.fft_size * (20 + max(n for n in range(1, settings.fft_size + 1) if _divides(n, settings.fft_size)))
    frames = 2 ** rng.uniform(0, 6) if rng.random() < 0.99 else 1000
    most = min(frames, 1 + 10 * _MIB / cost / max(batch, 1))
    limit = int(min(_MOST_SECONDS * spec.sample_rate, max(settings.first_frame, 1) + most * settings.frame_shift))

    def length() -> int:
        edge = settings.first_frame + int(rng.integers(0, int(most) + 1)) * settings.frame_shift
        near = (0, 1, 2, 3, spec.frame_length, edge)[int(rng.choice(6, p=[0.05, 0.05, 0.05, 0.05, 0.2, 0.6]))]
        drawn = near + int(rng.integers(-1, 2)) if rng.random() < 0.5 else int(rng.integers(0, limit + 1))
        return min(max(drawn, 0), limit)

    lengths = np.array([length() for _ in range(batch)], np.int64)
    longest = int(lengths.max(initial=0))
    return (longest if rng.random() < 0.8 else longest + int(rng.integers(0, 100))), lengths


def _divides(number: int, size: int) -> bool:
    """Whether ``number`` is a prime factor of ``size`` for which the transform has no pass of its own."""
    return size % number == 0 and (number == 1 or (number > 5 and _prime_from(number) == number))


def _signal(rng: np.random.Generator, kind: str, samples: int, rate: int) -> NDArray[np.float64]:
    t = np.arange(samples)
    noise = rng.standard_normal(samples) * 10 ** rng.uniform(-5, -0.5)
    if kind == "noise":
        return noise
    if kind == "voice":
        pitch = rng.uniform(80, 250) / rate
        harmonics = sum(np.sin(2 * math.pi * pitch * k * t + k * k) / k for k in range(1, 12))
        return 0.1 * harmonics * (1 + np.sin(6 * math.pi * t / rate)) + 1e-3 * rng.standard_normal(samples)
    if kind == "onset":
        return np.where(t < samples // 2, 0.0, noise)
    if kind == "dc":
        return np.full(samples, rng.choice([0.25, -1.0, 0.1, rng.uniform(-1, 1)]))
    if kind == "square":
        return np.where(t % (2 * (period := int(rng.integers(1, 200)))) < period, 1.0, -1.0)
    if kind == "impulse":
        return np.where(t == (rng.integers(samples) if samples else 0), 1.0, 0.0)
    if kind == "ramp":
        return t / max(samples, 1) - rng.uniform(0, 1)
    if kind == "nyquist":
        return np.where(t % 2 == 0, 0.5, -0.5)
    scale = {"silence": 0.0, "quiet": 2.0**-15, "denormal": 1e-40, "huge": 1e30, "largest": 3e38}[kind]
    return scale * rng.uniform(-1, 1, samples)


def _laid_out(rng: np.random.Generator, values: NDArray[Any]) -> Tensor:
    """The values as a tensor that is often not contiguous."""
    tensor, way = torch.from_numpy(values), rng.integers(8)
    if way == 0 and tensor.ndim == 2:
        return tensor.T.contiguous().T
    if way == 1:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if way == 2 and tensor.ndim > 1:
        return torch.cat([tensor[:, :1], tensor], dim=1)[:, tensor[:, :1].shape[1] :]
    return tensor


def check(case: Case) -> collections.Counter[str]:
    """Checks one case against the definition in float64, and against itself.

    Raises:
        AssertionError: If the kernel is wrong.
    """
    with surroundings(case.level):
        return _check_refusal(case) if case.bad else _check_values(case)


def _call(case: Case, backend: Backend, *, validate: bool = True, **changes: Any) -> tuple[Tensor, Tensor]:
    case = dataclasses.replace(case, **changes)
    return ops.log_mel_fbank(
        case.waveforms,
        case.lengths,
        spec=case.spec,
        seeds=case.seeds,
        masks=case.masks,
        dtype=case.dtype,
        backend=backend,
        validate=validate,
    )


def _check_refusal(case: Case) -> collections.Counter[str]:
    said = []
    backends: tuple[Backend, ...] = ("reference", "native")
    for backend in backends:
        try:
            _call(case, backend)
            said.append("")
        except InputError as error:
            said.append(str(error))
    assert said[0], "the definition does not refuse"
    assert said[1] == said[0], f"the kernel says {said[1]!r}, the definition {said[0]!r}"
    if case.bad == "sample":
        # Where nobody looks, a bad sample stays in its row.
        samples = case.waveforms.shape[1]
        lengths = torch.full(case.waveforms.shape[:1], samples) if case.lengths is None else case.lengths
        inside = torch.arange(samples) < lengths[:, None]
        good = ~(~case.waveforms.isfinite() & inside).any(dim=1)
        features, clean = (
            _call(case, "native", validate=False, waveforms=x)[0] for x in (case.waveforms, case.waveforms.nan_to_num())
        )
        assert _same(features[good], clean[good]), "a bad sample reaches another row"
    return collections.Counter(refused=1)


def _check_values(case: Case) -> collections.Counter[str]:
    samples = case.waveforms.shape[1]
    lengths = torch.full(case.waveforms.shape[:1], samples) if case.lengths is None else case.lengths
    features, frame_lengths = _call(case, "native", dtype=torch.float32)
    doubles = case.waveforms.double() / (32768 if case.waveforms.dtype == torch.int16 else 1)
    exact, _ = _call(case, "reference", waveforms=doubles, dtype=torch.float64)
    plain, plain_lengths = _call(case, "reference", dtype=torch.float32)

    settings = frontend_tables.settings(case.spec)
    assert torch.equal(plain_lengths, count_frames(lengths, settings))
    assert torch.equal(frame_lengths, plain_lengths), f"frames {frame_lengths.tolist()}, not {plain_lengths.tolist()}"
    shape = (len(lengths), padded_frames(samples, settings), case.spec.output_size)
    assert tuple(features.shape) == shape == tuple(exact.shape), f"shape {tuple(features.shape)}, not {shape}"
    past = torch.arange(shape[1]) >= frame_lengths[:, None]
    assert (features[past] == 0).all(), "frames past the end are not zero"

    # Once rounded, the same in every type.
    assert _same(_call(case, "native")[0], features.to(case.dtype)), f"{case.dtype} is not float32 rounded"
    if case.threads > 1:
        torch.set_num_threads(case.threads)
        try:
            again = _call(case, "native", dtype=torch.float32)[0]
        finally:
            torch.set_num_threads(1)
        assert _same(again, features), "the result depends on the number of threads"
    _check_rows(case, lengths, features, frame_lengths)
    bounds = error_bounds(case.spec, doubles, lengths, case.seeds, case.masks, _independent(case, lengths))
    return _compare(features.double(), exact, plain.double(), bounds, past)


def _independent(case: Case, lengths: Tensor) -> Tensor:
    """Rows (B,) of noise whose samples hardly repeat, so that their roundings have nothing in common."""
    rows = zip(case.signals, case.waveforms, lengths.tolist(), strict=True)
    noisy = [kind in _NOISY and 2 * len(row[:length].unique()) > length for kind, row, length in rows]
    return torch.tensor(noisy, dtype=torch.bool)


def _check_rows(case: Case, lengths: Tensor, features: Tensor, frame_lengths: Tensor) -> None:
    for row in range(min(len(lengths), 2)):
        length, frames = int(lengths[row]), int(frame_lengths[row])
        alone, _ = _call(
            case,
            "native",
            waveforms=case.waveforms[row : row + 1, :length].clone(),
            lengths=None,
            seeds=None if case.seeds is None else case.seeds[row : row + 1],
            masks=None if case.masks is None else case.masks[row : row + 1],
            dtype=torch.float32,
        )
        assert _same(alone[0, :frames], features[row, :frames]), f"row {row} alone is another"
        assert (alone[0, frames:] == 0).all(), f"row {row} alone has frames past its end"


def _compare(got: Tensor, exact: Tensor, plain: Tensor, bounds: Bounds, past: Tensor) -> collections.Counter[str]:
    error = (got - exact).abs()
    allowed = (got >= bounds.low) & (got <= bounds.high)
    allowed |= error <= FACTOR * (plain - exact).abs()
    allowed |= (got == exact) | (got.isnan() & exact.isnan())
    # Beyond the range of float32, or where a logarithm of zero is part of a mean, there is nothing to compare.
    free = bounds.free & ~(exact.isnan() & plain.isnan())
    wrong = ~allowed & ~free & ~past[..., None]
    if wrong.any():
        b, t, d = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} values are wrong; first row {b} frame {t} bin {d}: "
            f"{float(got[b, t, d])!r}, exactly {float(exact[b, t, d])!r}, definition in float32 "
            f"{float(plain[b, t, d])!r}, allowed {float(bounds.low[b, t, d])!r} to {float(bounds.high[b, t, d])!r}"
        )
    inside = ~past[..., None].expand_as(free)
    return collections.Counter(compared=int((inside & ~free).sum()), free=int((inside & free).sum()))


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN to NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
