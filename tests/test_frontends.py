"""FrontendSpec: presets, derived sizes, hash, dictionaries, messages."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import spkfast
from spkfast import FrontendSpec, InputError
from spkfast.reference.log_mel_fbank import fbank_tables

# The order is part of the contract: it is the order in which they act.
FIELDS = [
    "sample_rate", "sample_scale", "waveform_norm", "preemphasis", "preemphasis_mode", "remove_dc", "frame_length_ms",
    "frame_shift_ms", "n_fft", "round_to_power_of_two", "window", "window_periodic", "snip_edges", "center",
    "pad_mode", "power", "spectrum_clip", "n_mels", "mel_scale", "mel_norm", "f_min", "f_max", "use_energy",
    "raw_energy", "energy_floor", "htk_compat", "num_ceps", "cepstral_lifter", "log", "log_floor", "log_offset",
    "top_db", "mean_norm", "std_norm", "std_unbiased", "std_eps", "pad_frames_to", "dither",
]  # fmt: skip


def test_fields_are_the_contract():
    assert [field.name for field in dataclasses.fields(FrontendSpec)] == FIELDS


def test_presets():
    wespeaker, kaldi, speaker3d = map(spkfast.frontend, ("wespeaker", "kaldi", "3dspeaker"))
    assert (wespeaker.window, wespeaker.sample_scale, wespeaker.mean_norm) == ("hamming", 32768.0, True)
    assert (kaldi.window, kaldi.sample_scale, kaldi.mean_norm) == ("povey", 32768.0, False)
    assert (speaker3d.window, speaker3d.sample_scale, speaker3d.mean_norm) == ("povey", 1.0, True)
    assert spkfast.frontend("wespeaker", n_mels=60).n_mels == 60


def test_sizes():
    spec = spkfast.frontend("wespeaker")
    assert (spec.frame_length, spec.frame_shift, spec.fft_size, spec.output_size) == (400, 160, 512, 80)
    assert spkfast.frontend("kaldi", round_to_power_of_two=False).fft_size == 400
    assert spkfast.frontend("kaldi", f_max=-400.0).high_frequency == 7600
    assert spkfast.frontend("kaldi", n_mels=0).output_size == 257


def test_hash_is_of_the_values():
    spec = spkfast.frontend("wespeaker")
    # Stored in checkpoints: a change of this value makes them all unreadable.
    assert spec.hash == "608f496712809df5"
    assert spkfast.frontend("wespeaker", f_min=20).hash == spkfast.frontend("wespeaker", f_min=20.0).hash == spec.hash
    others = {
        dataclasses.replace(spec, **change).hash for change in ({"n_mels": 40}, {"dither": 1.0}, {"top_db": 80.0})
    }
    assert len(others | {spec.hash}) == 4


def test_dictionary_round_trip():
    spec = spkfast.frontend("3dspeaker", spectrum_clip=(0.0, 1e6), top_db=80.0)
    assert FrontendSpec.from_dict(spec.to_dict()) == spec
    assert FrontendSpec.from_dict(spec.to_dict()).hash == spec.hash


def test_difference_names_the_fields():
    here, there = spkfast.frontend("wespeaker"), spkfast.frontend("wespeaker", window="povey")
    assert here.difference(there) == "window: 'hamming' here, 'povey' there"
    assert here.difference(here) == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_mel": 80}, r"unknown front-end field 'n_mel' \(did you mean 'n_mels'\?\)"),
        ({"window": "blackman"}, "window must be one of hamming, hann, povey, rectangular, got 'blackman'"),
        ({"sample_rate": 0}, "sample_rate must be positive, got 0"),
        ({"sample_rate": "16000"}, "sample_rate must be of type int and finite, got '16000'"),
        ({"remove_dc": 1}, "remove_dc must be of type bool and finite, got 1"),
        ({"log_floor": float("nan")}, "log_floor must be of type float and finite, got nan"),
        ({"frame_length_ms": 0.01}, "less than 2 samples"),
        ({"n_fft": 256}, "n_fft=256 is shorter than the frame of 400 samples"),
        ({"f_min": 9000.0}, "do not span a band below the Nyquist frequency"),
    ],
)
def test_messages(fields, message):
    with pytest.raises(InputError, match=message):
        spkfast.frontend("wespeaker", **fields)


def test_unknown_preset():
    with pytest.raises(InputError, match="unknown front-end preset 'wespeakr'; known: 3dspeaker, kaldi, wespeaker"):
        spkfast.frontend("wespeakr")


def test_tables_by_hand():
    window, mel = fbank_tables(spkfast.frontend("wespeaker"))
    assert window[0].item() == pytest.approx(0.08)
    torch.testing.assert_close(window, window.flip(0))
    assert mel.shape == (80, 257) and (mel >= 0).all() and (mel[:, -1] == 0).all()
    # Bin k lies at 31.25 k Hz. Between the two outermost centres the triangles add up to one.
    centres = mel.argmax(dim=1)
    inner = mel[:, centres[0] + 1 : centres[-1] - 1].sum(dim=0)
    torch.testing.assert_close(inner, torch.ones_like(inner))
