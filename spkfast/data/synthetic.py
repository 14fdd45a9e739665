"""A corpus of synthetic voices, made by a small source-filter generator, for demonstrations without any download.

Speakers differ in voice alone (vocal-tract length, formants, glottal source, prosody); room, microphone, noise and
loudness are drawn per session, whoever speaks.

Reference: Fant, "Acoustic Theory of Speech Production", 1960; Klatt, "Software for a cascade/parallel formant
synthesizer", JASA 67(3), 1980, for the division into voicing, aspiration and frication.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np

from spkfast.errors import InputError

SAMPLE_RATE = 16000
# Part of the marker: raised whenever the same seed gives other samples.
VERSION = 1

_MARKER = "synthetic.json"
_HOP = 128
_FFT = 1024
_NUM_FORMANTS = 7

_Rng = np.random.Generator


@dataclasses.dataclass(frozen=True)
class _Phone:
    """Targets of one speech sound, for a vocal tract of 17 cm.

    ``voice``, ``breath`` and ``noise`` are the amplitudes of the glottal pulses, of aspiration through the whole tract
    and of frication, a resonance at ``noise_hz`` of width ``noise_width``.
    """

    formants: tuple[float, float, float]
    ms: float
    voice: float = 0.0
    breath: float = 0.0
    noise: float = 0.0
    noise_hz: float = 5000.0
    noise_width: float = 2000.0
    damping: float = 1.0


_PAUSE = "_"
_PHONES = {
    "i": _Phone((310, 2250, 2950), 95, voice=1.0),
    "I": _Phone((430, 1990, 2550), 75, voice=1.0),
    "e": _Phone((540, 1840, 2490), 95, voice=1.0),
    "ae": _Phone((660, 1720, 2430), 115, voice=1.0),
    "a": _Phone((740, 1200, 2480), 120, voice=1.0),
    "o": _Phone((560, 880, 2450), 110, voice=1.0),
    "U": _Phone((450, 1070, 2300), 75, voice=1.0),
    "u": _Phone((330, 900, 2260), 95, voice=0.9),
    "@": _Phone((520, 1420, 2480), 55, voice=0.8),
    "er": _Phone((480, 1350, 1700), 100, voice=0.9),
    "m": _Phone((270, 1000, 2200), 65, voice=0.35, damping=1.8),
    "n": _Phone((280, 1600, 2550), 60, voice=0.35, damping=1.8),
    "l": _Phone((370, 1050, 2700), 60, voice=0.5),
    "r": _Phone((350, 1150, 1520), 60, voice=0.5),
    "w": _Phone((310, 700, 2200), 60, voice=0.5),
    "j": _Phone((290, 2200, 3000), 55, voice=0.5),
    "s": _Phone((320, 1600, 2600), 100, noise=0.30, noise_hz=6200, noise_width=2200),
    "S": _Phone((320, 1800, 2600), 100, noise=0.36, noise_hz=3300, noise_width=1500),
    "f": _Phone((320, 1150, 2400), 85, noise=0.10, noise_hz=5500, noise_width=6000),
    "z": _Phone((300, 1600, 2600), 75, voice=0.3, noise=0.18, noise_hz=6000, noise_width=2200),
    "v": _Phone((300, 1150, 2400), 60, voice=0.4, noise=0.04, noise_hz=5500, noise_width=6000),
    "h": _Phone((520, 1500, 2500), 60, breath=0.6),
    "p.": _Phone((300, 900, 2300), 65),
    "t.": _Phone((300, 1700, 2700), 60),
    "k.": _Phone((300, 1900, 2400), 60),
    "p": _Phone((350, 950, 2300), 24, breath=0.4, noise=0.14, noise_hz=1400, noise_width=2500),
    "t": _Phone((350, 1700, 2700), 28, breath=0.3, noise=0.40, noise_hz=4500, noise_width=2500),
    "k": _Phone((350, 1900, 2400), 32, breath=0.4, noise=0.34, noise_hz=2100, noise_width=1000),
    "b.": _Phone((250, 900, 2300), 55, voice=0.12),
    "d.": _Phone((250, 1700, 2700), 50, voice=0.12),
    "g.": _Phone((250, 1900, 2400), 50, voice=0.12),
    "b": _Phone((300, 950, 2300), 10, voice=0.3, noise=0.10, noise_hz=1300, noise_width=2500),
    "d": _Phone((300, 1700, 2700), 12, voice=0.3, noise=0.20, noise_hz=4200, noise_width=2500),
    "g": _Phone((300, 1900, 2400), 14, voice=0.3, noise=0.20, noise_hz=2000, noise_width=1000),
    _PAUSE: _Phone((500, 1500, 2500), 260),
}
_NAMES = list(_PHONES)
_VOWELS = ("i", "I", "e", "ae", "a", "o", "U", "u", "@", "@", "er")
_ONSETS = (
    [[c] for c in "mnlrwjsSfzvh"] + [[f"{c}.", c] for c in "ptkbdg"] * 2 + [["s", "t.", "t"], ["t.", "t", "r"], []]
)
_CODAS: list[list[str]] = [[]] * 9 + [["n"], ["m"], ["l"], ["s"], ["z"], ["t.", "t"], ["k.", "k"], ["n", "d.", "d"]]


def _column(field: str) -> np.ndarray:
    return np.array([getattr(phone, field) for phone in _PHONES.values()])


_TABLE = {field.name: _column(field.name) for field in dataclasses.fields(_Phone)}


@dataclasses.dataclass(frozen=True)
class _Voice:
    """What stays the same whenever a speaker speaks."""

    f0: float  # Hz
    f0_range: float  # semitones
    jitter: float  # fraction of a period
    shimmer: float  # fraction of the amplitude
    tilt_hz: float  # cut-off of the glottal low-pass
    open_quotient: float
    breath: float
    rate: float  # durations are divided by it
    formants: np.ndarray  # factor per formant and phone, shape (phones, _NUM_FORMANTS)
    upper: np.ndarray  # Hz of the formants above the third, shape (_NUM_FORMANTS - 3,)
    bandwidth: np.ndarray  # factor per formant, shape (_NUM_FORMANTS,)
    noise: float  # factor on frication frequencies


def _draw_voice(rng: _Rng, short_tract: bool) -> _Voice:
    """A speaker: short tracts with high pitch, long ones with low pitch, both overlapping."""
    tract = (1.15 if short_tract else 1.0) * np.exp(rng.normal(0, 0.06))
    individual = np.exp(rng.normal(0, 0.042, _NUM_FORMANTS))
    idiolect = np.exp(rng.normal(0, 0.025, (len(_PHONES), _NUM_FORMANTS)))
    return _Voice(
        f0=(200.0 if short_tract else 115.0) * np.exp(rng.normal(0, 0.16)),
        f0_range=rng.uniform(1.0, 3.5),
        jitter=rng.uniform(0.001, 0.005),
        shimmer=rng.uniform(0.01, 0.06),
        tilt_hz=np.exp(rng.uniform(np.log(900), np.log(4000))),
        open_quotient=rng.uniform(0.45, 0.85),
        breath=np.exp(rng.uniform(np.log(0.01), np.log(0.12))),
        rate=np.exp(rng.normal(0, 0.1)),
        formants=tract * individual * idiolect,
        upper=np.array([3500.0, 4500.0, 5500.0, 6500.0]) * np.exp(rng.normal(0, 0.02, 4)),
        bandwidth=np.exp(rng.normal(0, 0.25, _NUM_FORMANTS)),
        noise=tract**0.7 * np.exp(rng.normal(0, 0.06)),
    )


@dataclasses.dataclass(frozen=True)
class _Session:
    """What one recording session adds: the speaker's state on the day, and the channel."""

    pitch: float  # factor on f0
    effort: float  # factor on the cut-off of the glottal low-pass
    rate: float
    impulse_response: np.ndarray
    microphone: np.ndarray  # gain at _FFT // 2 + 1 frequencies
    noise: np.ndarray  # magnitude at the same frequencies
    snr_db: float
    level_db: float  # full scale is 0


def _draw_session(rng: _Rng) -> _Session:
    hz = np.linspace(0, SAMPLE_RATE / 2, _FFT // 2 + 1)
    octaves = np.log2(np.maximum(hz, 40) / 40)
    waves = np.array([np.cos(np.pi * k * octaves / octaves[-1] + rng.uniform(0, 2 * np.pi)) for k in range(1, 7)])
    gain_db = rng.normal(0, 2.5, 6) @ waves + rng.normal(0, 1.0) * (octaves - octaves.mean())
    low, high = rng.uniform(40, 200), rng.uniform(4500, 7900)
    edges = 1 / np.sqrt((1 + (low / np.maximum(hz, 1)) ** 4) * (1 + (hz / high) ** 12))
    hum = 1 + 12 * np.exp(-0.5 * ((hz - rng.uniform(80, 400)) / 40) ** 2) * rng.uniform(0, 1)
    return _Session(
        pitch=np.exp(rng.normal(0, 0.05)),
        effort=np.exp(rng.normal(0, 0.25)),
        rate=np.exp(rng.normal(0, 0.08)),
        impulse_response=_room(rng),
        microphone=10 ** (gain_db / 20) * edges,
        noise=np.maximum(hz, 60) ** -rng.uniform(0, 1) * hum,
        snr_db=rng.uniform(10, 28),
        level_db=rng.uniform(-36, -20),
    )


def _room(rng: _Rng) -> np.ndarray:
    """Direct sound and a decaying tail, the treble decaying faster than the bass."""
    seconds = rng.uniform(0.12, 0.5)  # until the tail has fallen by 60 dB
    t = np.arange(int(0.8 * seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tail = np.zeros(len(t))
    for slope, treble in ((6.9, 0.0), (11.0, 1.0)):
        white = rng.standard_normal(len(t))
        smooth = np.convolve(white, np.hanning(9)[1:-1] / 2, mode="same")
        tail += (smooth if treble == 0 else white - smooth) * np.exp(-slope * t / seconds)
    tail[: int(rng.uniform(0.001, 0.004) * SAMPLE_RATE)] = 0
    ratio = 10 ** (-rng.uniform(4, 18) / 20)
    tail *= ratio / np.sqrt((tail**2).sum())
    tail[0] = 1.0
    return tail


def _utterance(rng: _Rng, voice: _Voice, session: _Session, seconds: float) -> np.ndarray:
    """One utterance as float samples, shape (S,)."""
    phones, frames, stress = _phrase(rng, voice.rate * session.rate, seconds)
    per_frame = np.repeat(phones, frames)
    f0 = _melody(rng, per_frame, np.repeat(stress, frames), voice.f0_range) * voice.f0 * session.pitch
    clean = _synthesise(rng, voice, session, per_frame, f0)
    return _record(rng, clean, session)


def _phrase(rng: _Rng, rate: float, seconds: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random syllables: phone numbers, their durations in frames, and which belong to stressed syllables."""
    names: list[str] = []
    stress: list[bool] = []
    total_ms, syllables_left = 0.0, int(rng.integers(5, 12))
    while total_ms < seconds * 1000:
        if syllables_left == 0:
            syllable, syllables_left = [_PAUSE], int(rng.integers(5, 12))
        else:
            onset, coda = _ONSETS[rng.integers(len(_ONSETS))], _CODAS[rng.integers(len(_CODAS))]
            syllable, syllables_left = [*onset, _VOWELS[rng.integers(len(_VOWELS))], *coda], syllables_left - 1
        names += syllable
        stress += [rng.random() < 0.35] * len(syllable)
        total_ms += sum(_PHONES[name].ms for name in syllable) / rate
    phones = np.array([_NAMES.index(name) for name in names])
    stressed = np.array(stress)
    ms = _TABLE["ms"][phones] / rate * np.exp(rng.normal(0, 0.15, len(phones))) * np.where(stressed, 1.25, 1.0)
    return phones, np.maximum(1, np.round(ms * SAMPLE_RATE / 1000 / _HOP)).astype(int), stressed


def _melody(rng: _Rng, phones: np.ndarray, stress: np.ndarray, semitones: float) -> np.ndarray:
    """Pitch per frame as a factor: it falls over each phrase, rises on stressed syllables, and wavers."""
    pause = phones == _NAMES.index(_PAUSE)
    starts = np.flatnonzero(np.r_[True, pause[:-1] & ~pause[1:]])
    length = np.diff(np.r_[starts, len(phones)])
    falling = np.concatenate([np.linspace(1, -1, n) for n in length])
    accents = _smooth(stress * rng.uniform(0.5, 1.5), 17)
    wander = _smooth(rng.standard_normal(len(phones)), 25) * 2 + _smooth(rng.standard_normal(len(phones)), 5) * 0.25
    return 2 ** ((semitones * (0.8 * falling + 1.2 * accents - 0.4) + 0.6 * wander) / 12)


def _synthesise(rng: _Rng, voice: _Voice, session: _Session, phones: np.ndarray, f0: np.ndarray) -> np.ndarray:
    """Pulses and noise through the vocal tract, frame by frame in the frequency domain."""
    num = len(phones) * _HOP
    tracks = {name: _TABLE[name][phones] for name in ("voice", "breath", "noise", "noise_hz", "noise_width", "damping")}
    centre = _TABLE["formants"][phones] * voice.formants[phones, :3]
    above = voice.upper * voice.formants[phones, 3:]
    # Articulators move over some 70 ms, which is what makes formant transitions; amplitudes change faster.
    centre = _smooth(np.concatenate([centre, above], axis=1), 9)
    width = (50 + 0.03 * centre) * voice.bandwidth * _smooth(tracks["damping"], 5)[:, None]
    tract = _resonators(np.minimum(centre, 0.97 * SAMPLE_RATE / 2), width)
    friction = _resonators((tracks["noise_hz"] * voice.noise).clip(300, 7500)[:, None], tracks["noise_width"][:, None])

    at = np.arange(num) / _HOP
    amplitude = {
        name: np.interp(at, np.arange(len(phones)), _smooth(tracks[name], 3)) for name in ("voice", "breath", "noise")
    }
    pulses, openness = _pulses(rng, np.interp(at, np.arange(len(phones)), f0), voice)
    white = rng.standard_normal((2, num))
    glottal = _glottis(voice, session, float(f0.mean()))
    aspiration = white[0] * (amplitude["voice"] * openness * voice.breath + amplitude["breath"] * 0.12)
    voiced = _spectra(pulses * amplitude["voice"]) * glottal + _spectra(aspiration)
    spectrum = voiced * tract + _spectra(white[1] * amplitude["noise"] * 0.5) * friction
    return _overlap_add(spectrum)


def _pulses(rng: _Rng, f0: np.ndarray, voice: _Voice) -> tuple[np.ndarray, np.ndarray]:
    """Glottal closures as band-limited impulses, and how far the glottis is open, per sample."""
    phase = np.cumsum(f0) / SAMPLE_RATE
    count = int(phase[-1])
    position = np.interp(np.arange(1, count), phase, np.arange(len(phase)))
    position += rng.normal(0, voice.jitter, count - 1) * SAMPLE_RATE / f0[position.astype(int)]
    strength = 1 + voice.shimmer * rng.standard_normal(count - 1)
    # Pulses of a low voice are rarer but carry more energy each, so that loudness does not follow pitch.
    strength /= np.sqrt(f0[position.clip(0, len(f0) - 1).astype(int)] / SAMPLE_RATE)
    taps = np.floor(position).astype(int)[:, None] + np.arange(-3, 5)
    offset = taps - position[:, None]
    kernel = np.sinc(offset) * np.cos(np.pi * offset / 9) ** 2
    inside = (taps >= 0) & (taps < len(f0))
    train = np.bincount(taps[inside], (kernel * strength[:, None])[inside], minlength=len(f0))
    openness = np.maximum(0.15, np.sin(np.pi * ((phase % 1) / voice.open_quotient).clip(0, 1)))
    return train, openness


def _glottis(voice: _Voice, session: _Session, f0: float) -> np.ndarray:
    """Spectrum of the glottal flow derivative: a resonance near the pitch, and a tilt that vocal effort flattens."""
    z = np.exp(-2j * np.pi * np.arange(_FFT // 2 + 1) / _FFT)
    pole = np.exp(-np.pi * f0 / voice.open_quotient / SAMPLE_RATE)
    tilt = np.exp(-2 * np.pi * voice.tilt_hz * session.effort / SAMPLE_RATE)
    return (1 - z) * (1 - pole) ** 0.5 / (1 - pole * z) ** 2 * (1 - tilt) / (1 - tilt * z)


def _resonators(hz: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Response of resonances in cascade, unit gain at the lowest frequency: (frames, resonances) -> (frames, bins)."""
    radius = np.exp(-np.pi * width / SAMPLE_RATE)
    first = -2 * radius * np.cos(2 * np.pi * hz / SAMPLE_RATE)
    second = radius**2
    poles = np.zeros((len(hz), 2 * hz.shape[1] + 1))
    poles[:, 0] = 1
    for k in range(hz.shape[1]):
        last = poles.copy()
        poles[:, 1:] += first[:, k, None] * last[:, :-1]
        poles[:, 2:] += second[:, k, None] * last[:, :-2]
    gain = poles.sum(axis=1) if hz.shape[1] > 1 else (1 - radius[:, 0])
    return gain[:, None] / np.fft.rfft(poles, _FFT)


def _spectra(signal: np.ndarray) -> np.ndarray:
    """Spectra of Hann windows of two hops, which add up to the signal: (S,) -> (S / hop, bins)."""
    padded = np.concatenate([np.zeros(_HOP), signal]).reshape(-1, _HOP)
    window = np.sin(np.pi * (np.arange(2 * _HOP) + 0.5) / (2 * _HOP)) ** 2
    return np.fft.rfft(np.concatenate([padded[:-1], padded[1:]], axis=1) * window, _FFT)


def _overlap_add(spectrum: np.ndarray) -> np.ndarray:
    pieces = np.fft.irfft(spectrum, _FFT).reshape(len(spectrum), -1, _HOP)
    out = np.zeros((len(spectrum) + pieces.shape[1], _HOP))
    for k in range(pieces.shape[1]):
        out[k : k + len(pieces)] += pieces[:, k]
    return out.reshape(-1)[_HOP : -_FFT + _HOP]


def _record(rng: _Rng, clean: np.ndarray, session: _Session) -> np.ndarray:
    """The voice in the session's room, with its noise, through its microphone."""
    size = 1 << (len(clean) + len(session.impulse_response) - 1).bit_length()
    hz = np.linspace(0, 1, size // 2 + 1)
    shape = np.linspace(0, 1, _FFT // 2 + 1)
    speech = np.fft.rfft(clean, size) * np.fft.rfft(session.impulse_response, size)
    noise = np.fft.rfft(rng.standard_normal(size)) * np.interp(hz, shape, session.noise)
    noise *= np.sqrt((np.abs(speech) ** 2).sum() / (np.abs(noise) ** 2).sum() * size / len(clean)) * 10 ** (
        -session.snr_db / 20
    )
    samples = np.fft.irfft((speech + noise) * np.interp(hz, shape, session.microphone), size)[: len(clean)]
    samples *= 10 ** (session.level_db / 20) / np.sqrt((samples**2).mean())
    return samples / max(1.0, np.abs(samples).max() / 0.98)


def _smooth(track: np.ndarray, frames: int) -> np.ndarray:
    """Hann-weighted moving average along the first axis, edges held."""
    kernel = np.hanning(frames + 2)[1:-1]
    half = frames // 2
    padded = np.pad(np.asarray(track, dtype=float), [(half, half)] + [(0, 0)] * (track.ndim - 1), mode="edge")
    return np.tensordot(kernel / kernel.sum(), np.stack([padded[k : k + len(track)] for k in range(frames)]), axes=1)


def make_corpus(
    folder: str | os.PathLike[str],
    *,
    num_speakers: int = 80,
    test_speakers: int = 24,
    utterances_per_speaker: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a corpus of synthetic speakers, or leave the one that is there where it was made with the same arguments.

    The folder holds ``<speaker>/<session>/<utterance>.flac`` (16 kHz, mono, 16 bits, 2 to 4 s), ``train_list.txt``
    (lines ``speaker path``) and ``trials.txt`` (lines ``label path path``, of speakers that are not in the training
    list). Every target trial pairs two sessions; there are as many non-target trials, between voices of the same kind
    (high or low) as far as there are enough. The folder appears complete or not at all.

    Args:
        folder: Where to write: absent, empty, or an earlier synthetic corpus, replaced if its arguments differ.
        num_speakers: Speakers to train on.
        test_speakers: Further speakers, for the trials; at least 2.
        utterances_per_speaker: At least 2; they are spread over half as many sessions (at least 2).
        seed: The same seed gives the same samples.
        progress: Called with the number of utterances done and their total.

    Returns:
        The folder.

    Raises:
        InputError: If a count is too small, or the folder holds other files.
    """
    for name, value, least in (
        ("num_speakers", num_speakers, 1),
        ("test_speakers", test_speakers, 2),
        ("utterances_per_speaker", utterances_per_speaker, 2),
        ("seed", seed, 0),
    ):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    marker = {
        "synthetic": True,
        "version": VERSION,
        "num_speakers": num_speakers,
        "test_speakers": test_speakers,
        "utterances_per_speaker": utterances_per_speaker,
        "seed": seed,
    }
    target = Path(folder)
    if _is_current(target, marker):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = Path(scratch) / "corpus"
        paths = _write_audio(made, num_speakers + test_speakers, utterances_per_speaker, seed, progress)
        _write_lines(
            made / "train_list.txt", (f"{path.split('/')[0]} {path}" for own in paths[:num_speakers] for path in own)
        )
        _write_lines(made / "trials.txt", _trials(paths[num_speakers:], np.random.default_rng([seed, 2])))
        (made / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)
    return target


def _is_current(folder: Path, marker: dict[str, int | bool]) -> bool:
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder for the synthetic corpus")
    if not any(folder.iterdir()):
        return False
    try:
        found = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if not (isinstance(found, dict) and found.get("synthetic")):
        raise InputError(f"{folder}: holds other files than a synthetic corpus; name an empty or new folder")
    return found == marker


def _write_audio(
    folder: Path, num_speakers: int, utterances: int, seed: int, progress: Callable[[int, int], None] | None
) -> list[list[str]]:
    """Write every utterance; the relative paths per speaker."""
    sessions = max(2, utterances // 2)
    paths = [
        [f"s{s + 1:03d}/r{u % sessions + 1}/u{u + 1:02d}.flac" for u in range(utterances)] for s in range(num_speakers)
    ]
    done, total = 0, num_speakers * utterances
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(_write_session, folder, seed, s, r, paths[s][r::sessions])
            for s in range(num_speakers)
            for r in range(sessions)
        ]
        try:
            for job in jobs:
                done += job.result()
                if progress is not None:
                    progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)
    return paths


def _write_session(folder: Path, seed: int, speaker: int, session: int, paths: list[str]) -> int:
    import soundfile

    voice = _draw_voice(np.random.default_rng([seed, 0, speaker]), short_tract=speaker % 2 == 0)
    rng = np.random.default_rng([seed, 1, speaker, session])
    channel = _draw_session(rng)
    for path in paths:
        samples = _utterance(rng, voice, channel, rng.uniform(2.0, 4.0))
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, samples, SAMPLE_RATE, subtype="PCM_16")
    return len(paths)


def _trials(paths: list[list[str]], rng: _Rng) -> list[str]:
    """Every target across sessions, and as many non-targets, those of alike voices first; in random order."""

    def session(path: str) -> str:
        return path.rsplit("/", 1)[0]

    targets = [(a, b) for own in paths for a, b in combinations(own, 2) if session(a) != session(b)]
    alike: list[tuple[str, str]] = []
    mixed: list[tuple[str, str]] = []
    for (i, own), (j, other) in combinations(enumerate(paths), 2):
        (alike if (i - j) % 2 == 0 else mixed).extend((a, b) for a in own for b in other)
    nontargets = [pairs[k] for pairs in (alike, mixed) for k in rng.permutation(len(pairs))][: len(targets)]
    lines = [f"1 {a} {b}" for a, b in targets] + [f"0 {a} {b}" for a, b in nontargets]
    return [lines[k] for k in rng.permutation(len(lines))]


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
