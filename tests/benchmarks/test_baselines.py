"""The peers of the benchmarks compute what they are timed for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import spkfast
from benchmarks import baselines, shapes
from spkfast import functional


@pytest.fixture(scope="module")
def waveforms():
    return shapes.Waveforms(2, 1.1).inputs()[0]


def _assert_same(values, waveforms, spec):
    exact, _ = functional.log_mel_fbank(waveforms.double(), spec=spec, backend="reference")
    assert values.shape == exact.shape
    # The worst bin is one in which the signal cancels; on average float32 leaves far less.
    errors = np.abs(np.asarray(values, dtype=np.float64) - exact.numpy())
    assert errors.max() < 5e-3
    assert errors.mean() < 2e-5


@pytest.mark.parametrize("banded", [True, False], ids=["bands", "whole"])
@pytest.mark.parametrize("preset", shapes.PRESETS)
def test_batched_torch_is_the_preset(preset, banded, waveforms, monkeypatch):
    monkeypatch.setattr(baselines, "_BLOCK", 40)  # three blocks, the last one shorter
    spec = spkfast.frontend(preset)
    peer = baselines.BatchedTorchFbank(spec, waveforms, banded=banded)
    _assert_same(peer(), waveforms, spec)
    _assert_same(peer(), waveforms, spec)  # from buffers that hold the last call's


@pytest.mark.parametrize("fields", [{"use_energy": True}, {"snip_edges": False}], ids=str)
def test_batched_torch_refuses_what_no_preset_has(fields, waveforms):
    with pytest.raises(ValueError, match="no preset has them"):
        baselines.BatchedTorchFbank(spkfast.frontend("kaldi", **fields), waveforms)


@pytest.mark.parametrize("samples", ["list", "numpy"])
def test_kaldi_native_fbank_is_wespeaker(samples, waveforms):
    pytest.importorskip("kaldi_native_fbank")
    spec = spkfast.frontend("wespeaker")
    _assert_same(np.stack(baselines.kaldi_native_fbank(spec, waveforms, samples)()), waveforms, spec)


def test_kaldi_native_fbank_stream_reads_each_frame_once(waveforms):
    pytest.importorskip("kaldi_native_fbank")
    spec = spkfast.frontend("kaldi")
    row = (waveforms[0] * spec.sample_scale).tolist()
    run = baselines.kaldi_native_fbank_stream(spec, [row[k : k + 160] for k in range(0, len(row), 160)])
    # Two calls are one signal of twice the length.
    twice = torch.cat([waveforms[:1], waveforms[:1]], dim=1)
    _assert_same(np.concatenate([*run(), *run()])[None], twice, spec)


@pytest.mark.parametrize("one_pass", [False, True], ids=["about the mean", "one pass"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_attentive_stats_are_those_of_the_definition(ragged, one_pass):
    frames = shapes.Frames(3, 4, 11)
    x, logits = (value.double() for value in frames.inputs())
    lengths = frames.ragged() if ragged else None
    exact = functional.attentive_stats_pool(x, logits, lengths, backend="reference")
    torch.testing.assert_close(baselines.attentive_stats(x, logits, lengths, one_pass=one_pass), tuple(exact))


def test_attentive_pooling_attends_to_mean_and_deviation_of_all_frames():
    x, _ = (value.double() for value in shapes.Frames(2, 3, 7).inputs())
    generator = torch.Generator().manual_seed(1)
    first = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 9, 1), (5,))]
    second = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 5, 1), (3,))]
    got = baselines.attentive_pooling(x, tuple(first), tuple(second))
    assert got.shape == (2, 6)
    for row, (values, pooled) in enumerate(zip(x, got, strict=True)):
        mean, std = values.mean(dim=1), (values.var(dim=1, correction=1) + 1e-7).sqrt()
        logits = []
        for frame in values.T:
            hidden = torch.tanh(first[0][:, :, 0] @ torch.cat([frame, mean, std]) + first[1])
            logits.append(second[0][:, :, 0] @ hidden + second[1])
        weights = torch.stack(logits, dim=1).softmax(dim=1)
        want = (weights * values).sum(dim=1)
        spread = (weights * (values - want[:, None]) ** 2).sum(dim=1).sqrt()
        torch.testing.assert_close(pooled, torch.cat([want, spread]), msg=lambda text, row=row: f"row {row}: {text}")
