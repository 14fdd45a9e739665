"""Augmentation of whole batches on the device that trains, exactly reproducible: crops of int16 in, features out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from spkfast import functional
from spkfast.data.banks import Bank
from spkfast.data.recipes import Choice, Companding, Effect, Gain, Noise, PeakNormalize, Recipe, Reverb, Telephone
from spkfast.errors import InputError
from spkfast.nn.fbank import Fbank
from spkfast.reference.change_speed import half_width, source_samples
from spkfast.reference.random import philox

# Tells these draws from those of the front-end, whose noise and masks come from the same keys.
_STREAM = 0x61756721


class Mixed(NamedTuple):
    """Recordings to add: K for each row, of size 0 where there is none. As ``functional.add_noise`` takes them."""

    begins: Tensor
    sizes: Tensor
    offsets: Tensor
    snr_db: Tensor


class Convolved(NamedTuple):
    """Responses to convolve with, of size 0 where there is none. As ``functional.reverberate`` takes them."""

    begins: Tensor
    sizes: Tensor
    gains: Tensor


class Filtered(NamedTuple):
    """The same, out of the filters of telephone bands."""

    begins: Tensor
    sizes: Tensor
    gains: Tensor


class Scaled(NamedTuple):
    """A factor for each row."""

    factors: Tensor


class Companded(NamedTuple):
    """Rows to quantise: the law (0 none, 1 mu, 2 A) and the largest code of each."""

    laws: Tensor
    codes: Tensor


class Normalized(NamedTuple):
    """Rows to divide by their peak plus this; 0 where not."""

    offsets: Tensor


Step = Mixed | Convolved | Filtered | Scaled | Companded | Normalized
Plan = list[Step]

_Places = TypeVar("_Places", Mixed, Convolved)


class Augment(nn.Module):
    """Draws what happens to each crop of a batch, and does it to all of them at once.

    What happens to a crop follows from its key alone, whatever the batch, process or device; on a CPU so does every bit
    of the result.

    Args:
        recipe: What may happen.
        noise: Recordings to add, or None.
        rir: Room impulse responses, or None.
        num_samples: Length of a crop after its change of speed.
        sample_rate: Rate of the crops in Hz.
        context: Samples that a crop has before its first one, for the change of speed; None for as many as
            :class:`spkfast.data.reading.CropDataset` gives with these speeds.
        warn: Called with a line for what the recipe asks for and cannot be had, and is left out.

    Raises:
        InputError: If nothing is left of the recipe, or a bank has another rate.
    """

    def __init__(
        self,
        recipe: Recipe,
        noise: Bank | None = None,
        rir: Bank | None = None,
        *,
        num_samples: int,
        sample_rate: int = 16000,
        context: int | None = None,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        super().__init__()
        for name, bank in (("noise", noise), ("rir", rir)):
            if bank is not None and bank.sample_rate != sample_rate:
                raise InputError(f"{name} has {bank.sample_rate} Hz, the crops {sample_rate} Hz")
        there = set(noise.categories if noise else ()) - {"rir"}
        there |= set(rir.categories if rir else ()) & {"rir"}
        missing = recipe.needs - there
        if missing:
            recipe = recipe.without(missing)
            if not recipe.effects:
                raise InputError(
                    f"the augmentation needs {' and '.join(sorted(missing))}: give recordings of noise (folders music, "
                    "noise, speech; --data.noise) and room impulse responses (--data.rir), or take the recipe none"
                )
            warn(f"augmentation without {' and '.join(sorted(missing))}: there are no such recordings")
        if rir is not None and "rir" in recipe.needs:
            longer = (rir.sizes > num_samples).nonzero()[:, 0].tolist()
            if longer:
                warn(
                    f"{len(longer)} impulse responses are longer than the crop of {num_samples} samples and count as "
                    f"far as that, the first: {rir.names[longer[0]]}"
                )
        self.recipe, self.noise, self.rir = recipe, noise, rir
        self.num_samples, self.sample_rate = num_samples, sample_rate
        self.context = max(half_width(speed) for speed in recipe.speeds) if context is None else context
        self._least = min(source_samples(num_samples, speed) for speed in recipe.speeds) + self.context
        self._places = {} if noise is None else {name: noise.places(name) for name in set(noise.categories)}
        self._longest = int(rir.sizes.max()) if rir else 1
        self._direct = _direct_paths(rir) if rir and any(isinstance(e, Reverb) for e in recipe.effects) else None
        for effect in recipe.effects:
            if isinstance(effect, Telephone) and effect.band_hz[0] >= sample_rate / 2:
                raise InputError(f"band_hz {list(effect.band_hz)} lies above half of the {sample_rate} Hz of the crops")
        bands = list(dict.fromkeys(e.band_hz for e in recipe.effects if isinstance(e, Telephone)))
        self._bands = {band: k for k, band in enumerate(bands)}
        table = np.concatenate([_band_pass(band, sample_rate) for band in bands]) if bands else np.zeros(1)
        self.filters: Tensor
        self.register_buffer("filters", torch.from_numpy(table).float(), persistent=False)

    def draw(self, keys: Tensor) -> Plan:
        """What happens to each row, in order.

        Args:
            keys: One int64 for each row, shape (B,), on the CPU.
        """
        draws = _Draws(keys)
        plan: Plan = []
        for stage in self.recipe.stages:
            taken = draws.uniform() < stage.probability
            weights = np.cumsum([choice.weight for choice in stage.choices])
            chosen = torch.from_numpy(
                np.searchsorted(weights / weights[-1], draws.uniform().numpy(), side="right")
            ).clamp_max_(len(weights) - 1)
            longest = max(len(choice.effects) for choice in stage.choices)
            for position in range(longest):
                plan += self._steps(stage.choices, position, torch.where(taken, chosen, -1), draws)
        return plan

    def forward(
        self, crops: Tensor, lengths: Tensor, speeds: Tensor, keys: Tensor | None = None, plan: Plan | None = None
    ) -> Tensor:
        """Waveforms of augmented crops.

        Args:
            crops: Samples, int16 or float32, shape (B, W), of which ``context`` stand before the first one.
            lengths: Samples of each crop from its first one on, int64, shape (B,).
            speeds: Place of each crop's speed in those of the recipe, int64, shape (B,).
            keys: One int64 for each row, shape (B,), on the CPU: what :meth:`draw` takes.
            plan: What :meth:`draw` gave, in place of keys.

        Returns:
            Float32, shape (B, num_samples).
        """
        if (keys is None) == (plan is None):
            raise InputError("give either keys or a plan")
        self._check(crops, speeds)
        x = functional.change_speed(
            crops,
            speeds,
            speeds=self.recipe.speeds,
            num_samples=self.num_samples,
            lengths=lengths,
            context=self.context,
        )
        for step in self.draw(keys) if keys is not None else plan or ():
            x = self._done(step, x)
        return x

    def _check(self, crops: Tensor, speeds: Tensor) -> None:
        """Crops that are of another dataset than this is for."""
        if crops.ndim == 2 and crops.shape[1] < self._least:
            raise InputError(
                f"crops of {crops.shape[1]} samples cannot give num_samples={self.num_samples}; "
                "give the dataset the same number"
            )
        count = len(self.recipe.speeds)
        if speeds.device.type == "cpu" and speeds.numel() and not 0 <= int(speeds.min()) <= int(speeds.max()) < count:
            raise InputError(
                f"speeds must lie in 0..{count - 1}, as the recipe has {count}, got {int(speeds.max())}; "
                "give the dataset the speeds of the recipe"
            )

    def _steps(self, choices: Sequence[Choice], position: int, chosen: Tensor, draws: _Draws) -> Plan:
        """What the effects at one position of all choices do, those of one kind together."""
        steps: dict[type, Any] = {}
        for number, choice in enumerate(choices):
            if position >= len(choice.effects):
                continue
            effect = choice.effects[position]
            rows, made = chosen == number, self._step(effect, draws)
            if not rows.any():
                continue
            kind = type(made)
            made = kind(*(torch.where(rows.view(-1, *[1] * (value.ndim - 1)), value, _nothing(kind, k, value))
                          for k, value in enumerate(made)))  # fmt: skip
            steps[kind] = _merged(steps[kind], made, rows) if kind in steps else made
        return list(steps.values())

    def _step(self, effect: Effect, draws: _Draws) -> Step:
        if isinstance(effect, Noise):
            assert self.noise is not None
            places = self._places[effect.category]
            fewest, most = effect.files
            number = fewest + draws.below(most - fewest + 1)
            file = places[draws.below(len(places), most)]
            size = self.noise.sizes[file]
            offset = draws.below((size - self.num_samples + 1).clamp_min(1), most)
            low, high = effect.snr_db
            snr_db = low + (high - low) * draws.uniform(most)
            there = torch.arange(most) < number[:, None]
            return Mixed(self.noise.begins[file], size * there, offset, snr_db.float())
        if isinstance(effect, Reverb):
            assert self.rir is not None and self._direct is not None
            file = draws.below(len(self.rir))
            skipped = self._direct[file] if effect.direct_first else torch.zeros_like(file)
            return Convolved(self.rir.begins[file] + skipped, self.rir.sizes[file] - skipped, self.rir.gains[file])
        ones = torch.ones_like(draws.keys)
        if isinstance(effect, Gain):
            low, high = effect.gain_db
            return Scaled((10 ** ((low + (high - low) * draws.uniform()) / 20)).float())
        if isinstance(effect, Telephone):
            return Filtered(ones * self._bands[effect.band_hz] * _TAPS, ones * _TAPS, ones.float())
        if isinstance(effect, Companding):
            return Companded(ones * (1 if effect.law == "mu" else 2), ones.float() * (2 ** (effect.bits - 1) - 1))
        assert isinstance(effect, PeakNormalize)
        return Normalized(ones.float() * effect.offset)

    def _done(self, step: Step, x: Tensor) -> Tensor:
        if isinstance(step, Mixed):
            assert self.noise is not None
            samples, step = _near(self.noise.samples, step, x, self.num_samples, _cut_out)
            return functional.add_noise(x, samples, *step, power_floor=self.recipe.power_floor, inplace=True)
        if isinstance(step, Convolved):
            assert self.rir is not None
            longest = min(self._longest, self.num_samples)
            samples, step = _near(self.rir.samples, step, x, longest, _rooms_cut_out)
            return functional.reverberate(x, samples, *step, longest=longest, inplace=True)
        values = [value.to(x.device, non_blocking=True) for value in step]
        if isinstance(step, Filtered):
            return functional.reverberate(x, self.filters.to(x.device), *values, longest=_TAPS, inplace=True)
        if isinstance(step, Scaled):
            return x.mul_(values[0][:, None])
        if isinstance(step, Companded):
            rows = step.laws.nonzero().flatten().to(x.device, non_blocking=True)  # few, and known to the host
            return x.index_copy_(0, rows, _companded(*(value.index_select(0, rows) for value in (x, *values))))
        peaks = torch.maximum(x.amax(dim=1), -x.amin(dim=1))
        return x.div_(torch.where(values[0] > 0, peaks + values[0], 1.0)[:, None])


class AugmentedFbank(nn.Module):
    """Crops of int16 to features: augmentation, then the front-end with its dither and masks.

    Args:
        augment: The augmentation.
        fbank: The front-end; in training mode it draws dither and masks from the same keys.
    """

    def __init__(self, augment: Augment, fbank: Fbank) -> None:
        super().__init__()
        if augment.sample_rate != fbank.spec.sample_rate:
            raise InputError(f"the crops have {augment.sample_rate} Hz, the front-end {fbank.spec.sample_rate} Hz")
        self.augment, self.fbank = augment, fbank

    def forward(self, crops: Tensor, lengths: Tensor, speeds: Tensor, keys: Tensor, plan: Plan | None = None) -> Tensor:
        """Features (B, T, M) of crops; arguments as :class:`Augment` takes them, ``keys`` on the CPU."""
        waveforms = self.augment(crops, lengths, speeds, keys if plan is None else None, plan)
        features: Tensor = self.fbank(waveforms, None, keys.to(waveforms.device, non_blocking=True))[0]
        return features


class _Draws:
    """Random words of each row, one after the other in a fixed order."""

    def __init__(self, keys: Tensor) -> None:
        if keys.device.type != "cpu" or keys.dtype != torch.int64 or keys.ndim != 1:
            raise InputError(
                f"keys must be int64 of shape (B,) on the CPU, got {keys.dtype} of shape {tuple(keys.shape)} on "
                f"{keys.device}"
            )
        self.keys = keys
        self._count = 0
        self._words_left = keys.new_empty(len(keys), 0)

    def _words(self, columns: int | None) -> Tensor:
        """Whole numbers below 2**32, int64, shape (B, columns), or (B,) for None."""
        wanted = columns or 1
        if self._words_left.shape[1] < wanted:  # many at once: a call takes longer than the numbers
            counters = self._count + torch.arange(max(wanted, _BLOCK))
            self._count += len(counters)
            self._words_left = philox(counters, (self.keys ^ _STREAM)[:, None])[0]
        words, self._words_left = self._words_left.tensor_split([wanted], dim=1)
        return words[:, 0] if columns is None else words

    def uniform(self, columns: int | None = None) -> Tensor:
        """Values between 0 and 1, float64."""
        return (self._words(columns).double() + 0.5) / 2**32

    def below(self, bound: Tensor | int, columns: int | None = None) -> Tensor:
        """Whole numbers from 0 to the bound and less, int64."""
        return self._words(columns) * bound >> 32


_BLOCK = 64
_TAPS = 512


def _nothing(kind: type, field: int, value: Tensor) -> Tensor:
    """What leaves a row as it is."""
    return torch.ones((), dtype=value.dtype) if kind is Scaled else torch.zeros((), dtype=value.dtype)


def _merged(old: Any, new: Any, rows: Tensor) -> Any:
    """Two steps of one kind as one: the new one's rows are none of the old one's."""
    values = []
    for a, b in zip(old, new, strict=True):
        if a.ndim == 2 and a.shape[1] != b.shape[1]:  # fewer recordings
            width = max(a.shape[1], b.shape[1])
            a, b = (nn.functional.pad(value, (0, width - value.shape[1])) for value in (a, b))
        values.append(torch.where(rows.view(-1, *[1] * (a.ndim - 1)), b, a))
    return type(old)(*values)


def _near(
    samples: Tensor, step: _Places, x: Tensor, length: int, cut_out: Callable[..., tuple[Tensor, _Places]]
) -> tuple[Tensor, _Places]:
    """A bank and a step on the device of x; of a bank that does not fit there, the parts that are asked for."""
    if samples.device != x.device:
        samples, step = cut_out(samples, step, length, pin_memory=x.device.type == "cuda")
        samples = samples.to(x.device, non_blocking=True)
    return samples, type(step)(*(value.to(x.device, non_blocking=True) for value in step))


def _rooms_cut_out(samples: Tensor, step: Convolved, longest: int, *, pin_memory: bool) -> tuple[Tensor, Convolved]:
    """The responses of a bank that a step takes, as far as they reach, and the step for them."""
    sizes = step.sizes.clamp_max(longest)
    begins = sizes.cumsum(0) - sizes
    parts = torch.empty(int(sizes.sum()), dtype=samples.dtype, pin_memory=pin_memory)
    for begin, size, target in zip(step.begins.tolist(), sizes.tolist(), begins.tolist(), strict=True):
        parts[target : target + size] = samples[begin : begin + size]
    return parts, Convolved(begins, sizes, step.gains)


def _cut_out(samples: Tensor, step: Mixed, length: int, *, pin_memory: bool) -> tuple[Tensor, Mixed]:
    """The parts of a bank that a step adds, and the step for them."""
    rows, columns = (step.sizes > 0).nonzero(as_tuple=True)
    parts = torch.empty(len(rows), length, dtype=samples.dtype, pin_memory=pin_memory)
    begins, n = torch.zeros_like(step.begins), torch.arange(length)
    for k, place in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        begin, size, offset = (int(value[place]) for value in step[:3])
        if offset + length <= size:
            parts[k] = samples[begin + offset : begin + offset + length]
        else:
            parts[k] = samples[begin + (offset + n) % size]
        begins[place] = k * length
    sizes = torch.where(step.sizes > 0, length, 0)
    return parts.flatten(), Mixed(begins, sizes, torch.zeros_like(begins), step.snr_db)


def _direct_paths(rir: Bank) -> Tensor:
    """Place of the highest peak in each response."""
    parts = rir.samples.cpu().split(rir.sizes.tolist())
    return torch.tensor([int(part.to(torch.int32).abs().argmax()) for part in parts], dtype=torch.int64)


def _band_pass(band_hz: tuple[float, float], sample_rate: int) -> np.ndarray:
    """A filter of minimum phase, (_TAPS,): its magnitude that of a windowed sinc, its phase that of the cepstrum.

    Reference: Oppenheim and Schafer, "Discrete-Time Signal Processing", chapter on homomorphic deconvolution.
    """
    low, high = (min(2 * f / sample_rate, 1.0) for f in band_hz)
    n = np.arange(_TAPS - 1) - (_TAPS - 2) / 2
    sinc = (high * np.sinc(high * n) - low * np.sinc(low * n)) * np.kaiser(_TAPS - 1, 7.0)
    size = 16 * _TAPS
    cepstrum = np.fft.irfft(np.log(np.maximum(np.abs(np.fft.rfft(sinc, size)), 1e-4)))
    cepstrum[1 : size // 2] *= 2
    cepstrum[size // 2 + 1 :] = 0
    response: np.ndarray = np.fft.irfft(np.exp(np.fft.rfft(cepstrum)))[:_TAPS]
    return response


def _companded(x: Tensor, laws: Tensor, codes: Tensor) -> Tensor:
    """Rows quantised on a logarithmic scale."""
    mu, a = 255.0, 87.6
    law, code = laws[:, None], codes[:, None]
    magnitude = x.abs().clamp_max(1.0)
    by_mu = torch.log1p(mu * magnitude) / math.log1p(mu)
    by_a = torch.where(magnitude < 1 / a, a * magnitude, 1 + torch.log((a * magnitude).clamp_min(1.0))) / (
        1 + math.log(a)
    )
    level = (torch.where(law == 1, by_mu, by_a) * code).round() / code
    from_mu = torch.expm1(level * math.log1p(mu)) / mu
    scaled = level * (1 + math.log(a))
    from_a = torch.where(scaled < 1, scaled, torch.exp((scaled - 1).clamp_min(0.0))) / a
    return torch.where(law == 1, from_mu, from_a).copysign(x)
