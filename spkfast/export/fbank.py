"""The acoustic front-end as a graph of plain operators, for ONNX and TensorRT."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spkfast import frontend_tables
from spkfast.errors import InputError
from spkfast.frontend_tables import Settings, Table
from spkfast.frontends import FrontendSpec, require_spec

Form = Literal["conv", "matmul"]


class FbankGraph(nn.Module):
    """``functional.log_mel_fbank`` out of framing, products and logarithms alone, with nothing but constants to hold.

    Whatever is linear in a frame lies in one matrix, made in float64 and rounded once: mean removal, pre-emphasis of
    frames, window, ``sample_scale`` and DFT. Each row keeps its own length: where its reflection begins, and over which
    frames statistics go. Dither, which is for training, is left out.

    The rounding of the constants costs less than 1e-4 in speech. Beyond that the runtime adds that of its sums, which
    shows in bins far quieter than their frame; these must stay float32: TF32 and half precision are not enough.

    Args:
        spec: The front-end.
        form: ``conv`` applies the matrix as a strided convolution; ``matmul`` gathers frames and multiplies.
        dtype: Of samples, constants and features: float32, or float64 for comparisons.

    Raises:
        InputError: If ``form`` or ``dtype`` is another.
    """

    _dft: Tensor
    _mel: Tensor
    _cosines: Tensor
    _parseval: Tensor
    _preemphasis: Tensor
    _log_offset: Tensor
    _var_eps: Tensor
    _std_eps: Tensor
    _level_eps: Tensor

    def __init__(self, spec: FrontendSpec, *, form: Form = "conv", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if form not in ("conv", "matmul"):
            raise InputError(f"form must be 'conv' or 'matmul', got {form!r}")
        if dtype not in (torch.float32, torch.float64):
            raise InputError(f"dtype must be float32 or float64, got {dtype}")
        require_spec(spec)
        self.spec, self.form = spec, form
        self._s = s = frontend_tables.settings(spec)
        window, mel, cosines = frontend_tables.tables(spec)
        self._frame_length = len(window)
        # Samples that lack behind a signal for its last frame; negative where none needs them all.
        self._behind = len(window) + s.offset - s.first_frame
        # Bins that no filter reads are left out, but the energy after the window needs all.
        bins = np.arange(mel.shape[1]) if s.energy == 2 else np.flatnonzero(mel.any(axis=0))
        bins = bins if len(bins) else np.arange(1)  # a convolution has a channel at least
        constants = {"_dft": _frame_matrix(window, bins, s), "_mel": mel[:, bins]}
        # The exporter drops the addition of a scalar up to 1e-8, and rounds scalars to float32: these are arrays.
        numbers = {"preemphasis": s.preemphasis, "log_offset": s.log_offset, "var_eps": s.var_eps, "std_eps": s.std_eps}
        constants |= {f"_{name}": np.array([number]) for name, number in (numbers | {"level_eps": 1e-8}).items()}
        if cosines is not None:
            constants["_cosines"] = cosines
        if s.energy == 2:
            constants["_parseval"] = _parseval(s.fft_size)
        for name, table in constants.items():
            self.register_buffer(name, torch.from_numpy(table).to(dtype), persistent=False)

    @property
    def min_samples(self) -> int:
        """Samples of the shortest batch, S, that the graph takes: those of one frame.

        The lower bound of a dynamic S in ``torch.export`` must be a hop higher; what ONNX makes of it takes this one.
        """
        return max(1, self._s.first_frame)

    def num_frames(self, samples: int) -> int:
        """Frames of S samples, without those that ``pad_frames_to`` adds."""
        return (samples - self._s.first_frame) // self._s.frame_shift + 1

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features and frame counts as the op gives them.

        Args:
            waveforms: Samples in [-1, 1], shape (B, S), S at least ``min_samples``.
            lengths: Samples per utterance, int64, 0 to S, shape (B,). None means that all have S, which makes a
                smaller graph.

        Returns:
            Features (B, T, D), zero past an utterance's end, and frames per utterance (B,), int64.

        Raises:
            InputError: If ``waveforms`` or ``lengths`` has another shape or dtype.
        """
        s = self._s
        if self._mel.dtype not in (torch.float32, torch.float64):
            raise InputError(f"the graph computes in float32 or float64, it was turned into {self._mel.dtype}")
        if waveforms.ndim != 2 or waveforms.dtype != self._mel.dtype or waveforms.shape[1] < self.min_samples:
            raise InputError(
                f"waveforms must be {self._mel.dtype} of shape (B, S), S at least {self.min_samples}, got "
                f"{waveforms.dtype} of shape {tuple(waveforms.shape)}"
            )
        if lengths is not None and (lengths.shape != waveforms.shape[:1] or lengths.dtype != torch.int64):
            raise InputError(
                f"lengths must be int64 of shape (B,), got {lengths.dtype} of shape {tuple(lengths.shape)}"
            )
        samples = waveforms.shape[1]
        num_frames = self.num_frames(samples)
        inside = frames_inside = None
        if lengths is None:
            frame_lengths = torch.full_like(waveforms[:, 0], num_frames, dtype=torch.int64)
        else:
            lengths = lengths.clamp(max=samples)
            inside = _range(samples, lengths) < lengths[:, None]
            # By the samples that each frame needs: a division rounds towards zero or down as the runtime likes.
            needed = (_range(num_frames, lengths) * s.frame_shift + s.first_frame).clamp_min(1)
            frames_inside = needed <= lengths[:, None]
            frame_lengths = frames_inside.sum(dim=1)
            frames_inside = frames_inside[:, None]  # [B, 1, T]
        features = self._features(self._padded(self._signal(waveforms, lengths, inside), lengths, inside), num_frames)
        features = self._normalized(features, frame_lengths, frames_inside).transpose(1, 2)
        if s.frame_multiple > 1:
            features = nn.functional.pad(features, (0, 0, 0, -num_frames % s.frame_multiple))
        return features, frame_lengths

    def _signal(self, x: Tensor, lengths: Tensor | None, inside: Tensor | None) -> Tensor:
        """Samples (B, S), zero past the end, normalised and pre-emphasised where that is done to the whole signal."""
        s = self._s
        x = _where(inside, x)
        if s.waveform_norm:
            x = _where(inside, x - _mean(x, lengths))
            variance = _mean(x * x, lengths)
            if s.waveform_norm == 1:
                x = x / (variance.clamp_min(1e-20).sqrt() + self._level_eps)
            else:
                x = x / (variance + 1e-4).sqrt()
        if s.preemphasis_mode:
            before = torch.zeros_like(x[:, :1])
            if s.preemphasis_mode == 1:
                # The second sample, where there is one: not by slices, of which compilers take their example's sizes.
                second = _range(1, x) + 1
                before = x.index_select(1, torch.minimum(second, torch.full_like(second, x.shape[1] - 1)))
                if lengths is not None:
                    before = torch.where(lengths[:, None] > 1, before, x[:, :1])
            x = _where(inside, x - self._preemphasis * torch.cat([before, x[:, :-1]], dim=1))
        return x

    def _padded(self, x: Tensor, lengths: Tensor | None, inside: Tensor | None) -> Tensor:
        """The signal from the first sample of its first frame to the last sample of the last frame of S samples."""
        s = self._s
        ahead, behind = -s.offset, self._behind
        # The frames take off their own means; one that is large beside the speech would cost digits in the product.
        mean = _mean(x, lengths) if s.remove_dc else None
        if s.padding and (ahead > 0 or behind > 0):
            position = _range(x.shape[1] + behind + ahead, x) - ahead
            if lengths is None:  # one index for all rows
                x = x.index_select(1, _reflection(position, torch.full_like(position[:1], x.shape[1]), s.padding))
            else:
                x = x.gather(1, _reflection(position, lengths[:, None], s.padding))
        elif ahead or behind:
            x = nn.functional.pad(x, (ahead, behind))
        return x if mean is None else x - mean

    def _features(self, x: Tensor, num_frames: int) -> Tensor:
        """Features (B, D, T) of the padded signal before normalisation."""
        s = self._s
        if self.form == "matmul":
            spectrum = torch.matmul(self._dft, self._frames(x, num_frames))
        else:
            spectrum = nn.functional.conv1d(x[:, None], self._dft[:, None], stride=s.frame_shift)
        real, imaginary = spectrum.chunk(2, dim=1)
        power = real * real + imaginary * imaginary  # [B, F, T]
        energies = torch.matmul(self._mel, self._clipped(power.sqrt() if s.magnitude else power))
        features = self._clipped(energies)
        if s.log_scale:
            features = features.clamp_min(s.log_floor)
            features = (features + self._log_offset if s.log_offset else features).log()
            features = features if s.log_scale == 1 else features * s.log_scale
        if self.spec.num_ceps:
            features = torch.matmul(self._cosines, features)
        if s.energy:
            if s.energy == 2:
                energy = torch.matmul(self._parseval, power)
            else:
                frames = self._frames(x, num_frames)
                frames = frames - frames.mean(dim=1, keepdim=True) if s.remove_dc else frames
                energy = (frames * frames).sum(dim=1, keepdim=True) * s.sample_scale**2
            energy = energy.clamp_min(s.energy_floor).log()
            features = torch.cat([features, energy] if s.energy_last else [energy, features], dim=1)
        return features

    def _frames(self, x: Tensor, num_frames: int) -> Tensor:
        """Frames (B, L, T) of the padded signal."""
        index = _range(self._frame_length, x)[:, None] + self._s.frame_shift * _range(num_frames, x)
        return x.index_select(1, index.flatten()).unflatten(1, (self._frame_length, num_frames))

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.spec.spectrum_clip is None else x.clamp(self._s.spectrum_low, self._s.spectrum_high)

    def _normalized(self, features: Tensor, frame_lengths: Tensor, inside: Tensor | None) -> Tensor:
        """Features (B, D, T) with zeros past the end; floor, mean and variance over the frames of each utterance."""
        s = self._s
        count = frame_lengths.clamp_min(1)[:, None, None]
        if s.top_db != math.inf:
            lowest = torch.finfo(features.dtype).min
            highest = _where(inside, features, lowest).amax(dim=(1, 2), keepdim=True)
            features = torch.maximum(features, highest - s.top_db)
        features = _where(inside, features)
        if s.mean_norm or s.std_norm:
            centred = _where(inside, features - features.sum(dim=2, keepdim=True) / count)
            if s.std_norm:
                squares = (centred * centred).sum(dim=2, keepdim=True)
                variance = squares / (count - s.std_unbiased).clamp_min(1) + self._var_eps
                deviation = variance.clamp_min(1e-20).sqrt() + self._std_eps
                features = (centred if s.mean_norm else features) / deviation
            else:
                features = centred
        return features


def _frame_matrix(window: Table, bins: NDArray[np.intp], s: Settings) -> Table:
    """Real parts above imaginary parts of the spectrum of a frame of samples, in float64 (2 F, L)."""
    size = len(window)
    # Reduced as integers, the angles are exact to the last bit.
    angles = 2 * math.pi / s.fft_size * (np.outer(bins, np.arange(size)) % s.fft_size)
    matrix = np.concatenate([np.cos(angles), -np.sin(angles)]) * (window * s.sample_scale)
    if s.preemphasis_mode == 0:
        before = s.preemphasis * matrix
        matrix[:, :-1] -= before[:, 1:]
        matrix[:, 0] -= before[:, 0]  # the first sample against itself
    if s.remove_dc:
        matrix -= matrix.mean(axis=1, keepdims=True)
    return matrix


def _parseval(fft_size: int) -> Table:
    """Weights (1, F) under which the power spectrum of a real frame sums to its energy, in float64."""
    weights = np.full((1, fft_size // 2 + 1), 2 / fft_size)
    weights[0, 0] /= 2
    if fft_size % 2 == 0:
        weights[0, -1] /= 2
    return weights


def _range(size: int, like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device)


def _where(inside: Tensor | None, x: Tensor, other: float = 0.0) -> Tensor:
    return x if inside is None else torch.where(inside, x, other)


def _mean(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean (B, 1) of samples (B, S) that are zero past the end."""
    if lengths is None:
        return x.mean(dim=1, keepdim=True)
    return x.sum(dim=1, keepdim=True) / lengths.clamp_min(1)[:, None]


def _reflection(position: Tensor, end: Tensor, padding: int) -> Tensor:
    """Positions within 0..end - 1 of which ``position`` are reflections, however often; 0 where there are none."""
    edge = 2 - padding  # whether the edge itself is left out
    position = position.remainder((2 * (end - edge)).clamp_min(1))
    return torch.minimum(position, (2 * end - 1 - edge - position).abs())
