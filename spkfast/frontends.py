"""FrontendSpec: every setting of an acoustic front-end that changes a number, with presets and a stable hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
from typing import Any

from spkfast.errors import InputError, nearest

_CHOICES = {
    "waveform_norm": ("none", "mean_std", "instance"),
    "preemphasis_mode": ("frame", "signal", "signal_zero"),
    "window": ("hamming", "hann", "povey", "blackman", "rectangular"),
    "pad_mode": ("reflect", "constant", "none"),
    "power": (1.0, 2.0),
    "mel_scale": ("kaldi", "htk", "slaney", "speechbrain", "redimnet2"),
    "mel_norm": ("none", "slaney"),
    "log": ("ln", "db", "none"),
}
# Fields that came after the first release of the hash: they count where they differ from their defaults, so that a
# front-end which does not use them keeps its hash.
_ADDED_FIELDS = ("pad_samples", "drop_last_frame", "var_eps")


@dataclasses.dataclass(frozen=True)
class FrontendSpec:
    """Settings of a front-end, in the order in which they act on the signal.

    Attributes:
        sample_rate: Sampling rate in Hz.
        sample_scale: Factor on samples in [-1, 1] before anything else; 32768 gives the 16-bit range of Kaldi.
        waveform_norm: Utterance-level waveform normalisation, first of all: ``none``; ``mean_std``, zero mean and unit
            standard deviation, to which 1e-8 is added; ``instance``, the same with 1e-4 added to the variance instead.
            Both are biased.
        preemphasis: Pre-emphasis coefficient; 0 switches it off.
        preemphasis_mode: ``frame`` filters each frame (first sample against itself, Kaldi); ``signal`` the waveform,
            with its second sample reflected before the first; ``signal_zero`` the waveform with a zero before it.
        remove_dc: Subtract the mean of each frame, before pre-emphasis.
        frame_length_ms: Window length in milliseconds.
        frame_shift_ms: Hop in milliseconds.
        n_fft: FFT size; 0 means the window length. Shorter frames are padded with zeros.
        round_to_power_of_two: Round ``n_fft`` up to a power of two.
        window: ``hamming``, ``hann``, ``povey``, ``blackman`` or ``rectangular``.
        window_periodic: Periodic instead of symmetric window.
        snip_edges: Only frames that lie wholly inside the signal; else one per hop, centred on its middle, the signal
            reflected at its ends with the edge repeated (Kaldi). Does not count where ``center`` is set.
        pad_samples: Samples by which the signal is padded at each end before edges are snipped: reflected, or zeros
            with the other values of ``pad_mode``. Counts only where ``snip_edges`` does.
        center: The window in the middle of a frame of ``n_fft`` samples, as STFT functions place it.
        pad_mode: Padding of the signal by half of ``n_fft`` where ``center`` is set: ``reflect``, ``constant`` (zeros)
            or ``none``, which leaves frames that lie wholly inside. A signal too short for one reflection is
            reflected again.
        drop_last_frame: Leave the last frame out, which with ``center`` lies half past the end (NeMo).
        power: Exponent on the magnitude spectrum: 2 for power, 1 for magnitude.
        spectrum_clip: Lower and upper bound on the spectrum, and again on the filter outputs, or None.
        n_mels: Mel bins; 0 keeps the plain spectrum.
        mel_scale: ``kaldi``, triangles over the mel axis without the Nyquist bin; ``htk``, the same mels with triangles
            over hertz; ``speechbrain``, those with both sides as wide as the left one; ``slaney``, Slaney's mels
            with triangles over hertz; ``redimnet2``, ``kaldi`` with its bins stretched until the last one below the
            Nyquist frequency lies on it.
        mel_norm: Area normalisation of the filters: ``none`` or ``slaney``.
        f_min: Lower edge of the lowest filter in Hz.
        f_max: Upper edge of the highest filter in Hz; 0 or less is counted from the Nyquist frequency.
        use_energy: Prepend the log energy of the frame.
        raw_energy: Take that energy before the pre-emphasis of frames and the window.
        energy_floor: Lower bound on that energy, at least 2**-23.
        htk_compat: Put the energy, or the zeroth cepstrum times the square root of 2, last.
        num_ceps: Cepstra kept after a DCT; 0 keeps log-mel. The energy replaces the zeroth.
        cepstral_lifter: Lifter coefficient of the cepstra; 0 for none.
        log: ``ln``, ``db`` (10 log10) or ``none``.
        log_floor: Lower bound before the logarithm.
        log_offset: Constant added before the logarithm.
        top_db: Floor this far below the maximum of the utterance, in the unit of the features, or None.
        mean_norm: Subtract the mean over the frames of the utterance, per bin.
        std_norm: Divide by the standard deviation over the frames of the utterance, per bin.
        std_unbiased: Unbiased standard deviation; that of a single frame is taken as 0.
        var_eps: Added to the variance.
        std_eps: Added to the standard deviation.
        pad_frames_to: Zero-pad the number of frames to a multiple of this; 1 for none. NeMo counts the frame that
            ``drop_last_frame`` leaves out here, and so has one more multiple of zeros at some lengths.
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
    pad_samples: int = 0
    center: bool = False
    pad_mode: str = "reflect"
    drop_last_frame: bool = False
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
    var_eps: float = 0.0
    std_eps: float = 0.0
    pad_frames_to: int = 1
    dither: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.spectrum_clip, list):  # as YAML and JSON give it
            object.__setattr__(self, "spectrum_clip", tuple(self.spectrum_clip))
        clip: Any = self.spectrum_clip
        if clip is not None and not (
            isinstance(clip, tuple)
            and len(clip) == 2
            and all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in clip)
            and 0 <= clip[0] < clip[1]
        ):
            raise InputError(f"spectrum_clip must be two finite rising bounds or null, got {clip!r}")
        self._check_types()
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        for name in ("sample_rate", "sample_scale", "frame_length_ms", "frame_shift_ms"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in (
            "n_fft", "pad_samples", "n_mels", "num_ceps", "energy_floor", "log_floor", "log_offset", "cepstral_lifter",
            "top_db", "var_eps", "std_eps", "dither",
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)!r}")
        if self.pad_frames_to < 1:
            raise InputError(f"pad_frames_to must be at least 1, got {self.pad_frames_to}")
        if self.num_ceps > self.n_mels:
            raise InputError(f"num_ceps={self.num_ceps} cepstra need as many mel bins, n_mels is {self.n_mels}")
        if self.mel_scale == "redimnet2" and self.fft_size < 4:
            raise InputError(f"mel_scale='redimnet2' needs an FFT of 4 points or more, n_fft gives {self.fft_size}")
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
            name = str(field.type).split(" | ")[0]
            value: Any = getattr(self, field.name)
            allowed: Any = {"int": numbers.Integral, "float": numbers.Real, "bool": bool, "str": str}.get(name)
            if allowed is None or (value is None and "None" in str(field.type)):
                continue
            wrong_bool = isinstance(value, bool) and name != "bool"
            if wrong_bool or not isinstance(value, allowed) or (name == "float" and not math.isfinite(float(value))):
                raise InputError(f"{field.name} must be of type {field.type} and finite, got {value!r}")
            if name in ("int", "float"):  # numpy's numbers too
                object.__setattr__(
                    self, field.name, int(value) if isinstance(value, numbers.Integral) else float(value)
                )

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
        fields, defaults = self.to_dict(), {field.name: field.default for field in dataclasses.fields(self)}
        counted = {k: v for k, v in fields.items() if k not in _ADDED_FIELDS or v != defaults[k]}
        text = json.dumps(counted, sort_keys=True, separators=(",", ":"))
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
        if not isinstance(fields, dict):
            raise InputError(f"the fields of a front-end must be a mapping, got {fields!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in map(str, fields):
            if name not in known:
                raise InputError(f"unknown front-end field {name!r}{nearest(name, known)}")
        return cls(**fields)

    def difference(self, other: FrontendSpec) -> str:
        """Fields in which two specs differ, as text: ``window: 'hamming' here, 'povey' there``."""
        mine, theirs = self.to_dict(), other.to_dict()
        return "; ".join(f"{k}: {mine[k]!r} here, {theirs[k]!r} there" for k in mine if mine[k] != theirs[k])


_SIGNAL_STFT = {  # a power STFT of the padded waveform, as torch users write it
    "sample_scale": 1.0, "preemphasis_mode": "signal", "remove_dc": False, "n_fft": 512, "window": "hamming",
    "window_periodic": True, "center": True, "mel_scale": "htk", "log_floor": 0.0, "log_offset": 1e-6,
}  # fmt: skip
_INSTANCE_NORM = {"mean_norm": True, "std_norm": True, "var_eps": 1e-5}
_CLOVA = {**_SIGNAL_STFT, **_INSTANCE_NORM, "f_min": 0.0, "n_mels": 40}

_PRESETS: dict[str, dict[str, Any]] = {
    "kaldi": {},
    "wespeaker": {"window": "hamming", "mean_norm": True},
    "3dspeaker": {"sample_scale": 1.0, "mean_norm": True},
    "speechbrain": {
        "sample_scale": 1.0, "preemphasis": 0.0, "remove_dc": False, "n_fft": 400, "round_to_power_of_two": False,
        "window": "hamming", "window_periodic": True, "center": True, "pad_mode": "constant",
        "mel_scale": "speechbrain", "f_min": 0.0, "log": "db", "log_floor": 1e-10, "top_db": 80.0, "mean_norm": True,
    },
    "taoruijie": {**_SIGNAL_STFT, "f_max": 7600.0, "mean_norm": True},
    "clova_l": {**_CLOVA, "preemphasis": 0.0},
    "clova_v2": {**_CLOVA, "n_mels": 64},
    "vgg": {**_CLOVA, "preemphasis": 0.0, "window": "hann"},
    "thin": {
        **_CLOVA, "sample_scale": 32768.0, "preemphasis": 0.0, "window": "hann", "pad_mode": "none", "power": 1.0,
        "n_mels": 0, "log": "none", "log_offset": 0.0,
    },
    "redimnet": {**_SIGNAL_STFT, "f_max": 7600.0, "n_mels": 72, "mean_norm": True},
    "redimnet2": {
        "sample_scale": 1.0, "waveform_norm": "mean_std", "preemphasis_mode": "signal", "remove_dc": False,
        "window": "hamming", "pad_samples": 80, "pad_mode": "constant", "spectrum_clip": (1e-8, 1e8), "n_mels": 72,
        "mel_scale": "redimnet2", "f_max": 7600.0, "log_floor": 0.0, "log_offset": 1e-8, "mean_norm": True,
    },
    "titanet": {
        "sample_scale": 1.0, "preemphasis_mode": "signal_zero", "remove_dc": False, "n_fft": 512, "window": "hann",
        "center": True, "pad_mode": "constant", "drop_last_frame": True, "mel_scale": "slaney", "mel_norm": "slaney",
        "f_min": 0.0, "log_floor": 0.0, "log_offset": 2.0**-24, "mean_norm": True, "std_norm": True,
        "std_unbiased": True, "std_eps": 1e-5, "pad_frames_to": 16, "dither": 1e-5,
    },
    "mfcc": {"n_mels": 23, "num_ceps": 13},
}  # fmt: skip
_PRESETS["espnet"] = _PRESETS["taoruijie"]


def frontend(preset: str, **fields: Any) -> FrontendSpec:
    """The front-end of a toolkit, with any field replaced by keyword.

    Args:
        preset: ``kaldi``, ``wespeaker``, ``3dspeaker``, ``speechbrain``, ``taoruijie`` (the same as ``espnet``),
            ``clova_l`` and ``clova_v2`` (voxceleb_trainer's ResNetSE34L and V2), ``vgg`` (its VGGVox), ``thin`` (its
            Thin ResNet-34), ``redimnet``, ``redimnet2``, ``titanet`` or ``mfcc`` (Kaldi's, the zeroth cepstrum in
            the place where ``compute-mfcc-feats`` puts the energy unless told otherwise: ``use_energy``). ``dither`` is
            0 in all but ``titanet``, also where a toolkit trains with 1.
        **fields: Fields of :class:`FrontendSpec`.

    Raises:
        InputError: If the preset or a field is unknown.
    """
    if preset not in _PRESETS:
        known = sorted(_PRESETS)
        raise InputError(f"unknown front-end preset {preset!r}{nearest(preset, known)}; known: {', '.join(known)}")
    return FrontendSpec.from_dict({**_PRESETS[preset], **fields})


def require_spec(spec: object) -> None:
    """Refuses what is no FrontendSpec, with a word on how to get one.

    Raises:
        InputError: Where ``spec`` is anything else, such as the name of a preset.
    """
    if not isinstance(spec, FrontendSpec):
        raise InputError(f"spec must be a FrontendSpec, as spkfast.frontend('wespeaker') gives one, got {spec!r}")
