"""Public function ``log_mel_fbank``: checks, tables, and the choice of the implementation."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from spkfast import backends, frontend_tables, reference
from spkfast.backends import Backend
from spkfast.errors import InputError, check_counts
from spkfast.frontend_tables import Settings
from spkfast.frontends import FrontendSpec, require_spec
from spkfast.ops._registration import gradient_of, register_op
from spkfast.reference.log_mel_fbank import padded_frames


def log_mel_fbank(
    waveforms: Tensor,
    lengths: Tensor | None = None,
    *,
    spec: FrontendSpec,
    seeds: Tensor | None = None,
    masks: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
    validate: bool = True,
) -> tuple[Tensor, Tensor]:
    """Acoustic features as the front-end of any toolkit computes them: log-mel energies, cepstra, spectra.

    Each row of a padded batch equals the same utterance alone. Samples past an utterance's end do not count, and frames
    past its end are zero. Differentiable in ``waveforms``.

    Args:
        waveforms: Samples in [-1, 1], float32 or float64, or int16 (divided by 32768), shape (B, S).
        lengths: Samples per utterance, int64, 0 to S, shape (B,); None means that all have S.
        spec: The front-end.
        seeds: For training: one int64 per utterance, shape (B,), from which the noise of ``spec.dither`` follows, the
            same on every device and in every batch. None for no dither.
        masks: For training: rectangles that are set to zero last of all, int64, shape (B, N, 4): first frame, one past
            the last frame, first bin, one past the last bin. :class:`spkfast.nn.SpecAugment` draws them.
        dtype: Type of the features, rounded once after everything else; None for that of the computation.
        backend: ``reference`` (plain torch), ``native`` (C++, or CUDA C++ on a GPU), ``triton``, or ``auto``, which
            takes the fastest one that exists here for this device and these settings.
        validate: Check the values of ``lengths`` and ``waveforms``. On a GPU this waits for the device. Never done
            inside ``torch.compile`` and ``torch.export``.

    Returns:
        Features (B, T, D), where T is the number of frames of S samples and D is ``spec.output_size``, and frames per
        utterance (B,), int64.

    Raises:
        InputError: If shapes or dtypes are wrong, a length lies outside 0..S, a sample is NaN or infinite, or the
            backend cannot run here.
    """
    require_spec(spec)
    check_arguments(waveforms, lengths, seeds, masks)
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if lengths is None:
        lengths = waveforms.new_full(waveforms.shape[:1], waveforms.shape[1], dtype=torch.int64)
    computed = torch.float64 if waveforms.dtype == torch.float64 else torch.float32
    # As plain values: under torch 2.11 a compiled graph cannot hold the spec itself.
    constants = _constants(frontend_tables.field_values(spec), computed, waveforms.device)
    limits = _limits(waveforms.device.type, computed, constants)
    chosen = backends.resolve(waveforms.device, backend, "log_mel_fbank", limits)
    validate = validate and not torch.compiler.is_compiling()
    if validate:
        # The C++ kernel looks at every sample anyway, and raises.
        on_the_way = chosen == "native" and waveforms.device.type == "cpu"
        _check_values(waveforms, lengths, samples_too=not on_the_way)
    try:
        features, frame_lengths = _IMPLEMENTATIONS[chosen](
            waveforms,
            lengths,
            constants.window,
            constants.mel,
            constants.cosines,
            seeds if spec.dither else None,
            masks,
            constants.integers,
            constants.floats,
            computed if dtype == torch.float64 else dtype or computed,
            validate,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    # No kernel writes float64 out of float32.
    return features.to(dtype) if dtype == torch.float64 else features, frame_lengths


def check_arguments(waveforms: Tensor, lengths: Tensor | None, seeds: Tensor | None, masks: Tensor | None) -> None:
    """Refuses arguments of wrong shapes or types; the module checks before it draws masks.

    Raises:
        InputError: As :func:`log_mel_fbank`.
    """
    for name, value in (("waveforms", waveforms), ("lengths", lengths), ("seeds", seeds), ("masks", masks)):
        if value is not None and not isinstance(value, Tensor):
            raise InputError(f"{name} must be a torch tensor, got {type(value).__name__}")
    if waveforms.ndim != 2:
        raise InputError(f"waveforms must have shape (B, S), got {tuple(waveforms.shape)}")
    if waveforms.dtype not in (torch.float32, torch.float64, torch.int16):
        raise InputError(f"waveforms must be float32, float64 or int16, got {waveforms.dtype}")
    batch = waveforms.shape[0]
    for name, value, wanted, shape in (
        ("lengths", lengths, "int64 counts of samples", (batch,)),
        ("seeds", seeds, "int64", (batch,)),
        ("masks", masks, "int64 frames and bins", (batch, None, 4)),
    ):
        if value is None:
            continue
        if value.dtype != torch.int64:
            raise InputError(f"{name} must be {wanted}, got {value.dtype}")
        if value.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True)):
            text = f"(B,) = ({batch},)" if len(shape) == 1 else f"(B, N, 4) with B = {batch}"
            raise InputError(f"{name} must have shape {text}, got {tuple(value.shape)}")
        if value.device != waveforms.device:
            raise InputError(f"{name} must be on {waveforms.device}, where waveforms are, got {value.device}")


def _check_values(waveforms: Tensor, lengths: Tensor, *, samples_too: bool) -> None:
    samples = waveforms.shape[1]
    check_counts("lengths", lengths.tolist(), samples)
    # One pass over the samples decides nearly always: a sum is finite only where every term is.
    if not samples_too or not waveforms.is_floating_point() or waveforms.sum(dim=1).isfinite().all():
        return
    inside = torch.arange(samples, device=waveforms.device) < lengths[:, None]
    bad = ~waveforms.isfinite() & inside
    if bad.any():
        row, sample = bad.nonzero()[0].tolist()
        raise InputError(
            f"waveforms row {row} holds a NaN or infinite value at sample {sample}: mend or drop that audio"
        )


class _Constants(NamedTuple):
    integers: list[int]  # and floats: of Settings
    floats: list[float]
    window: Tensor
    mel: Tensor
    cosines: Tensor | None


@torch.compiler.assume_constant_result  # not to be traced, nor computed at every call of a compiled graph
def _constants(fields: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> _Constants:
    return _cached_constants(fields, dtype, device)


@functools.lru_cache(maxsize=64)
def _cached_constants(fields: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> _Constants:
    spec = FrontendSpec(*fields)
    # Kept for later calls, so neither made under inference mode, which could not be saved for a gradient, nor fake, as
    # a call that is being traced would have them.
    with torch.inference_mode(False), _disable_current_modes():
        tables = [
            None if table is None else torch.from_numpy(table).to(device, dtype)
            for table in frontend_tables.tables(spec)
        ]
    window, mel, cosines = tables
    assert window is not None and mel is not None
    settings = frontend_tables.settings(spec)
    return _Constants(settings.integers, settings.floats, window, mel, cosines)


def _limits(device: str, dtype: torch.dtype, constants: _Constants) -> dict[str, str]:
    """Why a backend cannot take this call, by backend."""
    limits: dict[str, str] = {}
    if device == "cuda":
        rows = max(len(table) for table in (constants.mel, constants.cosines) if table is not None)
        reason = _cuda_limit(Settings(*constants.integers, *constants.floats), rows)
        limits |= {"native": reason} if reason else {}
    if dtype != torch.float32:
        limits |= dict.fromkeys(("native", "triton"), f"it computes in float32, waveforms are {dtype}")
    return limits


def _cuda_limit(settings: Settings, rows: int) -> str:
    """Why the CUDA kernel cannot take a front-end with tables of at most ``rows`` rows; empty where it can.

    The rule of ``log_mel_fbank_takes`` in kernels/cuda.
    """
    rest = settings.fft_size // 2
    for prime in (2, 3, 5):
        while rest and rest % prime == 0:
            rest //= prime
    if settings.fft_size % 2 or settings.fft_size > 2048 or rest != 1:
        return f"it takes FFT sizes up to 2048 of factors 2, 3 and 5, even ones, the front-end has {settings.fft_size}"
    if settings.frame_shift > settings.fft_size:
        return f"it takes hops up to the FFT size, the front-end has {settings.frame_shift} and {settings.fft_size}"
    if rows > 1025:
        return f"it takes up to 1025 values a frame, the front-end has {rows}"
    return ""


def _fake(
    waveforms: Tensor,
    lengths: Tensor,
    window: Tensor,
    mel: Tensor,
    cosines: Tensor | None,
    seeds: Tensor | None,
    masks: Tensor | None,
    integers: list[int],
    floats: list[float],
    dtype: torch.dtype,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    settings = Settings(*integers, *floats)
    frames = padded_frames(waveforms.shape[1], settings)
    size = (mel if cosines is None else cosines).shape[0] + (settings.energy > 0)
    return waveforms.new_empty(waveforms.shape[0], frames, size, dtype=dtype), lengths.new_empty(lengths.shape)


_IMPLEMENTATIONS = register_op(
    "log_mel_fbank", reference.log_mel_fbank, fake=_fake, formula=gradient_of(reference.log_mel_fbank)
)
