"""Checkpoints of other toolkits: every key accounted for, the same numbers, nothing in a file run."""

from __future__ import annotations

import collections
import io
import json
import pickle
import re
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch

from spkfast import InputError, SpeakerEncoder, frontend, models
from spkfast.models import from_state_dict
from spkfast.models.checkpoint_files import import_checkpoint, read_settings, read_weights
from spkfast.models.checkpoints import _TABLE, import_state_dict
from tests.models.foreign import Evil, foreign_state, golden_state, small_model

GOLDENS = {  # name: family that the keys tell
    "wespeaker_ecapa_small_glob": "wespeaker", "wespeaker_ecapa_small_astp": "wespeaker",
    "wespeaker_ecapa_small_embbn": "wespeaker", "wespeaker_ecapa_small_tstp": "wespeaker",
    "wespeaker_ecapa_tdnn_c512": "wespeaker", "wespeaker_ecapa_tdnn_glob_c512": "wespeaker",
    "wespeaker_ecapa_tdnn_glob_c1024": "wespeaker", "speechbrain_ecapa_small_a": "speechbrain",
    "speechbrain_ecapa_small_noglobal": "speechbrain", "speechbrain_ecapa_small_shortcut": "speechbrain",
    "speechbrain_ecapa_std": "speechbrain", "3dspeaker_ecapa_small": "speechbrain",
    "taoruijie_ecapa_c64": "taoruijie", "taoruijie_ecapa_c1024": "taoruijie", "espnet_ecapa_small_a": "espnet",
}  # fmt: skip
DIALECTS = ("wespeaker", "speechbrain", "3dspeaker", "taoruijie", "espnet")


def assert_every_key_once(imported, keys):
    told = [theirs for theirs, _ in imported.renamed] + [key for key, _ in imported.dropped]
    assert sorted(told) == sorted(keys)
    assert {ours for _, ours in imported.renamed} == set(imported.model.state_dict())
    assert all(reason for _, reason in imported.dropped)


def test_every_ecapa_golden_is_here(golden):
    assert {path.stem for path in (golden / "models").glob("*ecapa*.json")} == set(GOLDENS)


@pytest.mark.parametrize("name", GOLDENS)
def test_keys_of_every_toolkit(golden, name):
    state, entry = golden_state(golden / "models", name)
    imported = import_state_dict(state)
    assert imported.family == GOLDENS[name] == imported.config["dialect"] and not imported.model.training
    assert sum(p.numel() for p in imported.model.parameters()) == entry["parameters"]
    assert_every_key_once(imported, state)
    own = imported.model.state_dict()
    for theirs, ours in imported.renamed:
        assert torch.equal(own[ours].flatten(), state[theirs].flatten()), (theirs, ours)
    constants = {key for key in state if key.startswith("torchfbank.")}
    assert {key for key, _ in imported.dropped} == constants
    assert bool(constants) == (GOLDENS[name] == "taoruijie")


@pytest.mark.filterwarnings("ignore:assumed dilations")
@pytest.mark.parametrize("name", [name for name in GOLDENS if "small" in name])
def test_embedding_of_every_toolkit(golden, name):
    state, entry = golden_state(golden / "models", name)
    model = from_state_dict(state, family="3dspeaker" if name.startswith("3dspeaker") else None)
    arrays = np.load(golden / "models" / f"{name}.npz")
    cases = [case for case in entry["cases"] if not case["case"].endswith("_len")]
    assert cases
    for case in cases:
        item = case["inputs"][0]
        with torch.inference_mode():
            got = model(torch.from_numpy(np.load(golden / item["file"])[item["key"]])).numpy()
        want = arrays[f"{case['case']}__embedding"].reshape(got.shape)
        bound = max(2e-5, 10 * case["outputs"]["embedding"]["peer_float32_rel_err"])
        assert np.abs(got - want).max() / np.abs(want).max() < bound


def test_taoruijie_from_file_to_embedding(golden, tmp_path):
    """The front-end too: their checkpoint and waveforms, their embeddings."""
    state, entry = golden_state(golden / "models", "taoruijie_ecapa_c64")
    state = {f"speaker_encoder.{key}": value for key, value in state.items()}
    head = torch.randn(7, 192)
    torch.save({**state, "speaker_loss.weight": head}, tmp_path / "exp.model")
    encoder = SpeakerEncoder.load(tmp_path / "exp.model")
    assert encoder.frontend == frontend("taoruijie")
    arrays = np.load(golden / "models" / "taoruijie_ecapa_c64.npz")
    for case in entry["cases"]:
        item = case["inputs"][0]
        got = encoder.embed_batch(list(np.load(golden / item["file"])[item["key"]])).numpy()
        want = arrays[f"{case['case']}__embedding"]
        assert np.abs(got - want).max() / np.abs(want).max() < 2e-5
    found = import_checkpoint(tmp_path / "exp.model").network
    assert torch.equal(found.head, head)
    assert ("speaker_loss.weight", "class matrix of the training head") in found.dropped


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "config",
    [{}, {"channels": [32, 16, 8, 16], "groups": [1, 2, 1, 2, 4], "scale": 2, "kernel_sizes": [7, 5, 3, 1, 3]},
     {"kernel_sizes": [3, 3, 5], "dilations": [1, 2, 5], "scale": 8, "global_context": False, "emb_bn": True}],
    ids=["usual", "lists", "two_blocks"],
)  # fmt: skip
def test_sizes_outside_the_published_set(dialect, config):
    if dialect in ("speechbrain", "3dspeaker"):
        config = {key: value for key, value in config.items() if key != "emb_bn"}  # they have none
    elif "channels" in config:
        config = {**config, "channels": 16, "kernel_sizes": [7, 5, 3, 1]}  # nor these a shortcut
        config.pop("groups")
    net = small_model(dialect, **config)
    state = foreign_state(net, dialect)
    told = {key: config[key] for key in ("dilations",) if key in config}
    imported = import_state_dict(state, dialect if dialect == "3dspeaker" else None, **told)
    assert_every_key_once(imported, state)
    features = torch.randn(2, 30, 20)
    with torch.inference_mode():
        assert torch.equal(imported.model(features), net(features))
    again = models.create("ecapa_tdnn", **json.loads(json.dumps(imported.config)))
    again.load_state_dict(imported.model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32(dtype):
    state = foreign_state(small_model("espnet"), "espnet")
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    got = import_state_dict(cast).model.state_dict()
    for name, value in import_state_dict(state).model.state_dict().items():
        assert got[name].dtype == value.dtype
        torch.testing.assert_close(got[name], value.to(dtype).to(value.dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("golden_name", "pooling"),
    [("wespeaker_mhastp", {"name": "mhastp", "heads": 2, "layers": 2, "bottleneck": 64, "per_channel": False}),
     ("wespeaker_mhastp_ds", {"name": "mhastp", "heads": 4, "layers": 3, "bottleneck": 8, "per_channel": True}),
     ("wespeaker_mhastp_l1", {"name": "mhastp", "heads": 3, "layers": 1, "per_channel": False}),
     ("wespeaker_mqmhastp", {"name": "mqmhastp", "heads": 8, "layers": 2, "bottleneck": 64, "per_channel": True,
                             "queries": 2}),
     ("wespeaker_xi", {"name": "xi", "with_std": False}), ("wespeaker_asp", {"name": "asp_channel"}),
     ("wespeaker_astp_glob", {"name": "astp"})],
)  # fmt: skip
def test_poolings_of_wespeaker(golden, golden_name, pooling):
    """A network around the golden's pooling: its keys lead to the right one, and its numbers come out."""
    parts, entry = golden_state(golden / "poolings", golden_name)
    arrays = np.load(golden / "poolings" / f"{golden_name}.npz")
    case = next(case for case in entry["cases"] if case["outputs"])
    (output,) = case["outputs"]
    want = torch.from_numpy(arrays[f"{case['case']}__{output}"])
    net = small_model("wespeaker", pooling={"name": "tap"})
    state = {key: value for key, value in foreign_state(net, "wespeaker").items() if not key.startswith("bn.")}
    width = want[0].numel()
    state |= {f"bn.{key}": torch.rand(width) for key in ("weight", "bias", "running_mean", "running_var")}
    state |= {"bn.num_batches_tracked": torch.tensor(1), "linear.weight": torch.randn(12, width)}
    state |= {f"pool.{key}": value for key, value in parts.items()}
    imported = import_state_dict(state)
    assert imported.config["pooling"] == pooling and imported.assumed == []
    assert_every_key_once(imported, state)
    item = case["inputs"][0]
    with torch.inference_mode():
        got = imported.model.pooling(torch.from_numpy(np.load(golden / item["file"])[item["key"]]).transpose(1, 2))
    bound = max(2e-5, 10 * case["outputs"][output]["peer_float32_rel_err"])
    assert float((got - want.reshape(got.shape)).abs().max() / want.abs().max()) < bound


@pytest.mark.parametrize(
    ("dialect", "pooling", "found"),
    [("wespeaker", "tstp", "tstp"), ("wespeaker", "tap", "tap"), ("wespeaker", "tsdp", "tap"),
     ("espnet", "stats", "stats"), ("espnet", "mean", "tap")],
)  # fmt: skip
def test_poolings_without_parameters(dialect, pooling, found):
    state = foreign_state(small_model(dialect, pooling=pooling), dialect)
    imported = import_state_dict(state)
    assert imported.config["pooling"]["name"] == found and imported.assumed == ["pooling"]
    told = import_state_dict(state, pooling=pooling)
    assert told.config["pooling"]["name"] == pooling and told.assumed == []


@pytest.mark.parametrize("family", ["speechbrain", "3dspeaker"])
def test_what_is_assumed_is_told(family):
    state = foreign_state(small_model("speechbrain"), "speechbrain")
    assert import_state_dict(state, family).assumed == ["dilations", "groups"]
    told = import_state_dict(state, family, dilations=[1, 1, 2, 3, 1])
    assert told.assumed == ["groups"] and told.config["dilations"] == [1, 1, 2, 3, 1]
    assert told.model.encoder.blk3.res[0].conv.dilation == (3,)
    assert import_state_dict(state, family, dilations=[1, 2, 3, 4], groups=1).assumed == []


@pytest.mark.parametrize("dialect", ["wespeaker", "taoruijie", "espnet"])
def test_networks_without_a_choice_assume_nothing(dialect):
    assert import_state_dict(foreign_state(small_model(dialect), dialect)).assumed == []


@pytest.mark.parametrize(
    ("pooling", "theirs"),
    [("astp", {}), ("asp_channel", {"linear1": "attention.0", "linear2": "attention.3"}),
     ("xi", {"linear1": "lin1_relu_bn.0", "attention.2": "lin1_relu_bn.2", "linear2": "lin2"})],
)  # fmt: skip
def test_messages_name_the_keys_of_the_pooling_that_is_there(pooling, theirs):
    state = foreign_state(small_model("wespeaker", pooling={"name": pooling}), "wespeaker")
    for first, own in theirs.items():
        state = {key.replace(f"pool.{first}.", f"pool.{own}."): value for key, value in state.items()}
    assert import_state_dict(state).config["pooling"]["name"] == pooling
    first = f"pool.{theirs.get('linear1', 'linear1')}.weight"
    state.pop(bias := f"pool.{theirs.get('linear2', 'linear2')}.bias")
    with pytest.raises(InputError, match=rf"missing: {re.escape(bias)}$"):
        import_state_dict(state)
    with pytest.raises(InputError, match=rf"^{re.escape(first)} has shape \(6,\)"):
        import_state_dict({**state, first: torch.zeros(6)})


WRAPPERS = {
    "module": lambda s: {f"module.{key}": value for key, value in s.items()},
    "module_within": lambda s: {f"speaker.module.{key}": value for key, value in s.items()},
    "some_module": lambda s: {("module." if "bn" in key else "") + key: value for key, value in s.items()},
    "model_prefix": lambda s: {f"model.{key}": value for key, value in s.items()},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}},
    "model_state_dict": lambda s: {"model_state_dict": {f"module.{key}": value for key, value in s.items()}},
    "nested": lambda s: {"state_dict": {"model": collections.OrderedDict(s)}},
    "not_a_tensor": lambda s: {**s, "_metadata": "x"},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("dialect", ["wespeaker", "speechbrain", "taoruijie", "espnet"])
def test_wrappers(dialect, wrapper):
    net = small_model(dialect)
    wrapped = WRAPPERS[wrapper](foreign_state(net, dialect))
    imported = import_state_dict(wrapped)
    own = net.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in imported.model.state_dict().items())
    inner, beside = wrapped, []
    while name := next((n for n in ("state_dict", "model", "model_state_dict") if n in inner), None):
        beside += [key for key in inner if key != name]
        inner = inner[name]
    assert_every_key_once(imported, [*inner, *beside])


def changed(dialect="wespeaker", **changes):
    """A small state dict in which tensors are replaced, or taken out where the change is None."""
    state = {**foreign_state(small_model(dialect), dialect), **changes}
    return {key: value for key, value in state.items() if value is not None}


ONE = torch.zeros(1)
SMALL_WESPEAKER = foreign_state(small_model("wespeaker"), "wespeaker")
REFUSED = {
    r"family must be one of .*got 'wespeker' \(did you mean 'wespeaker'\?\)": (
        lambda: changed(), {"family": "wespeker"}
    ),
    r"family='espnet' contradicts the keys: 'layer2\.se_res2block\.0\.conv\.weight' is wespeaker's": (
        lambda: changed(), {"family": "espnet"}
    ),
    r"unknown option 'chanels' of model ecapa_tdnn \(did you mean 'channels'\?\)": (lambda: changed(), {"chanels": 4}),
    r"channels=512 contradicts the checkpoint, whose shapes give 16": (lambda: changed(), {"channels": 512}),
    r"scale=8 contradicts the checkpoint, whose shapes give 4": (lambda: changed(), {"scale": 8}),
    r"kernel_sizes=\[5, 5, 3, 3\] contradicts": (lambda: changed(), {"kernel_sizes": [5, 5, 3, 3]}),
    r"dialect='espnet' contradicts the checkpoint, whose shapes give 'wespeaker'": (
        lambda: changed(), {"dialect": "espnet"}
    ),
    r"global_context=False contradicts": (lambda: changed(), {"global_context": False}),
    r"pooling='tstp' contradicts the checkpoint, which gives \{'name': 'astp'\}": (
        lambda: changed(), {"pooling": "tstp"}
    ),
    r"does not fit its network; missing: layer3\.se_res2block\.1\.bns\.2\.running_var, linear\.bias": (
        lambda: changed(**{"linear.bias": None, "layer3.se_res2block.1.bns.2.running_var": None}), {}
    ),
    r"missing: pool\.linear2\.bias; left over: extra\.weight, pool\.linear3\.bias": (
        lambda: changed(**{"pool.linear2.bias": None, **dict.fromkeys(("extra.weight", "pool.linear3.bias"), ONE)}), {}
    ),
    r"of another shape or type: linear\.bias \(13,\) for \(12,\)": (
        lambda: changed(**{"linear.bias": torch.zeros(13)}), {}
    ),
    r"of another shape or type: linear\.bias torch\.int64": (
        lambda: changed(**{"linear.bias": torch.zeros(12, dtype=torch.int64)}), {}
    ),
    r"missing: conv\.weight": (lambda: changed(**{"conv.weight": None}), {}),
    r"conv\.weight has shape \(24, 17, 1\), but takes 48 channels": (
        lambda: changed(**{"conv.weight": torch.zeros(24, 17, 1)}), {}
    ),
    r"pool\.linear1\.weight has shape \(6, 48, 1\), but takes 24 or 72 channels": (
        lambda: changed(**{"pool.linear1.weight": torch.zeros(6, 48, 1)}), {}
    ),
    r"missing: asp\.tdnn\.conv\.conv\.weight": (
        lambda: {key: value for key, value in changed("speechbrain").items() if not key.startswith("asp.")}, {}
    ),
    r"keys 'linear\.bias' and 'module\.linear\.bias' differ by 'module\.' alone": (
        lambda: changed(**{"module.linear.bias": torch.zeros(12)}), {}
    ),
    r"holds several networks \(wespeaker below 'a\.', wespeaker below 'b\.'\)": (
        lambda: {prefix + key: value for prefix in ("a.", "b.") for key, value in SMALL_WESPEAKER.items()}, {}
    ),
    r"holds 'state_dict' and 'model'; pass the one you mean": (
        lambda: {"model": SMALL_WESPEAKER, "state_dict": SMALL_WESPEAKER}, {}
    ),
    r"learned front-end \('frontend\.upstream\.w'\), which is not supported": (
        lambda: changed(**{"frontend.upstream.w": torch.zeros(1)}), {}
    ),
    r"a tensor of shape \(1000000, 16\) claims more values than are stored": (
        lambda: changed(**{"layer2.se_res2block.3.linear1.weight": torch.zeros(1).expand(1000000, 16)}), {}
    ),
    # A network of these sizes would take terabytes.
    r"missing: pool\.linear2\.weight; of another shape.*linear\.weight \(480000, 1\) for \(480000, 960000\)": (
        lambda: changed(**{
            "conv.weight": torch.zeros(480000, 1, 1), "pool.linear1.weight": torch.zeros(1, 480000, 1),
            "pool.linear2.weight": None, "linear.weight": torch.zeros(480000, 1),
        }), {},
    ),
    r"groups must divide 48 and 24 channels, got 48": (lambda: changed(**{"conv.weight": torch.zeros(24, 1, 1)}), {}),
    r"block 1 has 3 Res2 convolutions of 1 channels, but 16 channels in all": (
        lambda: changed(**{"layer2.se_res2block.1.convs.0.weight": torch.zeros(1, 1, 3)}), {}
    ),
    r"is sparse or quantized": (lambda: changed(**{"linear.bias": torch.zeros(12).to_sparse()}), {}),
    r"groups must be positive integers, got 'x'": (lambda: changed(), {"groups": "x"}),
    r"dilations must be a list of positive integers, got 3": (lambda: changed(), {"dilations": 3}),
    r"pooling=\['astp'\] contradicts the checkpoint, which gives \{'name': 'astp'\}": (
        lambda: changed(), {"pooling": ["astp"]}
    ),
    r"the network has 2 blocks, whose dilations are not in the checkpoint: pass dilations, a list of 3": (
        lambda: foreign_state(small_model("speechbrain", kernel_sizes=[5, 3, 3], dilations=[1, 2, 3]), "speechbrain"),
        {},
    ),
    r"not those of an ECAPA-TDNN of wespeaker, .*they look like those of SKA-TDNN": (
        lambda: {**changed("espnet"), "encoder.layer1.skconvs.0.0.conv.weight": torch.zeros(1)}, {}
    ),
    r"look like those of RawNet3": (lambda: {"encoder.layer1.afms.alpha": torch.zeros(1)}, {}),
    r"look like those of spkfast itself": (lambda: small_model("wespeaker").state_dict(), {}),
    r"they begin 'weight', 'bias'": (lambda: {"weight": torch.zeros(1), "bias": torch.zeros(1)}, {}),
    r"left over: layer9{5000}\.conv1\.weight": (
        lambda: changed("taoruijie", **{f"layer{'9' * 5000}.conv1.weight": ONE}), {}
    ),
    r"^holds no tensors$": (lambda: {}, {}),
    r"must map names to tensors, got list": (lambda: [torch.zeros(1)], {}),
}  # fmt: skip


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("prefix", ["", "speaker_encoder."])
@pytest.mark.parametrize("dialect", ["wespeaker", "speechbrain", "taoruijie", "espnet"])
def test_missing_key_by_which_the_family_is_found(dialect, prefix, told):
    sign = _TABLE[dialect].sign
    state = {prefix + key: value for key, value in changed(dialect, **{sign: None}).items()}
    with pytest.raises(
        InputError, match=rf"^{dialect} checkpoint does not fit its network; missing: {re.escape(sign)}$"
    ):
        import_state_dict(state, dialect if told else None)


def test_from_state_dict_warns_of_dilations():
    state = foreign_state(small_model("speechbrain"), "speechbrain")
    with pytest.warns(
        UserWarning, match=r"^assumed dilations \[1, 2, 3, 4\], groups 1, .*pass dilations=\.\.\.$"
    ) as caught:
        from_state_dict(state)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_state_dict(state, dilations=[1, 2, 3, 4])
        from_state_dict(foreign_state(small_model("wespeaker", pooling="tstp"), "wespeaker"))


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_told(message):
    state, options = REFUSED[message]
    with pytest.raises(InputError, match=message) as caught:
        from_state_dict(state(), **options)
    assert "\n" not in str(caught.value)


def test_keywords_in_any_form_agree():
    state = foreign_state(small_model("wespeaker"), "wespeaker")
    for told in ({"channels": [16, 16, 16, 16]}, {"channels": [16, 16, 16, 16, 24]}, {"groups": [1, 1, 1, 1, 1]},
                 {"kernel_sizes": (5, 3, 3, 3, 1)}, {"pooling": {"name": "astp"}}, {"feature_dim": 20}):  # fmt: skip
        import_state_dict(state, **told)


def test_heads_with_layers_of_their_own_are_no_class_matrix():
    imported = import_state_dict({**changed(), "projection.weight": torch.zeros(9, 40), "projection.x": torch.ones(1)})
    assert imported.head is None
    assert [key for key, _ in imported.dropped] == ["projection.weight", "projection.x"]


def write_zip(path, content):
    torch.save(content, path)


def write_legacy(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_pickle(path, content):
    path.write_bytes(pickle.dumps({"x": content["x"]}, protocol=2))


def write_tar(path, content):
    """The format of the first releases of torch."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(content)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("write", "message"),
    [(write_zip, r"refused: loading it would run 'posix\.system'"),
     (write_legacy, r"refused: loading it would run 'posix\.system'"),
     (write_pickle, r"refused: loading it would run 'posix\.system'"),
     (write_tar, "a tar or gzip archive: unpack it")],
)  # fmt: skip
def test_a_file_that_would_run_code_is_refused(tmp_path, write, message):
    marker, path = tmp_path / "ran", tmp_path / "avg_model.pt"
    write(path, {**SMALL_WESPEAKER, "x": Evil(marker)})
    for load in (SpeakerEncoder.load, import_checkpoint):
        with pytest.raises(InputError, match=rf"avg_model\.pt: {message}") as caught:
            load(path)
        assert "\n" not in str(caught.value) and not marker.exists()
    # The file is what it is taken for: the plain loader runs the command.
    if write is not write_tar:
        pickle.loads(path.read_bytes()) if write is write_pickle else torch.load(path, weights_only=False)
        assert marker.exists()


def test_environment_does_not_switch_the_check_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="refused"):
        read_weights(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_head_beside_the_network_is_checked_too(tmp_path):
    torch.save(foreign_state(small_model("speechbrain"), "speechbrain"), tmp_path / "embedding_model.ckpt")
    torch.save({"weight": Evil(tmp_path / "ran")}, tmp_path / "classifier.ckpt")
    with pytest.raises(InputError, match=r"classifier\.ckpt: refused"):
        import_checkpoint(tmp_path, family="speechbrain")
    assert not (tmp_path / "ran").exists()


def rewrite(source, target, edit, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
        edit(new)


def add_link(archive):
    link = zipfile.ZipInfo("archive/link")
    link.external_attr = 0o120777 << 16
    archive.writestr(link, "/etc/passwd")


ARCHIVES = {
    r"member '\.\./\.\./out' lies outside": lambda archive: archive.writestr("../../out", b"x"),
    r"member '/etc/out' lies outside": lambda archive: archive.writestr("/etc/out", b"x"),
    r"member 'C:/out' lies outside": lambda archive: archive.writestr("C:/out", b"x"),
    r"member 'archive/link' is a link": add_link,
}


@pytest.mark.parametrize("message", ARCHIVES)
def test_archives_are_checked_member_by_member(tmp_path, message):
    torch.save(SMALL_WESPEAKER, tmp_path / "good.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "good2.pt", lambda archive: None)
    assert read_weights(tmp_path / "good2.pt").keys() == SMALL_WESPEAKER.keys()
    rewrite(tmp_path / "good.pt", tmp_path / "bad.pt", ARCHIVES[message])
    with pytest.raises(InputError, match=rf"bad\.pt: refused: {message}"):
        read_weights(tmp_path / "bad.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_torch_does_not_write(tmp_path):
    torch.save(SMALL_WESPEAKER, tmp_path / "good.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "a.pt", lambda archive: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"a\.pt: refused: member '.+' is compressed"):
        read_weights(tmp_path / "a.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "b.pt", lambda archive: archive.writestr("good/data.pkl", b"x"))
    with pytest.raises(InputError, match=r"b\.pt: refused: member 'good/data\.pkl' comes twice"):
        read_weights(tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("avg_model.pt", b"x")
    with pytest.raises(InputError, match=r"c\.pt: a zip archive without a checkpoint: unpack it"):
        read_weights(tmp_path / "c.pt")
    # Two entries of the directory for one stretch of the file, as decompression bombs have.
    whole = (tmp_path / "good.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        members, start = archive.infolist(), archive.start_dir
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as archive:
        archive.fp.write(whole[:start])
        archive.start_dir = start
        largest = max(members, key=lambda member: member.file_size)
        copies = [zipfile.ZipInfo(f"good/copy{i}") for i in range(40)]
        for copy in copies:
            copy.header_offset, copy.CRC = largest.header_offset, largest.CRC
            copy.file_size = copy.compress_size = largest.file_size
        archive.filelist += [*members, *copies]
        archive._didModify = True
    with pytest.raises(InputError, match=r"d\.pt: refused: its members claim more bytes than the file has"):
        read_weights(tmp_path / "d.pt")


DAMAGED = {
    b"x": r"a\.pt: not a checkpoint, or a damaged one$",
    b"hello": r"a\.pt: not a checkpoint, or a damaged one$",  # to pickle, a key that is not there
    b"": r"a\.pt: is empty \(0 bytes\)$",
    b"PK\x03\x04 and no more": r"a\.pt: damaged: File is not a zip file",
    b"\x1f\x8b\x08\x00": r"a\.pt: a tar or gzip archive: unpack it",
}


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_files(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(InputError, match=DAMAGED[content]) as caught:
        SpeakerEncoder.load(tmp_path / "a.pt")
    assert "\n" not in str(caught.value) and "weights_only=False" not in str(caught.value)


def test_cut_off_file_and_other_contents(tmp_path):
    torch.save(SMALL_WESPEAKER, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"a\.pt: damaged: File is not a zip file"):
        read_weights(tmp_path / "a.pt")
    torch.save([torch.zeros(2)], tmp_path / "b.pt")
    with pytest.raises(InputError, match=r"b\.pt: holds list, not a dictionary of tensors"):
        read_weights(tmp_path / "b.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "c.pt")
    with pytest.raises(InputError, match=r"c\.pt: refused: loading it would run 'torch\.nn\.modules\.linear\.Linear'"):
        read_weights(tmp_path / "c.pt")
    (tmp_path / "d.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(InputError, match=r"d\.safetensors: damaged"):
        read_weights(tmp_path / "d.safetensors")
    with pytest.raises(InputError, match=r"e\.pt: no such file"):
        read_weights(tmp_path / "e.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_values_beside_the_weights_are_fine(tmp_path, legacy):
    content = {"state_dict": collections.OrderedDict(SMALL_WESPEAKER), "epoch": np.int64(3), "loss": np.float64(0.5),
               "lr": np.float32(0.1), "args": {"model": "x", "sizes": (1, 2)}}  # fmt: skip
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    assert read_weights(tmp_path / "a.pt")["loss"] == 0.5
    imported = import_checkpoint(tmp_path / "a.pt").network
    assert_every_key_once(imported, [*SMALL_WESPEAKER, "epoch", "loss", "lr", "args"])


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    save_file(SMALL_WESPEAKER, tmp_path / "a.safetensors")
    loaded = SpeakerEncoder.load(tmp_path / "a.safetensors")
    assert loaded.frontend == frontend("wespeaker", n_mels=20)


HYPERPARAMS = """
n_mels: 20
pretrained_path: speechbrain/spkrec-ecapa-voxceleb
dil: [1, 3, 2, 1, 1]
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: !ref <n_mels>
    hop_length: 8
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: !ref <n_mels>
    channels: [16, 16, 16, 16, 24]
    dilations: !ref <dil>
    groups: [1, 1, 1, 1, 1]
seed: !apply:torch.manual_seed [1234]
folder: !PLACEHOLDER
"""
SPEAKERLAB = """
sample_rate: 16000
fbank_dim: 20
lr: !!float 5e-5
feature_extractor:
  obj: speakerlab.process.processor.FBank
  args: {n_mels: <fbank_dim>, sample_rate: <sample_rate>, mean_nor: True}
embedding_model:
  obj: speakerlab.models.ecapa_tdnn.ECAPA_TDNN.ECAPA_TDNN
  args: {input_size: <fbank_dim>, channels: [16, 16, 16, 16, 24]}
"""
WESPEAKER = """
model: ECAPA_TDNN_c512
model_args: {feat_dim: 20, embed_dim: 12, pooling_func: ASTP}
dataset_args:
  resample_rate: 8000
  fbank_args: {num_mel_bins: 20, frame_shift: 10, frame_length: 32, dither: 1.0}
  cmvn_args: {norm_mean: True, norm_var: True}
"""
ESPNET = """
frontend: melspec_torch
frontend_conf: {preemp: true, n_fft: 512, log: true, win_length: 400, hop_length: 80, n_mels: 20, normalize: mn}
encoder: ecapa_tdnn
encoder_conf: {model_scale: 4, ndim: 16}
pooling: chn_attn_stat
projector: rawnet3
preprocessor_conf: {sample_rate: 16000}
"""


def write_folder(folder, dialect, weights, settings, text):
    (folder / weights).parent.mkdir(parents=True, exist_ok=True)
    torch.save(foreign_state(small_model(dialect), dialect), folder / weights)
    (folder / settings).write_text(text)


@pytest.mark.parametrize(
    ("dialect", "weights", "settings", "text", "fields"),
    [("speechbrain", "embedding_model.ckpt", "hyperparams.yaml", HYPERPARAMS, {"frame_shift_ms": 8.0}),
     ("3dspeaker", "models/CKPT-EPOCH-70-00/embedding_model.ckpt", "config.yaml", SPEAKERLAB, {}),
     ("wespeaker", "avg_model.pt", "config.yaml", WESPEAKER,
      {"sample_rate": 8000, "frame_length_ms": 32.0, "std_norm": True, "std_unbiased": True, "var_eps": 1e-7}),
     ("wespeaker", "models/avg_model.pt", "config.yaml", WESPEAKER,
      {"sample_rate": 8000, "frame_length_ms": 32.0, "std_norm": True, "std_unbiased": True, "var_eps": 1e-7}),
     ("espnet", "valid.eer.ave.pth", "config.yaml", ESPNET, {"frame_shift_ms": 5.0})],
    ids=["speechbrain", "3dspeaker", "wespeaker", "wespeaker_experiment", "espnet"],
)  # fmt: skip
def test_folders_with_settings(tmp_path, dialect, weights, settings, text, fields):
    write_folder(tmp_path, dialect, weights, settings, text)
    found = import_checkpoint((tmp_path / weights).parent)
    assert found.network.family == dialect and found.settings == tmp_path / settings
    assert found.frontend.to_dict() == frontend(dialect, **{"n_mels": 20, **fields}).to_dict()
    if dialect == "speechbrain":
        assert found.network.config["dilations"] == [1, 3, 2, 1, 1] and found.network.assumed == []
    encoder = SpeakerEncoder.load((tmp_path / weights).parent)
    assert encoder.frontend == found.frontend
    samples = np.random.default_rng(0).normal(size=8000).astype(np.float32) / 10
    encoder.save(tmp_path / "own")
    assert torch.equal(SpeakerEncoder.load(tmp_path / "own").embed(samples), encoder.embed(samples))
    other = frontend("kaldi", n_mels=20)
    assert SpeakerEncoder.load(tmp_path / weights, frontend=other).frontend == other


@pytest.mark.parametrize("source", ["avg_model.pt", ".", "../models", "../models/avg_model.pt", "x/../avg_model.pt"])
def test_settings_are_found_from_any_working_directory(tmp_path, monkeypatch, source):
    write_folder(tmp_path, "wespeaker", "models/avg_model.pt", "config.yaml", WESPEAKER)
    (tmp_path / "models/x").mkdir()
    monkeypatch.chdir(tmp_path / "models")
    found = import_checkpoint(source)
    assert found.settings == tmp_path / "config.yaml" and found.frontend.sample_rate == 8000


def test_link_to_a_file_without_a_suffix(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    save_file(SMALL_WESPEAKER, tmp_path / "0a1b2c")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/a.safetensors").symlink_to("../0a1b2c")
    monkeypatch.chdir(tmp_path / "kept")
    assert import_checkpoint("../kept/a.safetensors").network.family == "wespeaker"


def test_what_settings_tell_is_not_assumed(tmp_path):
    """An argument that they leave out has the default of the toolkit's class."""
    for i, (dialect, name, text) in enumerate([
        ("speechbrain", "hyperparams.yaml", edited(HYPERPARAMS, ("    dilations: !ref <dil>\n", ""))),
        ("3dspeaker", "config.yaml", SPEAKERLAB),
    ]):  # fmt: skip
        write_folder(tmp_path / str(i), dialect, "embedding_model.ckpt", name, text)
        network = import_checkpoint(tmp_path / str(i)).network
        assert network.assumed == [] and network.config["dilations"] == [1, 2, 3, 4, 1]
    for dialect, pooling, text in (
        ("wespeaker", "tap", edited(WESPEAKER, ("ASTP", "TAP"))),
        ("espnet", "mean", edited(ESPNET, ("pooling: chn_attn_stat", "pooling: mean"))),
    ):
        folder = tmp_path / dialect
        folder.mkdir()
        state = foreign_state(small_model(dialect, pooling=pooling), dialect)
        torch.save(state, folder / "a.pt")
        assert import_checkpoint(folder).network.assumed == ["pooling"]
        (folder / "config.yaml").write_text(text)
        assert import_checkpoint(folder).network.assumed == []


def test_load_warns_of_what_it_assumed(tmp_path):
    torch.save(foreign_state(small_model("wespeaker", pooling="tstp"), "wespeaker"), tmp_path / "a.pt")
    message = r"a\.pt: assumed pooling \{'name': 'tstp'\}, as neither the weights nor settings beside them tell"
    with pytest.warns(UserWarning, match=message) as caught:
        SpeakerEncoder.load(tmp_path / "a.pt")
    assert len(caught) == 1 and "\n" not in str(caught[0].message) and caught[0].filename == __file__
    torch.save(SMALL_WESPEAKER, tmp_path / "a.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SpeakerEncoder.load(tmp_path / "a.pt")


def test_groups_of_the_first_layer(tmp_path):
    """Half the values per frame in its weights: nothing beside them tells whether there are more."""
    net = small_model("speechbrain", groups=[2, 1, 1, 1, 1])
    torch.save(foreign_state(net, "speechbrain"), tmp_path / "embedding_model.ckpt")
    alone = import_checkpoint(tmp_path, family="speechbrain").network
    assert alone.config["feature_dim"] == 10 and "groups" in alone.assumed
    with pytest.raises(InputError, match="gives 20 values per frame, the network takes 10"):
        SpeakerEncoder.load(tmp_path, frontend=frontend("speechbrain", n_mels=20))
    told = import_checkpoint(tmp_path, family="speechbrain", groups=[2, 1, 1, 1, 1])
    assert told.network.config["feature_dim"] == told.frontend.n_mels == 20
    (tmp_path / "hyperparams.yaml").write_text(HYPERPARAMS)
    with pytest.raises(InputError, match=r"hyperparams\.yaml.* gives 20 values per frame, the network takes 10"):
        import_checkpoint(tmp_path)
    (tmp_path / "hyperparams.yaml").write_text(edited(HYPERPARAMS, ("[1, 1, 1, 1, 1]", "[2, 1, 1, 1, 1]")))
    assert import_checkpoint(tmp_path).network.config["feature_dim"] == 20


def test_foreign_folder_with_names_of_ours(tmp_path):
    from safetensors.torch import save_file

    save_file(SMALL_WESPEAKER, tmp_path / "model.safetensors")
    (tmp_path / "config.yaml").write_text(WESPEAKER)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert SpeakerEncoder.load(source).frontend.sample_rate == 8000
    with pytest.raises(InputError, match=r"holds 'config\.yaml', which saving would remove"):
        SpeakerEncoder.load(tmp_path).save(tmp_path)
    encoder = SpeakerEncoder.load(tmp_path)
    (tmp_path / "config.yaml").unlink()
    assert SpeakerEncoder.load(tmp_path).frontend == frontend("wespeaker", n_mels=20)
    with pytest.raises(InputError, match=r"holds 'model\.safetensors', which saving would remove"):
        encoder.save(tmp_path)
    assert read_weights(tmp_path / "model.safetensors").keys() == SMALL_WESPEAKER.keys()


def test_front_end_by_the_name_of_a_preset(tmp_path):
    write_folder(tmp_path, "wespeaker", "avg_model.pt", "config.yaml", WESPEAKER)
    encoder = SpeakerEncoder.load(tmp_path, frontend="kaldi")
    assert encoder.frontend == frontend("kaldi", n_mels=20)
    assert "kaldi, as given, n_mels 20 in place of" in import_checkpoint(tmp_path, frontend="kaldi").frontend_from
    assert SpeakerEncoder(encoder.model, "kaldi").frontend == encoder.frontend
    encoder.save(tmp_path / "own")
    assert SpeakerEncoder.load(tmp_path / "own", frontend="kaldi").frontend == encoder.frontend
    with pytest.raises(InputError, match="front-end differs from that of the caller: "):
        SpeakerEncoder.load(tmp_path / "own", frontend="speechbrain")
    for load in (
        lambda name: SpeakerEncoder(encoder.model, name),
        lambda name: SpeakerEncoder.load(tmp_path, frontend=name),
    ):
        with pytest.raises(InputError, match=r"unknown front-end preset 'kaldy' \(did you mean 'kaldi'\?\)"):
            load("kaldy")


@pytest.mark.parametrize("given", [3, ["kaldi"], {"preset": "kaldi"}])
def test_front_end_of_another_type(tmp_path, given):
    torch.save(SMALL_WESPEAKER, tmp_path / "a.pt")
    for load in (SpeakerEncoder.load, import_checkpoint):
        with pytest.raises(InputError, match=r"must be a FrontendSpec, .* got "):
            load(tmp_path / "a.pt", frontend=given)


def test_files_beside_a_speechbrain_network(tmp_path):
    write_folder(tmp_path, "speechbrain", "embedding_model.ckpt", "hyperparams.yaml", HYPERPARAMS)
    head = torch.randn(9, 12)
    torch.save({"weight": head}, tmp_path / "classifier.ckpt")
    torch.save({"glob_mean": torch.zeros(12)}, tmp_path / "mean_var_norm_emb.ckpt")
    (tmp_path / "label_encoder.txt").write_text("")
    found = import_checkpoint(tmp_path)
    assert torch.equal(found.network.head, head)
    assert [name for name, _ in found.unused] == ["label_encoder.txt", "mean_var_norm_emb.ckpt"]


def test_front_end_that_keys_cannot_tell(tmp_path):
    torch.save(foreign_state(small_model("speechbrain"), "speechbrain"), tmp_path / "embedding_model.ckpt")
    with pytest.raises(InputError, match=r"embedding_model\.ckpt: speechbrain and 3D-Speaker name their weights alike"):
        SpeakerEncoder.load(tmp_path)
    for family in ("speechbrain", "3dspeaker"):
        with pytest.warns(UserWarning, match=r"assumed dilations \[1, 2, 3, 4\], groups 1, as neither"):
            encoder = SpeakerEncoder.load(tmp_path, family=family)
        assert encoder.frontend == frontend(family, n_mels=20)
        assert encoder.model.config["dialect"] == family
    assert import_checkpoint(tmp_path, frontend=frontend("kaldi", n_mels=20)).frontend.n_mels == 20
    with pytest.raises(InputError, match="gives 80 values per frame, the network takes 20"):
        SpeakerEncoder.load(tmp_path, frontend=frontend("kaldi"))


def edited(text, *changes):
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


UNFIT = {
    r"the keys are wespeaker's, but .*config\.yaml is espnet's": ("wespeaker", "config.yaml", ESPNET),
    r"hyperparams\.yaml: norm_type: 'global' is not supported, only 'sentence' is; pass a front-end": (
        "speechbrain", "hyperparams.yaml", edited(HYPERPARAMS, ("norm_type: sentence", "norm_type: global"))
    ),
    r"hyperparams\.yaml: std_norm: True is not supported": (
        "speechbrain", "hyperparams.yaml", edited(HYPERPARAMS, ("    std_norm: False\n", ""))
    ),
    r"hyperparams\.yaml: compute_features is '!new:speechbrain\.lobes\.features\.MFCC', only Fbank": (
        "speechbrain", "hyperparams.yaml", edited(HYPERPARAMS, ("features.Fbank", "features.MFCC"))
    ),
    r"hyperparams\.yaml: the front-end .* gives 40 values per frame, the network takes 20": (
        "speechbrain", "hyperparams.yaml", edited(HYPERPARAMS, ("n_mels: 20", "n_mels: 40"))
    ),
    r"config\.yaml: front-end 's3prl' is not supported, only fbank is": (
        "wespeaker", "config.yaml", edited(WESPEAKER, ("dataset_args:", "dataset_args:\n  frontend: s3prl"))
    ),
    r"config\.yaml: fbank_args setting 'htk_mode' is not supported; pass a front-end": (
        "wespeaker", "config.yaml", edited(WESPEAKER, ("dither: 1.0", "htk_mode: 1"))
    ),
    r"config\.yaml: cmvn_args setting 'window' is not supported; pass a front-end": (
        "wespeaker", "config.yaml", edited(WESPEAKER, ("{norm_mean: True", "{window: 300"))
    ),
    r"hyperparams\.yaml: embedding_model: activation '!name:torch\.nn\.LeakyReLU' is not supported, only ReLU is$": (
        "speechbrain", "hyperparams.yaml",
        edited(HYPERPARAMS, ("    dilations:", "    activation: !name:torch.nn.LeakyReLU\n    dilations:"))
    ),
    r"hyperparams\.yaml: embedding_model setting 'norm' is not supported$": (
        "speechbrain", "hyperparams.yaml", edited(HYPERPARAMS, ("    dilations:", "    norm: x\n    dilations:"))
    ),
    r"hyperparams\.yaml: compute_features setting 'mel_scale' is not supported; pass a front-end": (
        "speechbrain", "hyperparams.yaml", edited(HYPERPARAMS, ("    hop_length: 8", "    mel_scale: htk"))
    ),
    r"hyperparams\.yaml: requires_grad: True is not supported": (
        "speechbrain", "hyperparams.yaml", edited(HYPERPARAMS, ("    hop_length: 8", "    requires_grad: True"))
    ),
    r"hyperparams\.yaml: mean_var_norm setting 'per_bin' is not supported; pass a front-end": (
        "speechbrain", "hyperparams.yaml", edited(HYPERPARAMS, ("    std_norm: False", "    per_bin: 1"))
    ),
    r"config\.yaml: embedding_model: activation 'torch\.nn\.Mish' is not supported, only ReLU is$": (
        "3dspeaker", "config.yaml", edited(SPEAKERLAB, ("{input_size", "{activation: torch.nn.Mish, input_size"))
    ),
    r"config\.yaml: FBank setting 'window_type' is not supported; pass a front-end": (
        "3dspeaker", "config.yaml", edited(SPEAKERLAB, ("mean_nor: True", "mean_nor: True, window_type: hamming"))
    ),
    r"config\.yaml: frontend_conf setting 'dither' is not supported; pass a front-end": (
        "espnet", "config.yaml", edited(ESPNET, ("preemp: true", "preemp: true, dither: .5"))
    ),
    r"config\.yaml: normalize: 'mvn' is not supported, only 'mn' is": (
        "espnet", "config.yaml", edited(ESPNET, ("normalize: mn", "normalize: mvn"))
    ),
    r"config\.yaml: norm_vars: True is not supported, only False is": (
        "espnet", "config.yaml", ESPNET + "normalize: utterance_mvn\nnormalize_conf: {norm_vars: true}\n"
    ),
    r"config\.yaml: front-end: sample_rate must be of type int": (
        "wespeaker", "config.yaml", edited(WESPEAKER, ("8000", "'8k'"))
    ),
    r"config\.yaml: front-end 'asteroid_frontend' is not supported, only melspec_torch": (
        "espnet", "config.yaml", edited(ESPNET, ("frontend: melspec_torch", "frontend: asteroid_frontend"))
    ),
    r"config\.yaml: normalize: 'global_mvn' is not supported": (
        "espnet", "config.yaml", ESPNET + "normalize: global_mvn\n"
    ),
    r"config\.yaml: damaged: while parsing": ("wespeaker", "config.yaml", "model: [1"),
    r"config\.yaml: damaged: 'NoneType' object": ("wespeaker", "config.yaml", "model: !!timestamp x"),
    r"config\.yaml: damaged: 'x'": ("wespeaker", "config.yaml", "model: !!bool x"),
}  # fmt: skip


@pytest.mark.parametrize("message", UNFIT)
def test_settings_that_do_not_fit(tmp_path, message):
    dialect, name, text = UNFIT[message]
    write_folder(tmp_path, dialect, "a.pt", name, text)
    with pytest.raises(InputError, match=message) as caught:
        SpeakerEncoder.load(tmp_path)
    assert "\n" not in str(caught.value)


LISTS = "l0: [1]\n" + "".join(f"l{i}: [{', '.join([f'<l{i - 1}>'] * 10)}]\n" for i in range(1, 9))
ALIASES = "l0: &l0 [1]\n" + "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 9))
MERGED = "m0: &m0 {a: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("before", "old", "new", "message"),
    [("", "dil: [1, 3, 2, 1, 1]", "dil: ['<dil>']", "embedding_model: dilations is no list of integers"),
     ("", "dil: [1, 3, 2, 1, 1]", "dil: <dil>", "embedding_model: dilations is no list of integers"),
     ("", "dil: [1, 3, 2, 1, 1]", "dil: &a [*a]", "embedding_model: dilations is no list of integers"),
     (LISTS, "!ref <dil>", "!ref <l8>", "embedding_model: dilations is no list of integers"),
     (ALIASES, "!ref <dil>", "*l8", "embedding_model: dilations is no list of integers"),
     (ALIASES, "norm_type: sentence", "norm_type: *l8", "norm_type: list is not supported"),
     (ALIASES, "hop_length: 8", "hop_length: *l8", "frame_shift_ms is no plain value"),
     ("", "!ref <n_mels>\n    hop", "0x" + "f" * 5000 + "\n    hop", "n_mels is no number below 2147483648"),
     ("", "dil: [1, 3,", "dil: [1, 0x" + "f" * 5000 + ",", "embedding_model: dilations is no list of integers"),
     ("", "norm_type: sentence", "norm_type: 0x" + "f" * 5000, "norm_type: int is not supported"),
     (MERGED, "seed: ", "seed_: ", "damaged: a mapping of more than 10000 keys")],
    ids=["list_of_itself", "itself", "alias_of_itself", "references", "aliases", "told", "field",
         "number", "number_in_list", "number_told", "merged"],
)  # fmt: skip
def test_settings_without_end(tmp_path, before, old, new, message):
    """Values that refer to themselves, or are a few lines here and 10^8 values written out."""
    write_folder(tmp_path, "speechbrain", "a.pt", "hyperparams.yaml", before + edited(HYPERPARAMS, (old, new)))
    with pytest.raises(InputError, match=rf"hyperparams\.yaml: {message}") as caught:
        import_checkpoint(tmp_path)
    assert len(str(caught.value)) < 500


def test_settings_of_espnet(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(edited(ESPNET, ("log: true, ", ""), (", normalize: mn", ""), ("preemp: true", "preemp: false"),
                           ("n_fft: 512", "n_fft: 400")) + "normalize: utterance_mvn\n")  # fmt: skip
    fields = read_settings(path).frontend
    assert fields["log"] == "none" and fields["preemphasis"] == 0 and fields["mean_norm"] is True
    assert (fields["n_fft"], fields["round_to_power_of_two"]) == (400, False)
    spec = frontend("espnet", **fields)
    assert spec.fft_size == 400 and spec.frame_shift == 80


def test_settings_are_read_as_text(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "hyperparams.yaml"
    evil = f"evil: !!python/object/apply:os.system ['touch {marker}']\nother: !apply:os.system ['touch {marker}']\n"
    path.write_text(HYPERPARAMS + evil)
    assert read_settings(path).config == {"dilations": [1, 3, 2, 1, 1], "groups": [1, 1, 1, 1, 1]}
    assert not marker.exists()
    for text in ("just text", "- 1", "steps: 3", "model: 3\ndataset_args: 1", ""):
        path.write_text(text)
        assert read_settings(path) is None
    path.write_text(edited(HYPERPARAMS, ("n_mels: 20", "n_mels: !ref <n_mels>")))  # leads nowhere
    assert "no plain value" in read_settings(path).frontend


def test_which_file_of_an_experiment(tmp_path):
    write_folder(tmp_path, "wespeaker", "models/model_1.pt", "config.yaml", WESPEAKER)
    for name in ("avg_model.pt", "model_2.pt"):
        torch.save(SMALL_WESPEAKER, tmp_path / "models" / name)
    found = import_checkpoint(tmp_path)
    assert found.file == tmp_path / "models/avg_model.pt" and found.settings == tmp_path / "config.yaml"
    found.file.unlink()
    with pytest.raises(InputError, match=r"the weights lie below: name .*/models/model_2\.pt or another$"):
        SpeakerEncoder.load(tmp_path)
    (tmp_path / "models/model_2.pt").unlink()
    assert import_checkpoint(tmp_path).file == tmp_path / "models/model_1.pt"
    (tmp_path / "models/CKPT-EPOCH-1-00").mkdir()
    (tmp_path / "models/model_1.pt").rename(tmp_path / "models/CKPT-EPOCH-1-00/embedding_model.ckpt")
    with pytest.raises(InputError, match=r"lie below: name .*/models/CKPT-EPOCH-1-00/embedding_model\.ckpt$"):
        SpeakerEncoder.load(tmp_path)


def test_which_file_of_a_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"not a model folder: holds no config\.yaml with model\.safetensors"):
        SpeakerEncoder.load(tmp_path)
    for name in ("a.pth", "b.pth"):
        torch.save(SMALL_WESPEAKER, tmp_path / name)
    with pytest.raises(InputError, match=r"holds several checkpoints \(a\.pth, b\.pth\); name the file"):
        SpeakerEncoder.load(tmp_path)
    SpeakerEncoder.load(tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"no such model; .*nothing is downloaded"):
        import_checkpoint(tmp_path / "none")


def test_family_is_for_other_toolkits(tmp_path):
    SpeakerEncoder(small_model("wespeaker"), frontend("wespeaker", n_mels=20)).save(tmp_path / "own")
    with pytest.raises(InputError, match="is a model of spkfast, family='espnet' was asked for"):
        SpeakerEncoder.load(tmp_path / "own", family="espnet")
    write_folder(tmp_path / "sb", "speechbrain", "embedding_model.ckpt", "hyperparams.yaml", HYPERPARAMS)
    with pytest.raises(InputError, match=r"hyperparams\.yaml: is speechbrain's, family='3dspeaker' was asked for"):
        SpeakerEncoder.load(tmp_path / "sb", family="3dspeaker")
