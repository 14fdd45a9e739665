"""FrontendSpec: presets, derived sizes, hash, dictionaries, messages; the numbers of every toolkit it stands for."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spkfast
from spkfast import FrontendSpec, InputError, backends
from spkfast.functional import log_mel_fbank
from tests.oracles import frontends as oracle

# The order is part of the contract: it is the order in which they act.
FIELDS = [
    "sample_rate", "sample_scale", "waveform_norm", "preemphasis", "preemphasis_mode", "remove_dc", "frame_length_ms",
    "frame_shift_ms", "n_fft", "round_to_power_of_two", "window", "window_periodic", "snip_edges", "pad_samples",
    "center", "pad_mode", "drop_last_frame", "power", "spectrum_clip", "n_mels", "mel_scale", "mel_norm", "f_min",
    "f_max", "use_energy", "raw_energy", "energy_floor", "htk_compat", "num_ceps", "cepstral_lifter", "log",
    "log_floor", "log_offset", "top_db", "mean_norm", "std_norm", "std_unbiased", "var_eps", "std_eps",
    "pad_frames_to", "dither",
]  # fmt: skip
# Fields that the first checkpoints do not know.
ADDED = {"pad_samples": 80, "drop_last_frame": True, "var_eps": 1e-5}

# Stored in checkpoints: a change of one of these makes them all unreadable.
HASHES = {
    "kaldi": "15da44a481c8a41e",
    "wespeaker": "608f496712809df5",
    "3dspeaker": "4c7898a959b30d7d",
    "speechbrain": "b79bc80cd3bc0090",
    "taoruijie": "5186e4def484e1f3",
    "espnet": "5186e4def484e1f3",
    "clova_l": "08122be9b23b40e7",
    "clova_v2": "72cfbda4d3c18a60",
    "vgg": "7bc149699408cece",
    "thin": "670c5c5ab909fb45",
    "redimnet": "4994b40ad4eadf00",
    "redimnet2": "8e4620b2ad83b725",
    "titanet": "06732c85bd58bcbc",
    "mfcc": "1683fc232996ca9a",
}


def test_fields_are_the_contract() -> None:
    assert [field.name for field in dataclasses.fields(FrontendSpec)] == FIELDS


def test_presets() -> None:
    wespeaker, kaldi, speaker3d = map(spkfast.frontend, ("wespeaker", "kaldi", "3dspeaker"))
    assert (wespeaker.window, wespeaker.sample_scale, wespeaker.mean_norm) == ("hamming", 32768.0, True)
    assert (kaldi.window, kaldi.sample_scale, kaldi.mean_norm) == ("povey", 32768.0, False)
    assert (speaker3d.window, speaker3d.sample_scale, speaker3d.mean_norm) == ("povey", 1.0, True)
    assert spkfast.frontend("wespeaker", n_mels=60).n_mels == 60
    assert spkfast.frontend("espnet") == spkfast.frontend("taoruijie")


def test_sizes() -> None:
    spec = spkfast.frontend("wespeaker")
    assert (spec.frame_length, spec.frame_shift, spec.fft_size, spec.output_size) == (400, 160, 512, 80)
    assert spkfast.frontend("kaldi", round_to_power_of_two=False).fft_size == 400
    assert spkfast.frontend("kaldi", n_fft=400, round_to_power_of_two=True).fft_size == 512
    assert spkfast.frontend("kaldi", f_max=-400.0).high_frequency == 7600
    assert spkfast.frontend("kaldi", n_mels=0).output_size == 257
    assert spkfast.frontend("kaldi", use_energy=True).output_size == 81
    # The energy takes the place of the zeroth cepstrum.
    assert spkfast.frontend("mfcc").output_size == spkfast.frontend("mfcc", use_energy=True).output_size == 13


@pytest.mark.parametrize("preset", HASHES)
def test_hashes_of_presets_stay(preset: str) -> None:
    spec = spkfast.frontend(preset)
    assert spec.hash == HASHES[preset]
    assert FrontendSpec.from_dict(spec.to_dict()) == spec


def test_every_preset_is_in_the_table() -> None:
    with pytest.raises(InputError) as caught:
        spkfast.frontend("?")
    assert str(caught.value).split("known: ")[1].split(", ") == sorted(HASHES)


def test_hash_is_of_the_values() -> None:
    spec = spkfast.frontend("wespeaker")
    assert spkfast.frontend("wespeaker", f_min=20).hash == spkfast.frontend("wespeaker", f_min=20.0).hash == spec.hash
    changes: list[dict[str, Any]] = [{"n_mels": 40}, {"dither": 1.0}, {"top_db": 80.0}]
    changes += [{name: value} for name, value in ADDED.items()]
    assert len({dataclasses.replace(spec, **change).hash for change in changes} | {spec.hash}) == len(changes) + 1


def test_dictionaries_without_the_added_fields_still_load() -> None:
    spec = spkfast.frontend("3dspeaker")
    old = {name: value for name, value in spec.to_dict().items() if name not in ADDED}
    assert FrontendSpec.from_dict(old) == spec
    assert FrontendSpec.from_dict(old).hash == HASHES["3dspeaker"]


def test_dictionary_round_trip() -> None:
    spec = spkfast.frontend("3dspeaker", spectrum_clip=(0.0, 1e6), top_db=80.0, **ADDED)
    assert spec.to_dict()["spectrum_clip"] == [0.0, 1e6]
    assert FrontendSpec.from_dict(spec.to_dict()) == spec
    assert FrontendSpec.from_dict(spec.to_dict()).hash == spec.hash


def test_difference_names_the_fields() -> None:
    here, there = spkfast.frontend("wespeaker"), spkfast.frontend("wespeaker", window="povey", var_eps=1e-5)
    assert here.difference(there) == "window: 'hamming' here, 'povey' there; var_eps: 0.0 here, 1e-05 there"
    assert here.difference(here) == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_mel": 80}, r"unknown front-end field 'n_mel' \(did you mean 'n_mels'\?\)"),
        ({"window": "bartlett"}, "window must be one of hamming, hann, povey, blackman, rectangular, got 'bartlett'"),
        ({"mel_scale": "bark"}, "mel_scale must be one of kaldi, htk, slaney, speechbrain, redimnet2, got 'bark'"),
        ({"pad_mode": "edge"}, "pad_mode must be one of reflect, constant, none, got 'edge'"),
        ({"power": 3.0}, r"power must be one of 1\.0, 2\.0, got 3\.0"),
        ({"sample_rate": 0}, "sample_rate must be positive, got 0"),
        ({"sample_rate": "16000"}, "sample_rate must be of type int and finite, got '16000'"),
        ({"remove_dc": 1}, "remove_dc must be of type bool and finite, got 1"),
        ({"drop_last_frame": 1}, "drop_last_frame must be of type bool and finite, got 1"),
        ({"pad_samples": 1.5}, r"pad_samples must be of type int and finite, got 1\.5"),
        ({"pad_samples": -1}, "pad_samples must not be negative, got -1"),
        ({"var_eps": -1e-5}, "var_eps must not be negative, got -1e-05"),
        ({"top_db": -80.0}, r"top_db must not be negative, got -80\.0"),
        ({"dither": -1.0}, r"dither must not be negative, got -1\.0"),
        ({"energy_floor": -1.0}, r"energy_floor must not be negative, got -1\.0"),
        ({"log_floor": float("nan")}, "log_floor must be of type float and finite, got nan"),
        ({"pad_frames_to": 0}, "pad_frames_to must be at least 1, got 0"),
        ({"num_ceps": 13, "n_mels": 12}, "num_ceps=13 cepstra need as many mel bins, n_mels is 12"),
        ({"num_ceps": 13, "n_mels": 0}, "num_ceps=13 cepstra need as many mel bins, n_mels is 0"),
        ({"spectrum_clip": (1.0, 1.0)}, r"spectrum_clip must be two finite rising bounds or null, got \(1\.0, 1\.0\)"),
        (
            {"spectrum_clip": [-1.0, 1.0]},
            r"spectrum_clip must be two finite rising bounds or null, got \(-1\.0, 1\.0\)",
        ),
        ({"spectrum_clip": [1.0]}, r"spectrum_clip must be two finite rising bounds or null, got \(1\.0,\)"),
        ({"spectrum_clip": 3}, "spectrum_clip must be two finite rising bounds or null, got 3"),
        ({"spectrum_clip": (0.0, float("inf"))}, r"spectrum_clip must be two finite rising bounds or null, got \(0"),
        ({"mel_scale": "redimnet2", "sample_rate": 100, "frame_length_ms": 20.0}, "needs an FFT of 4 points or more"),
        ({"frame_length_ms": 0.01}, "less than 2 samples"),
        ({"n_fft": 256}, "n_fft=256 is shorter than the frame of 400 samples"),
        ({"f_min": 9000.0}, "do not span a band below the Nyquist frequency"),
        ({"f_max": -8000.0}, "do not span a band below the Nyquist frequency"),
    ],
    ids=str,
)
def test_messages(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        spkfast.frontend("wespeaker", **fields)


def test_unknown_preset() -> None:
    with pytest.raises(
        InputError, match=r"preset 'wespeakr' \(did you mean 'wespeaker'\?\); known: 3dspeaker, clova_l"
    ):
        spkfast.frontend("wespeakr")


# Their options in our words; one that is not listed is an error, not a silent difference.
OURS = {
    "num_mel_bins": "n_mels", "n_mels": "n_mels", "num_ceps": "num_ceps", "cepstral_lifter": "cepstral_lifter",
    "frame_length": "frame_length_ms", "frame_shift": "frame_shift_ms", "sample_frequency": "sample_rate",
    "window_type": "window", "low_freq": "f_min", "high_freq": "f_max", "scale": "sample_scale", "cmn": "mean_norm",
    "mean_nor": "mean_norm", "std_norm": "std_norm", "use_energy": "use_energy", "raw_energy": "raw_energy",
    "energy_floor": "energy_floor", "htk_compat": "htk_compat", "round_to_power_of_two": "round_to_power_of_two",
    "dither": "dither", "snip_edges": "snip_edges", "preemphasis_coefficient": "preemphasis",
    "remove_dc_offset": "remove_dc", "n_fft": "n_fft", "f_min": "f_min", "f_max": "f_max", "preemph": "preemphasis",
    "log_eps": "log_offset",
}  # fmt: skip
# Goldens by the preset that they start from.
GOLDENS = {
    "kaldi": [
        "kaldi_fbank23_default", "kaldi_fbank23_unscaled", "kaldi_fbank40", "kaldi_fbank40_20ms", "kaldi_fbank40_8k",
        "kaldi_fbank40_hanning_linear", "kaldi_fbank40_lowhigh", "kaldi_fbank40_magnitude_nopre",
        "kaldi_fbank40_nopow2", "kaldi_fbank64_nosnip", "kaldi_fbank80_20_7600", "kaldi_fbank80_energy",
        "kaldi_fbank80_energy_notraw_htk", "kaldi_fbank80_nosnip_edge", "kaldi_wespeaker_fbank60_cmn",
        "kaldi_wespeaker_fbank80_cmn", "kaldi_wespeaker_fbank80_edge",
    ],
    "mfcc": ["kaldi_mfcc13", "kaldi_mfcc13_energy", "kaldi_mfcc20_nolift", "kaldi_mfcc30"],
    "wespeaker": ["wespeaker_processor_fbank80_var0", "wespeaker_processor_fbank80_var1"],
    "3dspeaker": ["3dspeaker_fbank80_mean0", "3dspeaker_fbank80_mean1"],
    "speechbrain": [
        "speechbrain_fbank_n_mels24", "speechbrain_fbank_n_mels80", "speechbrain_fbank_batch_len_std0",
        "speechbrain_fbank_batch_len_std1",
    ],
    "taoruijie": ["taoruijie_logmel80"],
    "clova_l": ["clovaai_resnetse34l_mel40"],
    "clova_v2": ["clovaai_resnetse34v2_mel64", "clovaai_resnetse34v2_nolog_mel40"],
    "vgg": ["clovaai_vggvox_mel40"],
    "redimnet": ["idrnd_melbanks72"],
}  # fmt: skip
# Tables, which test_frontend_tables.py compares, and a learned front-end, which comes with its model.
NO_FEATURES = {"constants", "espnet_asteroid_sinc"}
BEFORE_NORMALISATION: dict[str, Any] = {"mean_norm": False, "std_norm": False}
DECIBEL = math.log(10) / 10  # in nats


def golden_spec(preset: str, config: dict[str, Any]) -> FrontendSpec:
    fields: dict[str, Any] = {"n_mels": 23} if preset == "kaldi" else {}  # Kaldi's own default
    for name, value in config.items():
        if name in ("lens", "hop_length", "win_length"):
            continue  # lengths are input; the other two are those of every preset here
        if name == "use_power":
            fields["power"] = 2.0 if value else 1.0
        elif name in ("use_log_fbank", "log_input"):
            fields |= {} if value else {"log": "none"}
        elif name == "norm_var":
            fields |= {"std_norm": True, "std_unbiased": True, "var_eps": 1e-8} if value else {}
        elif name == "sample_frequency":
            fields["sample_rate"] = int(value)
        else:
            fields[OURS[name]] = "hann" if value == "hanning" else value
    return spkfast.frontend(preset, **fields)


def golden_input(folder: Path, entry: dict[str, Any]) -> torch.Tensor:
    """The stored waveform (B, S) in int16, or what its recipe says."""
    recipes = {
        "1600 zeros": torch.zeros(1, 1600),
        "1600 times 0.25": torch.full((1, 1600), 0.25),
        "1600 samples, 1.0 at index 700": torch.eye(1600)[700:701],
    }
    if entry["recipe"] in recipes:
        return recipes[entry["recipe"]]
    samples = np.load(folder / entry["file"])[entry["key"]]
    assert samples.dtype == np.int16
    return torch.from_numpy(samples.reshape(-1, samples.shape[-1])[:, slice(*entry.get("slice", (None,)))])


def compare(have: torch.Tensor, want: torch.Tensor, spec: FrontendSpec) -> None:
    """Log values before normalisation in nats, all else by the largest value."""
    assert have.shape == want.shape
    if not want.numel():
        return
    error = (have - want).abs().flatten()
    if spec.log == "none" or spec.num_ceps or spec.mean_norm or spec.std_norm:
        assert error.max() <= 1e-4 * want.abs().max()
        return
    error = error * (DECIBEL if spec.log == "db" else 1)
    # In the bins of lowest energy the two implementations behind the goldens of Kaldi differ by as much.
    assert error.max() <= 3e-4
    assert error.quantile(0.99) <= 5e-5


@pytest.mark.parametrize(("preset", "name"), [(preset, name) for preset, names in GOLDENS.items() for name in names])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_matches_goldens(golden: Path, backend: backends.Backend, preset: str, name: str) -> None:
    about = json.loads((golden / "frontends" / f"{name}.json").read_text())
    arrays = np.load(golden / "frontends" / f"{name}.npz")
    whole = golden_spec(preset, about["config"])
    compared = 0
    for case in about["cases"]:
        waveforms = golden_input(golden, case["inputs"][0])
        samples = waveforms.shape[1]
        lengths = torch.tensor([round(part * samples) for part in about["config"].get("lens", [1.0])])
        for output in case["outputs"]:
            spec = whole
            if output == "mel_power":
                spec = dataclasses.replace(whole, log="none", **BEFORE_NORMALISATION)
            elif output == "fbank" and preset != "3dspeaker":
                spec = dataclasses.replace(whole, **BEFORE_NORMALISATION)
            want = torch.from_numpy(arrays[f"{case['case']}__{output}"]).float()
            want = want if want.ndim == 3 else want[None]
            if preset in ("clova_l", "clova_v2", "vgg", "taoruijie", "redimnet"):
                want = want.transpose(1, 2)
            features, frame_lengths = log_mel_fbank(waveforms, lengths, spec=spec, backend=backend)
            assert features.shape == want.shape
            # Frames past the end are zero here; speechbrain puts out what its padding gives.
            for row, frames in enumerate(frame_lengths.tolist()):
                compare(features[row, :frames], want[row, :frames], spec)
            compared += 1
    assert compared == len([key for key in arrays if not key.endswith("_f32") and "__" in key])


def test_no_golden_is_left_out(golden: Path) -> None:
    used = {name for names in GOLDENS.values() for name in names}
    assert used | NO_FEATURES == {path.stem for path in (golden / "frontends").glob("*.json")}


@pytest.mark.parametrize("samples", [2, 160, 400, 511, 512, 1312, 7777])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("preset", ["thin", "titanet", "redimnet2"])
def test_matches_oracles(preset: str, normalise: bool, samples: int) -> None:
    time = np.arange(samples)
    x = 0.3 * np.sin(0.1 * time) + 0.05 * np.random.default_rng(0).standard_normal(samples)
    spec = spkfast.frontend(preset, **({} if normalise else BEFORE_NORMALISATION))
    scale = {"scale": 32768.0} if preset == "thin" else {}
    want = torch.from_numpy(getattr(oracle, preset)(x, normalise=normalise, **scale))
    exact, frames = log_mel_fbank(torch.from_numpy(x)[None], spec=spec)
    assert frames.item() == len(want)
    torch.testing.assert_close(exact[0, : len(want)], want, atol=1e-10, rtol=1e-10)
    assert (exact[0, len(want) :] == 0).all()
    # Float32 samples are other samples: the oracle gets the same ones.
    rounded = x.astype(np.float32)
    want = torch.from_numpy(getattr(oracle, preset)(rounded, normalise=normalise, **scale)).float()
    for backend in ("reference", "native"):
        features, _ = log_mel_fbank(torch.from_numpy(rounded)[None], spec=spec, backend=backend)
        compare(features[0, : len(want)], want, spec)
