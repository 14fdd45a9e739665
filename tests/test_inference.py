"""SpeakerEncoder: audio of every kind in, the same embedding out; and what a damaged model folder says."""

import copy
import inspect
import io
import json
import pickle

import numpy as np
import pytest
import torch

from spkfast import FrontendSpec, InputError, SpeakerEncoder, frontend, models
from spkfast.inference import Threshold


def make_encoder(seed=0, **spec):
    torch.manual_seed(seed)
    net = models.create(
        "ecapa_tdnn", channels=16, mfa_channels=32, embedding_dim=24, attention_channels=8, se_channels=8, scale=4
    )
    return SpeakerEncoder(net, frontend("wespeaker", **spec))


def voice(num_samples=16000, seed=0):
    return (0.1 * np.random.default_rng(seed).normal(size=num_samples)).astype(np.float32)


@pytest.fixture(scope="module")
def encoder():
    return make_encoder()


@pytest.fixture
def saved(tmp_path, encoder):
    encoder.save(tmp_path / "model")
    return tmp_path / "model"


def write(path, samples, rate=16000, **options):
    import soundfile

    soundfile.write(path, samples, rate, **options)
    return path


def relative_error(got, want):
    return float((got - want).abs().max() / want.abs().max())


def test_every_kind_of_audio(tmp_path, encoder):
    samples = np.round(voice() * 32768) / 32768
    path = write(tmp_path / "a.wav", samples)
    want = encoder.embed(samples.astype(np.float32))
    assert want.shape == (24,) and want.dtype == torch.float32 and want.isfinite().all()
    pcm = (samples * 32768).astype(np.int16)
    stereo = np.stack([samples - 0.01, samples + 0.01])
    buffer = io.BytesIO(path.read_bytes())
    for audio in (path, str(path), buffer, samples, torch.tensor(samples), pcm, torch.tensor(pcm), stereo, stereo.T):
        assert relative_error(encoder.embed(audio), want) < 1e-5


def test_follows_the_network(encoder):
    from spkfast import functional

    samples = torch.from_numpy(voice())
    features, lengths = functional.log_mel_fbank(
        samples[None], torch.tensor([16000]), spec=encoder.frontend, backend="reference"
    )
    with torch.no_grad():
        want = encoder.model(features, lengths)[0]
    got = encoder.embed(samples, backend="reference")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(encoder.embed(samples, normalize=True), want / want.norm())
    assert not encoder.model.training and not got.requires_grad
    (got * torch.ones(24, requires_grad=True)).sum().backward()  # not an inference tensor


def test_resamples_arrays_and_files(tmp_path, encoder):
    time = np.arange(8000) / 8000
    tone = (0.3 * np.sin(2 * np.pi * 440 * time) + 0.2 * np.sin(2 * np.pi * 1234 * time)).astype(np.float32)
    path = write(tmp_path / "tone.wav", tone, 8000, subtype="FLOAT")
    assert len(encoder.load_audio(path)) == 16000
    np.testing.assert_array_equal(encoder.load_audio(path), encoder.load_audio(tone, 8000))
    np.testing.assert_array_equal(encoder.load_audio(tone), tone)
    assert not torch.equal(encoder.embed(path), encoder.embed(tone))


def test_batch_equals_one_by_one(tmp_path, encoder):
    lengths = [16000, 400, 23456, 801, 48000, 16001]
    audios = [voice(n, seed) for seed, n in enumerate(lengths)]
    alone = torch.stack([encoder.embed(audio) for audio in audios])
    for batch_seconds in (0.01, 2.0, 60.0):  # one each, a few, all in one
        got = encoder.embed_batch(audios, batch_seconds=batch_seconds)
        assert relative_error(got, alone) < 1e-5
    torch.testing.assert_close(encoder.embed_batch(audios, normalize=True).norm(dim=1), torch.ones(6))
    mixed = [write(tmp_path / "a.wav", audios[0], subtype="FLOAT"), torch.tensor(audios[2])]
    assert relative_error(encoder.embed_batch(mixed), alone[[0, 2]]) < 1e-5
    assert encoder.embed_batch([]).shape == (0, 24)


def test_batches_are_bounded():
    from spkfast.inference import _batches

    lengths = np.random.default_rng(0).integers(400, 50000, size=100).tolist()
    batches = list(_batches(dict(enumerate(lengths)), 60000))
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 60000 for batch in batches)
    assert max(len(batch) for batch in batches) > 3


def test_files_in_windows_keep_order_and_tell_errors(tmp_path, encoder):
    paths = [write(tmp_path / f"{i}.wav", voice(4000 + 1000 * i, i), subtype="FLOAT") for i in range(6)]
    (tmp_path / "3.wav").write_bytes(b"")
    found = list(encoder.embed_files(paths, batch_seconds=0.1))  # windows of 0.8 s
    for i, (path, row) in enumerate(zip(paths, found, strict=True)):
        if i == 3:
            assert isinstance(row, InputError) and "3.wav: the file is empty" in str(row)
        else:
            assert relative_error(row, encoder.embed(path)) < 1e-5


def test_verify(encoder):
    a, b = voice(seed=0), 0.5 * voice(20000, seed=1)
    first, second = encoder.embed(a), encoder.embed(b)
    score, same_speaker, threshold = encoder.verify(a, b)
    assert score == pytest.approx(float(torch.nn.functional.cosine_similarity(first, second, dim=0)), abs=1e-6)
    assert same_speaker is None and threshold is None
    for offset, decision in ((-0.01, True), (0.01, False)):
        strict = SpeakerEncoder(encoder.model, encoder.frontend, threshold=Threshold(score + offset, "trials.txt"))
        assert strict.verify(a, b) == (score, decision, score + offset)


def test_save_and_load(tmp_path, encoder):
    from safetensors import safe_open

    kept = SpeakerEncoder(encoder.model, encoder.frontend, threshold=Threshold(0.25, "trials.txt"))
    kept.save(tmp_path / "run/model")
    assert sorted(p.name for p in (tmp_path / "run/model").iterdir()) == ["config.yaml", "model.safetensors"]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["model"]
    with safe_open(tmp_path / "run/model/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["spkfast"])["frontend_hash"] == encoder.frontend.hash
    for source in ("run", "run/model", "run/model/config.yaml", "run/model/model.safetensors"):
        loaded = SpeakerEncoder.load(tmp_path / source, frontend=encoder.frontend, device="cpu")
        assert loaded.threshold == (0.25, "trials.txt")
        assert loaded.frontend == encoder.frontend
        assert loaded.fingerprint == encoder.fingerprint
        torch.testing.assert_close(loaded.embed(voice()), encoder.embed(voice()), rtol=0, atol=0)
    assert make_encoder(seed=1).fingerprint != encoder.fingerprint


def test_folder_of_version_1(tmp_path):
    """Names from before the network was made of parts."""
    from safetensors.torch import load_file

    torch.manual_seed(0)
    net = models.create("ecapa_tdnn", channels=16, mfa_channels=32, embedding_dim=24, scale=4, emb_bn=True)
    encoder = SpeakerEncoder(net, frontend("wespeaker"))
    encoder.save(tmp_path / "new")
    encoder.save(tmp_path / "old")
    edit_config(tmp_path / "old", lambda config: config.update(format_version=1))

    def rename(metadata, tensors):
        metadata["format_version"] = 1
        for name in list(tensors):
            former = name.removeprefix("encoder.").replace(".in_.", ".in.")
            for part, was in (("pooling.", "asp."), ("projector.bn2.", "emb.bn."), ("projector.bn.", "post.bn."),
                              ("projector.fc.", "emb.fc.")):  # fmt: skip
                former = former.replace(part, was)
            tensors[former] = tensors.pop(name)

    edit_weights(tmp_path / "old", rename)
    names = load_file(tmp_path / "old/model.safetensors")
    assert {"stem.conv.weight", "blk1.in.bn.bias", "asp.fc1.weight", "post.bn.bias", "emb.bn.bias"} <= names.keys()
    loaded = SpeakerEncoder.load(tmp_path / "old")
    assert loaded.fingerprint == encoder.fingerprint
    assert torch.equal(loaded.embed(voice()), encoder.embed(voice()))
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again/config.yaml").read_bytes() == (tmp_path / "new/config.yaml").read_bytes()


def test_fingerprint_outlives_new_keywords(encoder, monkeypatch):
    before = encoder.fingerprint
    signature = inspect.signature(models.EcapaTdnn)
    later = inspect.Parameter("gain", inspect.Parameter.KEYWORD_ONLY, default=1.0)
    parameters = [*signature.parameters.values(), later]
    monkeypatch.setattr(models.EcapaTdnn, "__signature__", signature.replace(parameters=parameters), raising=False)
    monkeypatch.setitem(encoder.model.config, "gain", 1.0)
    assert encoder.fingerprint == before
    monkeypatch.setitem(encoder.model.config, "gain", 2.0)
    assert encoder.fingerprint != before


def test_fingerprint_counts_what_weights_do_not_tell():
    """Networks of the same weights that give other embeddings."""
    encoder = make_encoder()
    found = {encoder.fingerprint}
    for name, value in (("dilations", [1, 1, 1, 1]), ("padding", "batch"), ("dialect", "taoruijie")):
        net = models.create("ecapa_tdnn", **{**encoder.model.config, name: value})
        net.load_state_dict(encoder.model.state_dict())
        found.add(SpeakerEncoder(net, encoder.frontend).fingerprint)
    found.add(SpeakerEncoder(encoder.model, frontend("wespeaker", window="povey")).fingerprint)
    assert len(found) == 5


def test_save_replaces_whole_folders_only(tmp_path, saved, monkeypatch):
    other = make_encoder(seed=1)
    other.save(saved)
    assert SpeakerEncoder.load(saved).fingerprint == other.fingerprint

    def fail(*_, **__):
        raise RuntimeError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(RuntimeError):
        make_encoder(seed=2).save(saved)
    monkeypatch.undo()
    assert SpeakerEncoder.load(saved).fingerprint == other.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'notes.txt', which saving would remove"):
        other.save(saved)
    assert (saved / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(399, np.float32), "audio array: too short: 399 samples at 16000 Hz, one frame needs 400"),
        (np.array([0.1, np.nan] * 400), "audio array: holds NaN or infinite samples"),
        (np.array([1e39] * 800), "audio array: holds NaN or infinite samples"),
        (np.zeros((2, 3, 800), np.float32), r"samples must have shape \(S,\) or \(channels, S\), got \(2, 3, 800\)"),
        (np.zeros(800, np.uint8), "must be floating or signed integers, got uint8"),
        ("missing.wav", "missing.wav: no such file"),
    ],
)
def test_bad_audio(encoder, audio, message):
    with pytest.raises(InputError, match=message), np.errstate(over="ignore"):
        encoder.embed(audio)


def test_bad_audio_in_a_batch_is_named(tmp_path, encoder):
    short = write(tmp_path / "short.wav", voice(100))
    with pytest.raises(InputError, match=r"short\.wav: too short"):
        encoder.embed_batch([voice(), short])
    with pytest.raises(InputError, match="audio 1: holds NaN"):
        encoder.embed_batch([voice(), np.full(800, np.nan)])
    with pytest.raises(InputError, match="batch_seconds must be positive"):
        encoder.embed_batch([voice()], batch_seconds=0)
    with pytest.raises(InputError, match="sample_rate must be positive"):
        encoder.embed(voice(), -1)


def test_embedding_that_is_not_finite_is_named(tmp_path):
    broken = make_encoder()
    with torch.no_grad():
        broken.model.projector.fc.bias[0] = torch.nan
    path = write(tmp_path / "a.wav", voice())
    with pytest.raises(InputError, match=r"a\.wav: the model gives no finite embedding for its 1.000 s"):
        broken.embed(path)
    (row,) = broken.embed_files([path])
    assert isinstance(row, InputError) and "a.wav: the model gives no finite embedding" in str(row)


def edit_config(folder, edit):
    import yaml

    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    edit(config)
    path.write_text(yaml.safe_dump(config))


def edit_weights(folder, edit):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["spkfast"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    edit(metadata, tensors)
    save_file(tensors, path, metadata={"spkfast": json.dumps(metadata)})


def change_frontend(metadata, _):
    spec = FrontendSpec.from_dict({**metadata["frontend"], "window": "povey", "f_max": 7600.0, "var_eps": 1e-5})
    metadata.update(frontend=spec.to_dict(), frontend_hash=spec.hash)


def test_folder_from_before_a_field_was_added_loads(saved):
    edit_config(saved, lambda c: [c["frontend"].pop(name) for name in ("pad_samples", "drop_last_frame", "var_eps")])
    spec = SpeakerEncoder.load(saved).frontend
    assert (spec.pad_samples, spec.drop_last_frame, spec.var_eps) == (0, False, 0.0)


DAMAGE = {
    r"config\.yaml: format version 3, this spkfast reads versions up to 2": lambda f: edit_config(
        f, lambda c: c.update(format_version=3)
    ),
    r"model\.safetensors: format version '7', this spkfast reads": lambda f: edit_weights(
        f, lambda m, t: m.update(format_version="7")
    ),
    r"front-end differs from that of model\.safetensors: window: 'hamming' here, 'povey' there; f_max: 0\.0 here, "
    r"7600\.0 there; var_eps: 0\.0 here, 1e-05 there": lambda f: edit_weights(f, change_frontend),
    r"config\.yaml: front-end: unknown front-end field 'windw' \(did you mean 'window'\?\)": lambda f: edit_config(
        f, lambda c: c["frontend"].update(windw="hann")
    ),
    r"config\.yaml: frontend_hash is 0, its fields give": lambda f: edit_config(
        f, lambda c: c.update(frontend_hash="0")
    ),
    r"config\.yaml: unknown model 'ecapa'": lambda f: edit_config(f, lambda c: c["model"].update(name="ecapa")),
    r"config\.yaml: unknown option 'chanels' of model ecapa_tdnn": lambda f: edit_config(
        f, lambda c: c["model"]["config"].update(chanels=3)
    ),
    r"config\.yaml: damaged: model\.name is None": lambda f: edit_config(f, lambda c: c["model"].pop("name")),
    r"config\.yaml: damaged: holds no 'frontend'": lambda f: edit_config(f, lambda c: c.pop("frontend")),
    r"config\.yaml: damaged: threshold\.list is None": lambda f: edit_config(
        f, lambda c: c.update(threshold={"value": 0.5})
    ),
    r"config\.yaml: damaged: input_ranges is \[1\]": lambda f: edit_config(f, lambda c: c.update(input_ranges=[1])),
    r"config\.yaml: damaged: input_ranges: the ranges name 'stem', which is no layer": lambda f: edit_config(
        f, lambda c: c.update(input_ranges={"stem": {"in": [0, 1]}})
    ),
    r"damaged: input_ranges: the range of 'in' of encoder\.stem must be two numbers, got None": lambda f: edit_config(
        f, lambda c: c.update(input_ranges={"encoder.stem": {"in": None}})
    ),
    r"config\.yaml: not the config of a model": lambda f: (f / "config.yaml").write_text("steps: 3"),
    r"config\.yaml: damaged: ": lambda f: (f / "config.yaml").write_text("a: [1"),
    r"config\.yaml: damaged: 'NoneType' object": lambda f: (f / "config.yaml").write_text(
        "format_version: 2\nx: !!timestamp x"
    ),
    r"tensor 'projector.fc.bias' has shape none, the model of config\.yaml has \(24,\)": lambda f: edit_weights(
        f, lambda m, t: t.pop("projector.fc.bias")
    ),
    r"tensor 'projector\.fc\.weight' has shape \(24, 64\), the model of config\.yaml has \(12, 64\)": lambda f: (
        edit_config(f, lambda c: c["model"]["config"].update(embedding_dim=12))
    ),
    r"model\.safetensors: damaged: ": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-100]
    ),
    r"model\.safetensors: no such file, but config\.yaml is there": lambda f: (f / "model.safetensors").unlink(),
    r"config\.yaml: no such file, but model\.safetensors is there": lambda f: (f / "config.yaml").unlink(),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_model(saved, message):
    DAMAGE[message](saved)
    with pytest.raises(InputError, match=message) as caught:
        SpeakerEncoder.load(saved)
    assert "\n" not in str(caught.value)


def test_unsuitable_source(tmp_path, saved):
    with pytest.raises(InputError, match=r"no such model; .*another toolkit's checkpoint.*nothing is downloaded"):
        SpeakerEncoder.load(tmp_path / "none")
    with pytest.raises(InputError, match="not a model folder"):
        SpeakerEncoder.load(tmp_path.parent)
    (tmp_path / "avg_model.pt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"avg_model\.pt: not a checkpoint"):
        SpeakerEncoder.load(tmp_path / "avg_model.pt")
    with pytest.raises(InputError, match=r"unknown precision 'bf61' .did you mean 'bf16'"):
        SpeakerEncoder.load(saved, precision="bf61")
    with pytest.raises(InputError, match="device must be"):
        SpeakerEncoder.load(saved, device="tpu9000")
    with pytest.raises(InputError, match="differs from that of the caller: window: 'hamming' here, 'povey' there"):
        SpeakerEncoder.load(saved, frontend=frontend("wespeaker", window="povey"))
    with pytest.raises(InputError, match="takes 80 values per frame, the front-end gives 40"):
        make_encoder(n_mels=40)


def test_network_of_ones_own(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, features, lengths):
            return features.sum(dim=1) / lengths[:, None]

    encoder = SpeakerEncoder(Mean(), frontend("kaldi"))
    assert encoder.embed(voice()).shape == (80,)
    with pytest.raises(InputError, match=r"only networks of spkfast\.models can be saved"):
        encoder.save(tmp_path / "model")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_network_in_another_precision(dtype, bound):
    want = make_encoder().embed(voice())
    other = make_encoder()
    got = SpeakerEncoder(other.model.to(dtype), other.frontend).embed(voice())
    assert got.dtype == torch.float32 and relative_error(got, want) < bound


def test_repr_and_presets_for_a_network_of_ones_own(encoder):
    assert repr(encoder) == f"SpeakerEncoder(ecapa_tdnn, front-end {encoder.frontend.hash}, cpu)"
    plain = SpeakerEncoder(torch.nn.Identity(), "kaldi")
    assert plain.frontend == frontend("kaldi") and repr(plain).startswith("SpeakerEncoder(Identity, ")
    with pytest.raises(InputError, match="must be a FrontendSpec"):
        SpeakerEncoder(encoder.model, None)


def test_embedding_leaves_training_mode_and_statistics_alone():
    encoder = make_encoder()
    clips = [np.random.default_rng(k).standard_normal(9000).astype(np.float32) for k in range(3)]
    want = encoder.embed_batch(clips)
    encoder.model.train()
    encoder.model.encoder.mfa.eval()
    modes = [part.training for part in encoder.model.modules()]
    for _ in range(2):
        assert torch.equal(encoder.embed_batch(clips), want)
        assert [part.training for part in encoder.model.modules()] == modes
    with pytest.raises(InputError, match="got the one path"):
        encoder.embed_batch("a.flac")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Folder of a calibrated model, and the model at fp32."""
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    encoder = make_encoder(seed=3)
    encoder.calibrate([voice(seed=seed) for seed in range(4)])
    encoder.save(folder)
    return folder, encoder


def test_precisions_are_near(calibrated):
    folder, encoder = calibrated
    clips = [voice(n, seed=9) for n in (16000, 9000, 23000)]
    want = encoder.embed_batch(clips).double()
    prints = {encoder.fingerprint}
    for precision, bound in (("fp32", 1 - 1e-9), ("bf16", 0.9995), ("int8", 0.995)):
        other = SpeakerEncoder.load(folder, precision=precision)
        assert other.precision == precision
        cosine = torch.nn.functional.cosine_similarity(other.embed_batch(clips).double(), want)
        assert cosine.min() > bound and (precision == "fp32" or cosine.max() < 1 - 1e-9)
        prints.add(other.fingerprint)
        one = other.embed(clips[1])
        assert relative_error(other.embed_batch(clips)[1], one) < 1e-5
        for copied in (
            copy.deepcopy(other),
            pickle.loads(pickle.dumps(other)),
            SpeakerEncoder(other.model, other.frontend),
        ):
            assert copied.precision == precision and copied.fingerprint == other.fingerprint
            assert torch.equal(copied.embed(clips[1]), one)
    assert len(prints) == 3


def test_precision_can_be_changed(calibrated):
    folder, encoder = calibrated
    other = SpeakerEncoder.load(folder)
    want = other.embed(voice())
    for precision in ("int8", "bf16", "fp32"):
        other.precision = precision
        assert other.precision == precision
    assert torch.equal(other.embed(voice()), want) and other.fingerprint == encoder.fingerprint
    assert repr(other) == f"SpeakerEncoder(ecapa_tdnn, front-end {other.frontend.hash}, cpu)"
    other.precision = "bf16"
    assert repr(other) == f"SpeakerEncoder(ecapa_tdnn, front-end {other.frontend.hash}, cpu, bf16)"
    bf16 = other.fingerprint
    other.model.encoder.stem.precision = "fp32"
    assert other.precision == "mixed"
    assert len({other.fingerprint, bf16, encoder.fingerprint}) == 3


def test_fingerprint_counts_ranges_where_they_count(calibrated):
    """An embedding at fp32 or bf16 does not depend on them."""
    found = {}
    for seed in (0, 1):
        encoder = make_encoder(seed=3)
        encoder.calibrate([voice(seed=seed)])
        for precision in ("fp32", "bf16", "int8"):
            encoder.precision = precision
            found.setdefault(precision, set()).add(encoder.fingerprint)
    assert {precision: len(prints) for precision, prints in found.items()} == {"fp32": 1, "bf16": 1, "int8": 2}
    assert make_encoder(seed=3).fingerprint in found["fp32"]


def test_fingerprint_of_fp32_is_what_it_was():
    """Of files of embeddings that were written before there were precisions."""
    encoder = make_encoder()
    digest = encoder.fingerprint
    net = encoder.model
    for parameter in net.state_dict().values():
        parameter.zero_()
    assert encoder.fingerprint == "7dbdb339e041e9df" != digest


def test_calibration_finds_the_ranges_of_the_features(tmp_path):
    from spkfast import functional
    from spkfast.nn import input_ranges

    encoder = make_encoder()
    clips = [voice(n, seed=n) for n in (16000, 4000, 9000)]
    path = write(tmp_path / "a.wav", clips[1], subtype="FLOAT")
    found = encoder.calibrate([clips[0], path, torch.from_numpy(clips[2])])
    features = [functional.log_mel_fbank(torch.from_numpy(clip)[None], spec=encoder.frontend)[0] for clip in clips]
    low, high = found["encoder.stem"]["in"]
    assert low == pytest.approx(min(float(f.min()) for f in features), abs=1e-4)
    assert high == pytest.approx(max(float(f.max()) for f in features), abs=1e-4)
    assert found == input_ranges(encoder.model) and encoder.precision == "fp32" and not encoder.model.training
    split = encoder.calibrate(clips, batch_seconds=0.01)["encoder.stem"]["in"]
    assert split == pytest.approx((low, high), abs=1e-4)
    for audios, words in (("a.wav", "got the one path a.wav"), ([], "at least one batch"), ([voice(3)], "too short")):
        with pytest.raises(InputError, match=words):
            encoder.calibrate(audios)
    with pytest.raises(InputError, match="batch_seconds must be positive"):
        encoder.calibrate(clips, batch_seconds=0)
    with pytest.raises(InputError, match="no layer with an inference form"):
        SpeakerEncoder(torch.nn.Identity(), "kaldi").calibrate(clips)
    with pytest.raises(InputError, match="max_seconds must be at least that of a frame, got 0"):
        encoder.calibrate(clips, max_seconds=0)


def test_calibration_counts_no_padding_and_a_part_of_long_utterances(monkeypatch):
    encoder, seen = make_encoder(), []
    features = encoder._features
    monkeypatch.setattr(encoder, "_features", lambda w, *rest: seen.append([len(x) for x in w]) or features(w, *rest))
    encoder.calibrate([voice(n) for n in (16000, 9000, 48000, 40000, 9000)], max_seconds=2, batch_seconds=4)
    assert sorted(seen) == [[9000, 9000], [16000], [32000, 32000]]
    seen.clear()
    encoder.calibrate([voice(16000 * 11)])
    assert seen == [[160000]]


def test_ranges_are_kept_in_the_folder(tmp_path, calibrated):
    import yaml

    from spkfast.nn import input_ranges

    folder, encoder = calibrated
    config = yaml.safe_load((folder / "config.yaml").read_text())
    # Who does not know the key passes over it: at fp32 it changes nothing.
    assert config["format_version"] == 2 and config["input_ranges"]["encoder.blk1"].keys() >= {"in", "out", "res.0"}
    for precision in ("fp32", "bf16", "int8"):
        again = SpeakerEncoder.load(folder, precision=precision)
        assert input_ranges(again.model) == input_ranges(encoder.model)
        again.save(tmp_path / precision)
        for file in ("config.yaml", "model.safetensors"):
            assert (tmp_path / precision / file).read_bytes() == (folder / file).read_bytes()
    edit_config(tmp_path / "fp32", lambda c: c.pop("input_ranges"))
    plain = SpeakerEncoder.load(tmp_path / "fp32")
    assert input_ranges(plain.model) == {} and plain.fingerprint == encoder.fingerprint
    plain.save(tmp_path / "fp32")
    assert "input_ranges" not in (tmp_path / "fp32/config.yaml").read_text()


def test_precision_that_cannot_run(tmp_path, saved, calibrated, monkeypatch):
    folder, _ = calibrated
    with pytest.raises(InputError, match=rf"{saved}: precision 'int8' needs calibration: .*'spkfast calibrate'"):
        SpeakerEncoder.load(saved, precision="int8")
    with pytest.raises(InputError, match="precision 'fp16' runs on cuda only, the network is on cpu"):
        SpeakerEncoder.load(folder, precision="fp16", device="cpu")
    encoder = SpeakerEncoder.load(folder)
    encoder.device = torch.device("cuda:0")
    with pytest.raises(InputError, match="precision 'int8' runs on cpu only, the network is on cuda:0"):
        encoder.precision = "int8"
    with pytest.raises(InputError, match="Identity has no layer with an inference form"):
        SpeakerEncoder(torch.nn.Identity(), "kaldi").precision = "bf16"
    assert SpeakerEncoder(torch.nn.Identity(), "kaldi").precision == "fp32"
    monkeypatch.setattr("spkfast.backends.resolve", lambda *_: "reference")
    with pytest.raises(
        InputError, match=r"precision 'bf16' needs kernels of .*, which are missing on cpu; 'spkfast in"
    ):
        SpeakerEncoder.load(folder, precision="bf16")
    SpeakerEncoder.load(folder)


def test_precision_at_which_a_layer_cannot_compute():
    net = models.create("ecapa_tdnn", channels=16, mfa_channels=32, embedding_dim=24, scale=4, groups=2)
    encoder = SpeakerEncoder(net, frontend("wespeaker"))
    with pytest.raises(InputError, match=r"'bf16' needs layers that run on kernels: encoder\.stem has 2 groups"):
        encoder.precision = "bf16"
    encoder.precision = "fp32"
    encoder = make_encoder()
    encoder.model.pooling.fc1 = torch.nn.Sequential(encoder.model.pooling.fc1)
    with pytest.raises(InputError, match="pooling has a Sequential of another class"):
        encoder.precision = "bf16"
    assert encoder.precision == "fp32"


def test_unknown_keys_of_the_config_are_kept(tmp_path, saved):
    import yaml

    edit_config(saved, lambda c: c.update(trained_on={"hours": 3}))
    SpeakerEncoder.load(saved).save(tmp_path / "again")
    assert yaml.safe_load((tmp_path / "again/config.yaml").read_text())["trained_on"] == {"hours": 3}


def test_int8_takes_the_cpu_by_itself(calibrated, monkeypatch):
    folder, _ = calibrated
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert SpeakerEncoder.load(folder, precision="int8").device == torch.device("cpu")


def test_checkpoint_of_another_toolkit_at_a_precision(tmp_path):
    from tests.models.foreign import foreign_state, small_model

    path = tmp_path / "avg_model.pt"
    torch.save(foreign_state(small_model("wespeaker", feature_dim=80), "wespeaker"), path)
    want = SpeakerEncoder.load(path).embed(voice()).double()
    got = SpeakerEncoder.load(path, precision="bf16").embed(voice()).double()
    assert torch.nn.functional.cosine_similarity(got, want, dim=0) > 0.9995 and not torch.equal(got, want)
    with pytest.raises(InputError, match=r"avg_model\.pt: precision 'int8' needs calibration"):
        SpeakerEncoder.load(path, precision="int8")


def test_embedding_packs_weights_once(monkeypatch):
    from spkfast.nn import se_res2net

    encoder, packs, pack = make_encoder(), [], se_res2net.pack_block
    monkeypatch.setattr(se_res2net, "pack_block", lambda *args: packs.append(1) or pack(*args))
    encoder.embed(voice())
    assert len(packs) == 3
    encoder.embed_batch([voice(), voice(9000)])
    assert len(packs) == 3


def test_saved_files_are_equal_to_the_last_byte(tmp_path, encoder):
    for name in "abcd":
        encoder.save(tmp_path / name)
    for file in ("config.yaml", "model.safetensors"):
        assert len({(tmp_path / name / file).read_bytes() for name in "abcd"}) == 1
