"""The commands info, verify, embed and evaluate, end to end on a small model; and what each says of bad input."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

import spkfast as package
from spkfast.cli import embed as embed_command
from spkfast.data.embeddings import keeps_origin, read_embeddings
from spkfast.training.validation import HELD_OUT


def keys_of(path):
    with np.load(path) as arrays:
        return list(arrays["keys"]), arrays["embeddings"]


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def bad_audio(folder, kind):
    path = folder / f"{kind}.wav"
    samples = 0.1 * np.random.default_rng(0).normal(size=16000)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not audio\n" * 100)
    elif kind == "nan":
        samples[8000] = np.nan
        soundfile.write(path, samples, 16000, subtype="FLOAT")
    elif kind == "cut_wav":
        soundfile.write(path, samples, 16000)
        cut(path, 20000)
    elif kind == "cut_flac":
        path = folder / "cut_flac.flac"
        soundfile.write(path, samples, 16000)
        cut(path, path.stat().st_size // 2)
    elif kind == "short":
        soundfile.write(path, samples[:300], 16000)
    return path


BAD_AUDIO = {
    "missing": "no such file",
    "empty": "the file is empty (0 bytes)",
    "text": "not an audio file, or a damaged one",
    "nan": "the file holds NaN or infinite samples",
    "cut_wav": "the file is cut off: 19956 of 32000 bytes of sound are there",
    "cut_flac": "cut off, or damaged, in the frame at sample",
    "short": "too short: 300 samples at 16000 Hz, one frame needs 400",
}


def test_info(spkfast):
    status, out, _ = spkfast("info")
    assert status == 0 and "log_mel_fbank" in out and "chosen by auto" in out
    assert json.loads(spkfast("info", "--json").out) == json.loads(json.dumps(package.info()))


def test_verify(spkfast, model, data):
    a, b = data / "s0/r0/u.wav", data / "s1/r0/u.wav"
    result = json.loads(spkfast("verify", a, b, "--model", model, "--json").out)
    encoder = package.SpeakerEncoder.load(model)
    assert result == {
        "score": pytest.approx(encoder.verify(a, b).score, abs=1e-6),
        "same_speaker": None,
        "threshold": None,
        "threshold_list": None,
    }
    assert "the model has no threshold" in spkfast("verify", a, b, "--model", model, "--backend", "reference").out
    folder = data.parent / "with_threshold"
    for value, origin, words in (
        (0.99994321, "dev.txt", "different speakers (threshold 0.9999, set on dev.txt)"),
        (-0.98765432, HELD_OUT, "same speaker (threshold -0.9877, set on speakers held out of its training)"),
    ):
        encoder.threshold = package.inference.Threshold(value, origin)
        encoder.save(folder)
        assert words in spkfast("verify", a, b, "--model", folder).out
        result = json.loads(spkfast("verify", a, b, "--model", folder, "--json").out)
        assert (result["threshold"], result["threshold_list"]) == (value, origin)


@pytest.mark.parametrize("level", [0.0, 0.25])
def test_audio_without_sound_is_told(spkfast, model, data, level):
    path, sound = data / "silent.wav", data / "s0/r0/u.wav"
    soundfile.write(path, np.full(16000, level), 16000)
    line = f"warning: {path}: holds no sound, all samples are equal: no speaker\n"
    status, out, err = spkfast("verify", path, sound, "--model", model)
    assert status == 0 and err == line and "cosine" in out
    status, _, err = spkfast("embed", data, "--model", model, "--out", data / "x.npz")
    assert status == 0 and err == line and len(keys_of(data / "x.npz")[0]) == 10
    assert spkfast("verify", sound, sound, "--model", model).err == ""


@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_verify_bad_audio(spkfast, model, data, kind):
    path = bad_audio(data, kind)
    error = spkfast("verify", data / "s0/r0/u.wav", path, "--model", model).error
    assert error.startswith(f"spkfast verify: error: {path}: {BAD_AUDIO[kind]}")
    error = spkfast("embed", path, "--model", model, "--out", data / "x.npz").error
    assert error.startswith(f"spkfast embed: error: {path}: {BAD_AUDIO[kind]}")
    assert not (data / "x.npz").exists()


def test_checkpoint_of_another_version(spkfast, model, data):
    other = shutil.copytree(model, data.parent / "other")
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("format_version: 2", "format_version: 99"))
    audio = data / "s0/r0/u.wav"
    expected = f"{config}: format version 99, this spkfast reads versions up to 2"
    assert spkfast("verify", audio, audio, "--model", other).error == f"spkfast verify: error: {expected}"
    assert expected in spkfast("embed", data, "--model", other, "--out", data / "x.npz").error
    assert expected in spkfast("evaluate", "--model", other, "--data", data).error


def test_embed_folder_file_and_lists(spkfast, model, data):
    encoder = package.SpeakerEncoder.load(model)
    result = json.loads(spkfast("embed", data, "--model", model, "--out", data / "all.npz", "--json").out)
    assert (result["embedded"], result["already_there"], result["skipped"], result["embedding_dim"]) == (9, 0, 0, 24)
    keys, rows = keys_of(data / "all.npz")
    assert keys == sorted(f"s{s}/r{u}/u.wav" for s in range(3) for u in range(3))
    for key, row in zip(keys, rows, strict=True):
        want = encoder.embed(data / key).numpy()
        np.testing.assert_allclose(row, want, atol=1e-5 * np.abs(want).max())

    (data / "plain.txt").write_text("s1/r0/u.wav\n\ns0/r0/u.wav\n")
    (data / "train.lst").write_text("s2 s2/r0/u.wav\n")
    single = data / "s0/r1/u.wav"
    inputs = (data / "plain.txt", data / "train.lst", data / "trials.txt", single)
    assert spkfast("embed", *inputs, "--model", model, "--out", data / "lists.npz").status == 0
    found, _ = keys_of(data / "lists.npz")
    assert found[:3] == ["s1/r0/u.wav", "s0/r0/u.wav", "s2/r0/u.wav"] and found[-1] == str(single)
    assert sorted(found[:-1]) == keys


def test_embed_resumes(spkfast, model, data, monkeypatch):
    out = data / "x.npz"
    (data / "some.txt").write_text("s0/r0/u.wav\ns1/r0/u.wav\n")
    assert spkfast("embed", data / "some.txt", "--model", model, "--out", out).status == 0
    _, first = keys_of(out)
    read = []
    load_audio = package.SpeakerEncoder.load_audio
    monkeypatch.setattr(
        package.SpeakerEncoder, "load_audio", lambda self, path: read.append(str(path)) or load_audio(self, path)
    )
    result = json.loads(spkfast("embed", data, "--model", model, "--out", out, "--json").out)
    assert (result["embedded"], result["already_there"]) == (7, 2)
    assert len(read) == 7 and str(data / "s0/r0/u.wav") not in read
    keys, rows = keys_of(out)
    assert keys[:2] == ["s0/r0/u.wav", "s1/r0/u.wav"] and len(keys) == 9
    np.testing.assert_array_equal(rows[:2], first)
    result = json.loads(spkfast("embed", data, "--model", model, "--out", out, "--json").out)
    assert (result["embedded"], result["already_there"]) == (0, 9)


@pytest.mark.parametrize("name", ["x.safetensors", "x.parquet", "x.npy", "x.ark", "x.scp", "x"])
def test_embed_into_other_formats(spkfast, model, data, monkeypatch, name):
    needed = {"parquet": "pyarrow", "ark": "kaldiio", "scp": "kaldiio"}.get(name[2:])
    if needed:
        pytest.importorskip(needed)
    assert spkfast("embed", data, "--model", model, "--out", data / "want.npz").status == 0
    want = read_embeddings(data / "want.npz")
    encoder, out = package.SpeakerEncoder.load(model), data / name
    assert (want.model, want.frontend) == (encoder.fingerprint, encoder.frontend.hash)

    with monkeypatch.context() as interrupted:
        embed_four_and_interrupt(interrupted)
        assert spkfast("embed", data, "--model", model, "--out", out).status == 130
    partial = data / f"{name}.partial.safetensors"
    assert partial.exists() != keeps_origin(out)
    result = json.loads(spkfast("embed", data, "--model", model, "--out", out, "--json").out)
    assert (result["embedded"], result["already_there"]) == (5, 4) and not partial.exists()
    got = read_embeddings(out)
    assert got.keys == want.keys
    np.testing.assert_allclose(got.embeddings, want.embeddings, atol=1e-5 * np.abs(want.embeddings).max())
    outcome = spkfast("embed", data, "--model", model, "--out", out, "--json")
    if keeps_origin(out):
        assert (got.model, got.frontend, got.sources) == (want.model, want.frontend, want.sources)
        assert json.loads(outcome.out)["already_there"] == 9
    else:
        assert "is there already, and its format does not tell which model" in outcome.error


def embed_four_and_interrupt(monkeypatch):
    def interrupted(self, paths, **options):
        for path in list(paths)[:4]:
            yield self.embed(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(package.SpeakerEncoder, "embed_files", interrupted)


def test_embed_goes_on_with_the_partial_file_of_the_same_model_only(spkfast, model, data, monkeypatch):
    with monkeypatch.context() as interrupted:
        embed_four_and_interrupt(interrupted)
        assert spkfast("embed", data, "--model", model, "--out", data / "x.npy").status == 130
    encoder = package.SpeakerEncoder.load(model)
    with torch.no_grad():
        next(encoder.model.parameters()).mul_(2)
    encoder.save(data.parent / "other")
    error = spkfast("embed", data, "--model", data.parent / "other", "--out", data / "x.npy").error
    assert f"{data}/x.npy.partial.safetensors: holds embeddings of another model or precision" in error


def test_embed_speaker_means(spkfast, model, data):
    out, means = data / "x.npz", data / "means.safetensors"
    result = spkfast("embed", data, "--model", model, "--out", out, "--speaker-means", means, "--json")
    assert json.loads(result.out)["speakers"] == 3
    stored, got = read_embeddings(out), read_embeddings(means)
    assert got.keys == ["s0", "s1", "s2"] and (got.model, got.frontend) == (stored.model, stored.frontend)
    want = stored.embeddings.reshape(3, 3, -1).astype(float).mean(axis=1)
    np.testing.assert_allclose(got.embeddings, want, rtol=0, atol=np.abs(want).max() * 2**-24)  # one rounding
    error = spkfast("embed", data, "--model", model, "--out", out, "--speaker-means", means).error
    assert f"{means}: is there already, and the means would replace it" in error

    (data / "utt2spk").write_text("".join(f"{key} {'ab'[i % 2]}\n" for i, key in enumerate(stored.keys[:-1])))
    arguments = ("--speaker-means", data / "two.npz", "--speakers", data / "utt2spk")
    assert spkfast("embed", data, "--model", model, "--out", out, *arguments).status == 0
    assert read_embeddings(data / "two.npz").keys == ["a", "b", "s2"]  # the last one is not in the file


def test_embed_speaker_means_need_speakers(spkfast, model, data):
    single = data / "s0/r0/u.wav"
    shutil.copy(single, data / "u.wav")
    for arguments, error in (
        ((single, "--speaker-means", data / "m.npz"), f"{single}: does not begin with the folder of its speaker; "),
        ((data, "--speaker-means", data / "m.npz"), "u.wav: does not begin with the folder of its speaker; "),
        ((data, "--speaker-means", data / "x.npz"), "--speaker-means and --out must be different files"),
        ((data, "--speakers", data / "utt2spk"), "--speakers goes with --speaker-means"),
        (
            (data, "--speaker-means", data / "m.npz", "--speakers", data / "no"),
            f"{data}/no: no such file of speakers",
        ),
    ):
        outcome = spkfast("embed", *arguments, "--model", model, "--out", data / "x.npz")
        assert outcome.error.startswith(f"spkfast embed: error: {error}")
    assert not list(data.glob("*.npz"))


def test_embed_names_that_a_format_cannot_keep(spkfast, model, data):
    pytest.importorskip("kaldiio")
    (data / "s0/r0/u.wav").rename(data / "s0/r0/u u.wav")
    error = spkfast("embed", data, "--model", model, "--out", data / "x.ark").error
    assert error == (
        f"spkfast embed: error: {data}/s0/r0/u u.wav: its name holds white space, which a Kaldi archive cannot keep in "
        "a key; name another --out, such as X.safetensors"
    )
    assert spkfast("embed", data, "--model", model, "--out", data / "x.npz").status == 0
    bad = data / "s0/r0/\udcff.wav"
    shutil.copy(data / "s0/r1/u.wav", bad)
    status, _, err = spkfast("embed", data, "--model", model, "--out", data / "y.npz")
    assert status == 0 and len(keys_of(data / "y.npz")[0]) == 9
    assert err.splitlines() == [f"skipped: {data}/s0/r0/\\xff.wav: its name is not UTF-8", "1 of 10 files skipped"]


def test_embed_refuses_other_audio_under_known_keys(spkfast, model, data):
    out, copy = data.parent / "x.npz", shutil.copytree(data, data.parent / "copy")
    assert spkfast("embed", data, "--model", model, "--out", out).status == 0
    assert "came from" in spkfast("embed", copy, "--model", model, "--out", out).error


def test_embed_keeps_what_it_has_when_interrupted(spkfast, model, data, monkeypatch):
    embed_four_and_interrupt(monkeypatch)
    assert spkfast("embed", data, "--model", model, "--out", data / "x.npz").status == 130
    assert len(keys_of(data / "x.npz")[0]) == 4
    assert not list(data.glob(".x.npz*"))


def test_embed_saves_now_and_then(spkfast, model, data, monkeypatch):
    saves = []
    write = embed_command.write_embeddings
    monkeypatch.setattr(
        embed_command, "write_embeddings", lambda path, stored: saves.append(len(stored)) or write(path, stored)
    )
    monkeypatch.setattr(embed_command, "_SECONDS_BETWEEN_SAVES", 0.0)
    assert spkfast("embed", data, "--model", model, "--out", data / "x.npz").status == 0
    assert saves == [*range(1, 10), 9]


def test_embed_skips_bad_files_among_many(spkfast, model, data):
    bad = [bad_audio(data / "s1", kind) for kind in ("empty", "nan")]
    status, _, err = spkfast("embed", data, "--model", model, "--out", data / "x.npz")
    assert status == 0 and len(keys_of(data / "x.npz")[0]) == 9
    assert err.splitlines() == [
        f"skipped: {bad[0]}: {BAD_AUDIO['empty']}",
        f"skipped: {bad[1]}: {BAD_AUDIO['nan']}",
        "2 of 11 files skipped",
    ]
    error = spkfast("embed", data, "--model", model, "--out", data / "y.npz", "--strict").error
    assert error == f"spkfast embed: error: {bad[0]}: {BAD_AUDIO['empty']}"


def test_embed_with_nothing_usable(spkfast, model, tmp_path):
    for kind in ("empty", "nan"):
        bad_audio(tmp_path, kind)
    status, _, err = spkfast("embed", tmp_path, "--model", model, "--out", tmp_path / "x.npz")
    assert status == 2 and err.endswith("spkfast embed: error: none of the 2 files could be used\n")


def test_embed_ends_where_no_file_is_to_blame(spkfast, model, data, monkeypatch):
    def unavailable(*_, **__):
        raise package.InputError("backend='native' cannot run here")

    monkeypatch.setattr(package.functional, "log_mel_fbank", unavailable)
    error = spkfast("embed", data, "--model", model, "--out", data / "x.npz", "--backend", "native").error
    assert error == "spkfast embed: error: backend='native' cannot run here"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("s0 a.wav\ns0 a.wav extra\n", "list.txt:2: expected 2 columns 'speaker path', got 3"),
        ("1 a.wav b.wav\n\n2 a.wav b.wav\n", "list.txt:3: the label must be 0 or 1, got '2'"),
        ("a.wav\nb.wav c.wav\n", "list.txt:2: expected 1 column 'path', got 2"),
        ("\n1 2 3 4\n", "list.txt:2: expected 'path', 'speaker path' or 'label path path', got 4 columns"),
        ("\n\n", "list.txt: the list is empty"),
        (b"\xff\xfe\x00", "list.txt: not a text file"),
        (None, "list.txt: no such list file"),
    ],
)
def test_embed_bad_list(spkfast, model, tmp_path, content, error):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    outcome = spkfast("embed", path, "--model", model, "--out", tmp_path / "x.npz")
    assert outcome.error == f"spkfast embed: error: {tmp_path}/{error}"


def test_embed_bad_arguments(spkfast, model, data):
    (data / "nothing").mkdir()
    copy = shutil.copytree(data, data.parent / "copy")
    (data / "text.npz").write_text("not an archive")
    np.savez(data / "foreign.npz", keys=np.array(["a"]), embeddings=np.ones((1, 24)))
    np.savez(data / "other.npz", numbers=np.ones(3))
    for arguments, error in (
        ((data, "--out", data / "x.wav"), f"{data}/x.wav: embeddings are kept in files that end with .safetensors, "),
        ((data / "nothing", "--out", data / "x.npz"), f"{data}/nothing: no audio files in this folder"),
        ((data, copy, "--out", data / "x.npz"), f"{copy}/s0/r0/u.wav: has the key of {data}/s0/r0/u.wav; "),
        ((data, "--out", data / "text.npz"), f"{data}/text.npz: not an npz file, or a damaged one"),
        ((data, "--out", data / "other.npz"), f"{data}/other.npz: holds no arrays 'keys' and 'embeddings'"),
        (
            (data, "--out", data / "foreign.npz"),
            f"{data}/foreign.npz: holds embeddings of another model or precision; ",
        ),
    ):
        assert spkfast("embed", *arguments, "--model", model).error.startswith(f"spkfast embed: error: {error}")


def test_evaluate_by_model_and_by_embeddings(spkfast, model, data, monkeypatch):
    from spkfast.data.lists import read_trials
    from spkfast.evaluation import evaluate_trials

    assert spkfast("embed", data, "--model", model, "--out", data / "x.npz").status == 0
    by_model = json.loads(
        spkfast("evaluate", "--model", model, "--data", data, "--scores", data / "scores.txt", "--json").out
    )
    trials = data / "trials.txt"
    by_file = json.loads(spkfast("evaluate", "--embeddings", data / "x.npz", "--trials", trials, "--json").out)
    want = evaluate_trials(read_trials(trials), *keys_of(data / "x.npz"))
    for row in (*by_model["lists"], *by_file["lists"]):
        figures = row.pop("metrics")
        assert figures["eer"] == pytest.approx({"value": want.eer.value, "low": want.eer.low, "high": want.eer.high})
        assert figures["min_dcf:0.01"]["value"] == pytest.approx(want.min_dcf) and len(row.pop("sha256")) == 64
        assert row == {
            "trials": str(trials),
            "eer_percent": pytest.approx(100 * want.eer.value),
            "eer_low_percent": pytest.approx(100 * want.eer.low),
            "eer_high_percent": pytest.approx(100 * want.eer.high),
            "eer_threshold": pytest.approx(want.eer.threshold, abs=1e-4),
            "min_dcf": pytest.approx(want.min_dcf),
            "p_target": 0.01,
            "targets": 9,
            "nontargets": 27,
            "speakers": 3,
        }
    lines = [line.split() for line in (data / "scores.txt").read_text().splitlines()]
    assert [line[:3] for line in lines] == [line.split() for line in trials.read_text().splitlines()]
    np.testing.assert_allclose([float(line[3]) for line in lines], want.scores, atol=1e-4)


def test_evaluate_several_lists_in_percent(spkfast, model, data):
    lines = (data / "trials.txt").read_text().splitlines(keepends=True)
    (data / "half.txt").write_text("".join(lines[:20]))
    status, out, err = spkfast(
        "evaluate", "--model", model, "--data", data, "--trials", data / "trials.txt", data / "half.txt",
        "--backend", "reference", "--method", "clova",
    )  # fmt: skip
    assert status == 0 and not err
    head, *rows = out.splitlines()
    assert head.split("  ")[0] == "trials" and "EER %" in head and "95 % interval" in head and "minDCF (p 0.01)" in head
    assert [row.split()[0] for row in rows] == [str(data / "trials.txt"), str(data / "half.txt")]


def test_evaluate_plot(spkfast, model, data):
    assert spkfast("evaluate", "--model", model, "--data", data, "--det", data / "det.png").status == 0
    assert (data / "det.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_bad_input(spkfast, model, data):
    assert spkfast("embed", data, "--model", model, "--out", data / "x.npz").status == 0
    trials = data / "trials.txt"
    lines = trials.read_text()
    for name, content, error in (
        ("columns", lines + "1 s0/r0/u.wav\n", "columns.txt:37: expected 3 columns 'label enrol test', got 2"),
        ("label", "yes s0/r0/u.wav s0/r1/u.wav\n", "label.txt:1: the label must be 0 or 1, got 'yes'"),
    ):
        (data / f"{name}.txt").write_text(content)
        for source in (("--embeddings", data / "x.npz"), ("--model", model, "--data", data)):
            assert spkfast("evaluate", *source, "--trials", data / f"{name}.txt").error == (
                f"spkfast evaluate: error: {data}/{error}"
            )
    unknown = data / "unknown.txt"
    unknown.write_text(lines + "0 s0/r0/u.wav s9/r0/u.wav\n")
    error = spkfast("evaluate", "--embeddings", data / "x.npz", "--trials", unknown).error
    assert error == f"spkfast evaluate: error: s9/r0/u.wav: {unknown}:37 names this path, but it has no embedding"
    error = spkfast("evaluate", "--model", model, "--data", data, "--trials", unknown).error
    assert error == f"spkfast evaluate: error: {data}/s9/r0/u.wav: no such file, but the trials name it"
    bad_audio(data, "nan").replace(data / "s2/r0/u.wav")
    error = spkfast("evaluate", "--model", model, "--data", data).error
    assert error == f"spkfast evaluate: error: {data}/s2/r0/u.wav: the file holds NaN or infinite samples"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "give either --model with --data, or --embeddings, or --scored"),
        (["--model", "m", "--embeddings", "x.npz"], "give either --model with --data, or --embeddings, or --scored"),
        (["--scored", "s", "--trials", "t"], "--scored names the lists: leave --trials out"),
        (["--scored", "s", "--precision", "bf16"], "--precision goes with --model"),
        (["--scored", "s", "--crops", "10x4"], "--crops goes with --model"),
        (["--scored", "s", "--columns", "gender"], "--columns needs --by"),
        (["--scored", "s", "--out", "record"], "--out must end with .json, got record"),
        (["--scored", "s", "--histogram", "h.txt"], "--histogram must end with .png"),
        (["--scored", "s", "--protocol", "vox2"], "unknown protocol 'vox2' (did you mean 'vox"),
        (["--model", "m", "--data", "d", "--crops", "4"], "crops must be 'whole', '10x4' for ten of 4 seconds"),
        (
            ["--scored", "s", "--resamples", "-3"],
            "argument --resamples: must be 0 or a whole number from 20 on, got -3",
        ),
        (["--compare", "a.json", "b.json"], "a.json: no such file"),
        (["--model", "m"], "--model and --data go together"),
        (["--embeddings", "x.npz"], "--trials is needed with --embeddings"),
        (["--model", "m", "--data", "nowhere"], "nowhere/trials.txt: no such list file"),
    ],
)
def test_evaluate_wrong_usage(spkfast, arguments, error):
    assert spkfast("evaluate", *arguments).error.startswith(f"spkfast evaluate: error: {error}")
