"""Tables and settings of a FrontendSpec: against those of other toolkits, and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spkfast
from spkfast import frontend_tables
from spkfast.frontend_tables import Settings
from tests.oracles import frontends as oracle

WINDOWS = ("povey", "hamming", "hanning", "blackman", "rectangular")
KALDI_MELS: dict[str, dict[str, Any]] = {
    "mel_23_16000_20_0": {"n_mels": 23},
    "mel_40_16000_20_0": {"n_mels": 40},
    "mel_80_16000_20_0": {"n_mels": 80},
    "mel_80_16000_20_7600": {"n_mels": 80, "f_max": 7600.0},
    "mel_40_8000_20_0": {"n_mels": 40, "sample_rate": 8000},
}
HTK_MELS: dict[str, dict[str, Any]] = {
    "htk_slaneynone_fb_257_40_0_8000": {"n_mels": 40, "f_min": 0.0, "f_max": 0.0},
    "htk_slaneynone_fb_257_64_0_8000": {"n_mels": 64, "f_min": 0.0, "f_max": 0.0},
    "htk_slaneynone_fb_257_80_20_7600": {"n_mels": 80, "f_max": 7600.0},
}


@pytest.fixture(scope="module")
def constants(golden: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "frontends" / "constants.npz"))


def test_every_constant_is_compared(constants: dict[str, np.ndarray]) -> None:
    assert constants.keys() == {*(f"window_{name}_400" for name in WINDOWS), *KALDI_MELS, *HTK_MELS}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(constants: dict[str, np.ndarray], name: str) -> None:
    window, _, _ = frontend_tables.tables(spkfast.frontend("kaldi", window=name.replace("hanning", "hann")))
    # Half a unit of float32 rounding, in which they were made; Povey's power takes a few of them.
    np.testing.assert_allclose(window, constants[f"window_{name}_400"], atol=3e-7, rtol=0)


@pytest.mark.parametrize("name", KALDI_MELS)
def test_kaldi_filters(constants: dict[str, np.ndarray], name: str) -> None:
    mel = frontend_tables.tables(spkfast.frontend("kaldi", **KALDI_MELS[name])).mel
    # They hold no Nyquist column. Mel frequencies near 3000 in float32, over filters some 30 mels wide.
    np.testing.assert_allclose(mel[:, :-1], constants[name], atol=3e-5, rtol=0)
    assert (mel[:, -1] == 0).all()


@pytest.mark.parametrize("name", HTK_MELS)
def test_htk_filters(constants: dict[str, np.ndarray], name: str) -> None:
    mel = frontend_tables.tables(spkfast.frontend("taoruijie", **HTK_MELS[name])).mel
    np.testing.assert_allclose(mel.T, constants[name], atol=3e-5, rtol=0)


def test_slaney_filters() -> None:
    mel = frontend_tables.tables(spkfast.frontend("titanet")).mel
    np.testing.assert_allclose(mel.T, oracle._slaney_mel(80), atol=1e-15, rtol=1e-12)
    # Without the area normalisation they are triangles of height one.
    plain = frontend_tables.tables(spkfast.frontend("titanet", mel_norm="none", n_fft=16384, n_mels=20)).mel
    np.testing.assert_allclose(plain.max(axis=1), 1, atol=0.02)


def test_redimnet2_filters() -> None:
    mel = frontend_tables.tables(spkfast.frontend("redimnet2")).mel
    np.testing.assert_allclose(mel[:, :-1].T, oracle._tf_mel(72), atol=1e-12)
    assert (mel[:, -1] == 0).all() and (mel[:, 0] == 0).all()


def test_speechbrain_filters_are_symmetric() -> None:
    # So many points that the sides of each triangle can be read off.
    fields: dict[str, Any] = {"n_fft": 32000, "n_mels": 10}
    mel = frontend_tables.tables(spkfast.frontend("speechbrain", **fields)).mel
    htk = frontend_tables.tables(spkfast.frontend("speechbrain", mel_scale="htk", **fields)).mel
    for m in range(10):
        centre, bins = mel[m].argmax(), np.flatnonzero(mel[m])
        assert abs((centre - bins[0]) - (bins[-1] - centre)) <= 1 or bins[-1] == 16000
        np.testing.assert_array_equal(mel[m, : centre - 1], htk[m, : centre - 1])


def test_triangles_overlap_to_one() -> None:
    mel = frontend_tables.tables(spkfast.frontend("wespeaker")).mel
    assert mel.shape == (80, 257) and (mel >= 0).all()
    # Bin k lies at 31.25 k Hz. Between the two outermost centres the triangles add up to one.
    centres = mel.argmax(axis=1)
    np.testing.assert_allclose(mel[:, centres[0] + 1 : centres[-1] - 1].sum(axis=0), 1, rtol=1e-12)


def test_odd_transforms_have_no_nyquist_bin() -> None:
    mel = frontend_tables.tables(spkfast.frontend("kaldi", n_fft=401, round_to_power_of_two=False)).mel
    assert mel.shape == (80, 201) and mel[-1, -1] > 0


def test_a_plain_spectrum_is_the_identity() -> None:
    np.testing.assert_array_equal(frontend_tables.tables(spkfast.frontend("thin")).mel, np.eye(257))


def test_windows_by_hand() -> None:
    symmetric = frontend_tables.tables(spkfast.frontend("wespeaker")).window
    assert symmetric[0] == pytest.approx(0.08)
    np.testing.assert_allclose(symmetric, symmetric[::-1], atol=1e-15)
    periodic = frontend_tables.tables(spkfast.frontend("wespeaker", window_periodic=True)).window
    np.testing.assert_allclose(periodic[1:], periodic[1:][::-1], atol=1e-15)
    assert periodic[200] == 1


def cosines_of(**fields: Any) -> frontend_tables.Table:
    cosines = frontend_tables.tables(spkfast.frontend("mfcc", **fields)).cosines
    assert cosines is not None
    return cosines


def test_cosines_are_orthonormal() -> None:
    cosines = cosines_of(num_ceps=23, cepstral_lifter=0.0)
    np.testing.assert_allclose(cosines @ cosines.T, np.eye(23), atol=1e-14)
    assert frontend_tables.tables(spkfast.frontend("kaldi")).cosines is None


def test_order_of_cepstra() -> None:
    plain, energy, htk, both = (
        cosines_of(use_energy=energy, htk_compat=htk) for htk in (False, True) for energy in (False, True)
    )
    np.testing.assert_array_equal(energy, plain[1:])
    np.testing.assert_array_equal(both, plain[1:])
    np.testing.assert_allclose(htk, [*plain[1:], plain[0] * 2**0.5])
    # Kaldi's lifter: 1 + Q / 2 sin(pi k / Q) with Q = 22.
    bare = cosines_of(cepstral_lifter=0.0)
    np.testing.assert_allclose(plain[11], 12 * bare[11])


@pytest.mark.parametrize(
    ("fields", "first_frame", "offset", "padding"),
    [
        ({"pad_mode": "none"}, 400, 0, 0),
        ({"pad_samples": 80}, 240, -80, 1),
        ({"pad_samples": 80, "pad_mode": "constant"}, 240, -80, 0),
        ({"snip_edges": False}, 80, -120, 2),
        ({"center": True}, 0, -200, 1),
        ({"center": True, "pad_mode": "constant"}, 0, -200, 0),
        ({"center": True, "pad_mode": "none"}, 512, 56, 0),
        ({"center": True, "drop_last_frame": True}, 160, -200, 1),
        ({"center": True, "n_fft": 401, "round_to_power_of_two": False}, 1, -200, 1),
    ],
    ids=str,
)
def test_places_of_frames(fields: dict[str, Any], first_frame: int, offset: int, padding: int) -> None:
    settings = frontend_tables.settings(spkfast.frontend("kaldi", **fields))
    assert (settings.first_frame, settings.offset, settings.padding) == (first_frame, offset, padding)


def test_settings_travel_as_two_lists() -> None:
    settings = frontend_tables.settings(spkfast.frontend("titanet", spectrum_clip=(0.0, 2.0)))
    assert all(type(value) is int for value in settings.integers)
    assert all(type(value) is float for value in settings.floats)
    assert Settings(*settings.integers, *settings.floats) == settings


def test_field_values_are_the_spec() -> None:
    spec = spkfast.frontend("redimnet2")
    values = frontend_tables.field_values(spec)
    assert spkfast.FrontendSpec(*values) == spec and hash(values) == hash(frontend_tables.field_values(spec))
