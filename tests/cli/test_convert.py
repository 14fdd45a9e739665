"""The command convert: a report of every key, a folder that gives the same embeddings, one line for bad input."""

import json
import shutil

import numpy as np
import pytest
import torch

from spkfast import SpeakerEncoder, frontend
from spkfast.cli.convert import check_signal
from spkfast.inference import Threshold
from tests.models.foreign import Evil, foreign_state, small_model

SETTINGS = """
model: ECAPA_TDNN_c512
model_args: {feat_dim: 20, embed_dim: 12}
dataset_args:
  fbank_args: {num_mel_bins: 20, frame_shift: 8, frame_length: 25}
"""


@pytest.fixture
def wespeaker(tmp_path):
    folder = tmp_path / "wespeaker"
    folder.mkdir()
    state = foreign_state(small_model("wespeaker"), "wespeaker")
    torch.save({**state, "projection.weight": torch.randn(7, 12)}, folder / "avg_model.pt")
    (folder / "config.yaml").write_text(SETTINGS)
    return folder


@pytest.fixture
def speechbrain(tmp_path):
    torch.save(foreign_state(small_model("speechbrain"), "speechbrain"), tmp_path / "embedding_model.ckpt")
    return tmp_path / "embedding_model.ckpt"


def test_report_for_people(spkfast, tmp_path, wespeaker):
    run = spkfast("convert", wespeaker, "--out", tmp_path / "own")
    assert run.status == 0 and not run.err
    rows = dict(line.split("  ", 1) for line in run.out.splitlines() if "  " in line)
    shown = {key: value.strip() for key, value in rows.items()}
    assert shown["checkpoint"] == str(wespeaker / "avg_model.pt")
    assert shown["settings"] == shown["front-end"] == str(wespeaker / "config.yaml")
    assert shown["family"] == "wespeaker (key 'layer2.se_res2block.0.conv.weight')"
    assert "frame_shift_ms: 8.0 here, 10.0 there" in shown["unlike preset wespeaker"]
    assert shown["keys"] == "137 taken, 1 dropped" and shown["training head"] == "7 x 12, not written"
    assert shown["projection.weight"] == "class matrix of the training head"
    assert shown["channels"] == "16" and shown["pooling"] == "{'name': 'astp'}"
    assert shown["same after reload"] == "to the last bit"
    embedding = SpeakerEncoder.load(tmp_path / "own").embed(check_signal(16000))
    assert shown["first values"] == " ".join(f"{value:.6f}" for value in embedding[:6].tolist())
    assert shown["norm"] == f"{embedding.norm():.6f}"


def test_report_for_programs(spkfast, tmp_path, wespeaker):
    run = spkfast("convert", wespeaker / "avg_model.pt", "--out", tmp_path / "own", "--json")
    result = json.loads(run.out)
    assert run.status == 0 and result["family"] == "wespeaker" and result["head"] == [7, 12]
    keys = torch.load(wespeaker / "avg_model.pt", weights_only=True)
    told = [row["theirs"] for row in result["renamed"]] + [row["key"] for row in result["dropped"]]
    assert sorted(told) == sorted(keys)
    encoder = SpeakerEncoder.load(tmp_path / "own")
    assert result["frontend"] == encoder.frontend.to_dict() and result["model"]["config"] == encoder.model.config
    assert result["parameters"] == sum(p.numel() for p in encoder.model.parameters())
    original = SpeakerEncoder.load(wespeaker)
    samples = check_signal(16000)
    assert torch.equal(encoder.embed(samples), original.embed(samples))
    np.testing.assert_array_equal(np.float32(result["self_check"]["embedding"]), encoder.embed(samples).numpy())


def test_what_the_weights_do_not_tell(spkfast, tmp_path, speechbrain):
    error = spkfast("convert", speechbrain, "--out", tmp_path / "own").error
    assert error.startswith(
        f"spkfast convert: error: {speechbrain}: speechbrain and 3D-Speaker name their weights alike"
    )
    assert not (tmp_path / "own").exists()
    for number, (options, spec) in enumerate((
        (["--family", "3dspeaker"], frontend("3dspeaker", n_mels=20)),
        (["--family", "speechbrain"], frontend("speechbrain", n_mels=20)),
        (["--frontend", "kaldi"], frontend("kaldi", n_mels=20)),
    )):  # fmt: skip
        run = spkfast("convert", speechbrain, "--out", tmp_path / str(number), *options)
        assert run.status == 0 and ", n_mels 20 in place of the preset's " in run.out
        assert SpeakerEncoder.load(tmp_path / str(number)).frontend == spec
    run = spkfast("convert", speechbrain, "--out", tmp_path / "own", "--family", "3dspeaker", "--option",
                  "dilations=[1, 1, 2, 3]", "--option", "padding=batch")  # fmt: skip
    assert run.status == 0 and "assumed" in run.out
    config = SpeakerEncoder.load(tmp_path / "own").model.config
    assert config["dilations"] == [1, 1, 2, 3] and config["padding"] == "batch"


def test_a_file_that_would_run_code_is_refused(spkfast, tmp_path):
    torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "a.pt")
    error = spkfast("convert", tmp_path / "a.pt", "--out", tmp_path / "own").error
    assert "a.pt: refused: loading it would run 'posix.system'" in error
    assert not (tmp_path / "ran").exists() and not (tmp_path / "own").exists()


ERRORS = {
    "no such model": ["{0}/none", "--out", "{0}/own"],
    "wespeaker/avg_model.pt: scale=8 contradicts the checkpoint": [
        "{0}/wespeaker", "--out", "{0}/own", "--option", "scale=8"
    ],
    "unknown option 'source'": ["{0}/wespeaker", "--out", "{0}/own", "--option", "source=8"],
    "--option scale: expected name=value": ["{0}/wespeaker", "--out", "{0}/own", "--option", "scale"],
    "--option dilations=[1: ": ["{0}/wespeaker", "--out", "{0}/own", "--option", "dilations=[1"],
    "--option family=...: use --family": ["{0}/wespeaker", "--out", "{0}/own", "--option", "family=espnet"],
    "unknown front-end preset 'wespeker' (did you mean 'wespeaker'?)": [
        "{0}/wespeaker", "--out", "{0}/own", "--frontend", "wespeker"
    ],
    "family must be one of": ["{0}/wespeaker", "--out", "{0}/own", "--family", "kaldi"],
    "wespeaker: is the folder of the checkpoint; name another": ["{0}/wespeaker", "--out", "{0}/wespeaker"],
    "holds 'avg_model.pt', which saving would remove": ["{0}/copy", "--out", "{0}/wespeaker"],
    "the network does not run with these options: ": [
        "{0}/wespeaker", "--out", "{0}/own", "--option", f"dilations=[1, 2, 3, {10**30}]"
    ],
    "--option dilations=!!timestamp x: ": [
        "{0}/wespeaker", "--out", "{0}/own", "--option", "dilations=!!timestamp x"
    ],
    "--out": ["{0}/wespeaker"],
    "notes.txt: is a file; name a folder": ["{0}/wespeaker", "--out", "{0}/notes.txt"],
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_bad_input_is_one_line(spkfast, tmp_path, wespeaker, message):
    shutil.copytree(wespeaker, tmp_path / "copy")
    (tmp_path / "notes.txt").write_text("mine")
    error = spkfast("convert", *(argument.format(tmp_path) for argument in ERRORS[message])).error
    assert message in error and not (tmp_path / "own").exists()
    assert sorted(path.name for path in wespeaker.iterdir()) == ["avg_model.pt", "config.yaml"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("out", ["", ".", "../hf"])
def test_the_source_is_never_replaced(spkfast, tmp_path, monkeypatch, out):
    """Its files have the names of ours, so that its folder would pass for a model to write anew."""
    from safetensors.torch import save_file

    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(foreign_state(small_model("wespeaker"), "wespeaker"), folder / "model.safetensors")
    (folder / "config.yaml").write_text(SETTINGS)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.chdir(folder)
    for source in (folder, folder / "model.safetensors"):
        assert "is the folder of the checkpoint" in spkfast("convert", source, "--out", out or folder).error
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert "other: holds 'config.yaml', which saving would remove" in spkfast("convert", folder, "--out", other).error
    for place in (folder, other):
        assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert spkfast("convert", folder, "--out", tmp_path / "own").status == 0
    assert spkfast("convert", folder, "--out", tmp_path / "own").status == 0  # its own folder it writes anew


def test_weights_that_are_not_finite_are_told(spkfast, tmp_path, wespeaker):
    state = torch.load(wespeaker / "avg_model.pt", weights_only=True)
    state["linear.bias"][0] = torch.nan
    torch.save(state, wespeaker / "avg_model.pt")
    error = spkfast("convert", wespeaker, "--out", tmp_path / "own").error
    assert error.endswith("avg_model.pt: gives no finite embedding: linear.bias holds NaN or infinite values")
    assert not (tmp_path / "own").exists()


def test_another_model_is_replaced_by_force_only(spkfast, tmp_path, wespeaker, model):
    own = tmp_path / "own"
    shutil.copytree(model, own)
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    assert (
        "own: holds another model; name another folder, or --force" in spkfast("convert", wespeaker, "--out", own).error
    )
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    assert spkfast("convert", wespeaker, "--out", own, "--force").status == 0
    encoder = SpeakerEncoder.load(own)
    assert encoder.frontend.frame_shift_ms == 8
    encoder.threshold = Threshold(0.25, "trials.txt")
    encoder.save(own)
    assert spkfast("convert", wespeaker, "--out", own).status == 0
    assert SpeakerEncoder.load(own).threshold == (0.25, "trials.txt")
    (own / "model.safetensors").write_bytes(b"x")
    assert "own: holds a damaged model" in spkfast("convert", wespeaker, "--out", own).error
    assert spkfast("convert", wespeaker, "--out", own, "--force").status == 0
    assert "own: already a spkfast model folder" in spkfast("convert", own, "--out", tmp_path / "again").error


def test_check_signal_is_what_the_page_says():
    signal = check_signal(16000)
    assert signal.dtype == np.int16 and len(signal) == 48000
    assert [int(value) for value in signal[[0, 1, 500, 47999]]] == [
        (n * n // 500 + 137 * n) % 16001 - 8000 for n in (0, 1, 500, 47999)
    ]
