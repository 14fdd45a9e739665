"""FrontendSpec: every setting of an acoustic front-end that changes a number, with presets and a stable hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

from spkfast.errors import InputError, nearest

_PREEMPHASIS_MODES = ("frame", "signal")
_WINDOWS = ("hamming", "hann", "povey", "rectangular")
_LOGS = ("ln", "db", "none")


@dataclasses.dataclass(frozen=True)
class FrontendSpec:
    """Settings of a front-end, in the order in which they act on the signal.

    Attributes:
        sample_rate: Sampling rate in Hz.
        sample_scale: Factor on samples in [-1, 1] before anything else; 32768 gives the 16-bit range of Kaldi.
        waveform_norm: Utterance-level waveform normalisation: ``none``, ``mean_std`` or ``instance``.
        preemphasis: Pre-emphasis coefficient; 0 switches it off.
        preemphasis_mode: ``frame`` filters each frame (first sample against itself, Kaldi), ``signal`` the waveform.
        remove_dc: Subtract the mean of each frame, before pre-emphasis.
        frame_length_ms: Window length in milliseconds.
        frame_shift_ms: Hop in milliseconds.
        n_fft: FFT size; 0 means the window length.
        round_to_power_of_two: Round ``n_fft`` up to a power of two.
        window: ``hamming``, ``hann``, ``povey`` or ``rectangular``.
        window_periodic: Periodic instead of symmetric window.
        snip_edges: Only frames that lie wholly inside the signal (Kaldi).
        center: Frames centred on multiples of the hop, the signal padded at both ends.
        pad_mode: Padding where ``center`` is set: ``reflect`` or ``constant``.
        power: Exponent on the magnitude spectrum: 2 for power, 1 for magnitude.
        spectrum_clip: Lower and upper bound on the spectrum, or None.
        n_mels: Mel bins; 0 keeps the plain spectrum.
        mel_scale: ``kaldi``, ``htk`` or ``slaney``.
        mel_norm: Area normalisation of the filters: ``none`` or ``slaney``.
        f_min: Lower edge of the lowest filter in Hz.
        f_max: Upper edge of the highest filter in Hz; 0 or less is counted from the Nyquist frequency.
        use_energy: Prepend the log energy of the frame.
        raw_energy: Take that energy before pre-emphasis and windowing.
        energy_floor: Lower bound on that energy.
        htk_compat: Put the energy last.
        num_ceps: Cepstra kept after a DCT; 0 keeps log-mel.
        cepstral_lifter: Lifter coefficient of the cepstra.
        log: ``ln``, ``db`` (10 log10) or ``none``.
        log_floor: Lower bound before the logarithm.
        log_offset: Constant added before the logarithm.
        top_db: Floor below the utterance maximum in decibels, or None.
        mean_norm: Subtract the mean over the frames of the utterance, per bin.
        std_norm: Divide by the standard deviation over the frames of the utterance, per bin.
        std_unbiased: Unbiased standard deviation.
        std_eps: Added to the standard deviation.
        pad_frames_to: Zero-pad the number of frames to a multiple of this; 1 for none.
        dither: Standard deviation of the noise added in training, in units of the scaled samples.
    """

    sample_rate: int = 16000
    sample_scale: float = 32768.0
    waveform_norm: str = "none"
    preemphasis: float = 0.97
    preemphasis_mode: str = "frame"
    remove_dc: bool = True
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    n_fft: int = 0
    round_to_power_of_two: bool = True
    window: str = "povey"
    window_periodic: bool = False
    snip_edges: bool = True
    center: bool = False
    pad_mode: str = "reflect"
    power: float = 2.0
    spectrum_clip: tuple[float, float] | None = None
    n_mels: int = 80
    mel_scale: str = "kaldi"
    mel_norm: str = "none"
    f_min: float = 20.0
    f_max: float = 0.0
    use_energy: bool = False
    raw_energy: bool = True
    energy_floor: float = 0.0
    htk_compat: bool = False
    num_ceps: int = 0
    cepstral_lifter: float = 22.0
    log: str = "ln"
    log_floor: float = 1.1920928955078125e-07
    log_offset: float = 0.0
    top_db: float | None = None
    mean_norm: bool = False
    std_norm: bool = False
    std_unbiased: bool = False
    std_eps: float = 0.0
    pad_frames_to: int = 1
    dither: float = 0.0

    def __post_init__(self) -> None:
        if self.spectrum_clip is not None:  # YAML and JSON give a list
            object.__setattr__(self, "spectrum_clip", tuple(self.spectrum_clip))
        self._check_types()
        for name, allowed in (("preemphasis_mode", _PREEMPHASIS_MODES), ("window", _WINDOWS), ("log", _LOGS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("sample_rate", "sample_scale", "frame_length_ms", "frame_shift_ms"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.frame_length < 2:
            raise InputError(f"frame_length_ms={self.frame_length_ms} is less than 2 samples at {self.sample_rate} Hz")
        if 0 < self.n_fft < self.frame_length:
            raise InputError(f"n_fft={self.n_fft} is shorter than the frame of {self.frame_length} samples")
        if not 0 <= self.f_min < self.high_frequency <= self.sample_rate / 2:
            raise InputError(
                f"f_min={self.f_min} and f_max={self.f_max} do not span a band below the Nyquist frequency "
                f"{self.sample_rate / 2}"
            )

    def _check_types(self) -> None:
        """A YAML file may hold anything; ``'16000'`` or ``yes`` must not get as far as an arithmetic error."""
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), str(field.type).split(" | ")[0]
            allowed = {"int": int, "float": int | float, "bool": bool, "str": str}.get(name)
            if allowed is None or (value is None and "None" in str(field.type)):
                continue
            wrong_bool = isinstance(value, bool) and name != "bool"
            if wrong_bool or not isinstance(value, allowed) or (name == "float" and not math.isfinite(float(value))):
                raise InputError(f"{field.name} must be of type {field.type} and finite, got {value!r}")

    @property
    def frame_length(self) -> int:
        """Window length in samples."""
        return int(self.sample_rate * self.frame_length_ms / 1000)

    @property
    def frame_shift(self) -> int:
        """Hop in samples."""
        return max(1, int(self.sample_rate * self.frame_shift_ms / 1000))

    @property
    def fft_size(self) -> int:
        """FFT size after rounding."""
        size = self.n_fft or self.frame_length
        return 2 ** math.ceil(math.log2(size)) if self.round_to_power_of_two else size

    @property
    def high_frequency(self) -> float:
        """Upper edge of the highest filter in Hz."""
        return self.f_max if self.f_max > 0 else self.sample_rate / 2 + self.f_max

    @property
    def output_size(self) -> int:
        """Values per frame."""
        if self.num_ceps:
            return self.num_ceps
        return (self.n_mels or self.fft_size // 2 + 1) + int(self.use_energy)

    @property
    def hash(self) -> str:
        """Stable hex digest of all fields."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, for YAML and JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # 16000 and 16000.0 are the same setting and must hash alike, whatever a YAML file wrote.
        types = {field.name: field.type for field in dataclasses.fields(self)}
        out: dict[str, Any] = {}
        for name, value in fields.items():
            if value is not None and str(types[name]).startswith("float"):
                value = float(value)
            elif isinstance(value, tuple):
                value = [float(bound) for bound in value]
            out[name] = value
        return out

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> FrontendSpec:
        """The spec with these fields; fields left out keep their defaults.

        Raises:
            InputError: If a field is unknown or has no sensible value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise InputError(f"unknown front-end field {name!r}{nearest(name, known)}")
        return cls(**fields)

    def difference(self, other: FrontendSpec) -> str:
        """Fields in which two specs differ, as text: ``window: 'hamming' here, 'povey' there``."""
        mine, theirs = self.to_dict(), other.to_dict()
        return "; ".join(f"{k}: {mine[k]!r} here, {theirs[k]!r} there" for k in mine if mine[k] != theirs[k])


_PRESETS: dict[str, dict[str, Any]] = {
    "kaldi": {"sample_scale": 32768.0, "window": "povey"},
    "wespeaker": {"sample_scale": 32768.0, "window": "hamming", "mean_norm": True},
    "3dspeaker": {"sample_scale": 1.0, "window": "povey", "mean_norm": True},
}


def frontend(preset: str, **fields: Any) -> FrontendSpec:
    """The front-end of a toolkit, with any field replaced by keyword.

    Args:
        preset: ``kaldi``, ``wespeaker`` or ``3dspeaker``.
        **fields: Fields of :class:`FrontendSpec`.

    Raises:
        InputError: If the preset or a field is unknown.
    """
    if preset not in _PRESETS:
        raise InputError(f"unknown front-end preset {preset!r}; known: {', '.join(sorted(_PRESETS))}")
    return FrontendSpec.from_dict({**_PRESETS[preset], **fields})
