"""Repositories for Triton Inference Server: it can read the configuration, and the model fits what it makes of it."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import shlex
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spkfast import InputError, SpeakerEncoder
from spkfast.export import onnx as exporter
from spkfast.export import triton_server
from spkfast.export.tensorrt_plan import Machine, Profile, make_sidecar, plan_build, read_onnx, sidecar_path
from spkfast.export.triton_server import TritonConfig, config_text, perf_analyzer_command, triton_repository
from spkfast.nn import set_precision
from tests.export.conftest import relative_errors, voice
from tests.fixtures import tensorrt_graphs

pytest.importorskip("onnx", reason="onnx is not installed")
needs_onnxruntime = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnxruntime")),
    reason="onnxscript or onnxruntime is not installed",
)
METADATA = {"spkfast_version": "1", "sample_rate": "16000"}


@pytest.fixture(scope="session")
def schema() -> Any:
    """Triton's own message types, from the one file of tritonclient that needs protobuf alone."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("tritonclient is not installed")
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parsed(schema):
    """Reads a text as the server does; an unknown field or word is an error."""
    from google.protobuf import text_format

    return lambda text: text_format.Parse(text, schema.ModelConfig())


def word(message: Any, field: str) -> str:
    """Name of the value of an enumeration."""
    return message.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number[getattr(message, field)].name


def test_ragged_configuration_field_by_field(parsed) -> None:
    text = config_text(TritonConfig("voice", 192, warmup=((1, 48000), (8, 48000)), metadata=METADATA))
    config = parsed(text)
    assert (config.name, config.backend, config.platform, config.max_batch_size) == ("voice", "onnxruntime", "", 64)
    (waveform,), (output,) = config.input, config.output
    assert (waveform.name, word(waveform, "data_type"), list(waveform.dims)) == ("waveform", "TYPE_FP32", [-1])
    assert waveform.allow_ragged_batch and not waveform.HasField("reshape")
    assert (output.name, word(output, "data_type"), list(output.dims)) == ("embedding", "TYPE_FP32", [192])
    assert [
        (word(item, "kind"), list(item.target_name), word(item, "data_type"), list(item.source_input))
        for item in config.batch_input
    ] == [
        ("BATCH_ITEM_SHAPE_FLATTEN", ["lengths"], "TYPE_INT32", ["waveform"]),
        ("BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", ["longest"], "TYPE_FP32", ["waveform"]),
    ]
    assert config.version_policy.latest.num_versions == 1
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16, 32]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    (group,) = config.instance_group
    assert (group.count, word(group, "kind"), list(group.gpus), list(group.profile)) == (1, "KIND_GPU", [], [])
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert parameters == METADATA | {"cudnn_conv_algo_search": "1"}
    assert [(item.batch_size, item.count) for item in config.model_warmup] == [(1, 0), (8, 0)]
    (warm,) = config.model_warmup[1].inputs.items()
    assert warm[0] == "waveform" and warm[1].WhichOneof("input_data_type") == "zero_data"
    assert (word(warm[1], "data_type"), list(warm[1].dims)) == ("TYPE_FP32", [48000])
    assert len({item.name for item in config.model_warmup}) == 2
    assert not config.cc_model_filenames


@pytest.mark.parametrize("layout", exporter.LAYOUTS)
@pytest.mark.parametrize("where", ["onnxruntime gpu", "onnxruntime cpu", "tensorrt gpu"])
def test_every_option_reads_as_what_it_means(parsed, layout, where) -> None:
    backend, device = where.split()
    config = TritonConfig(
        "a.b-c_1", 3, backend, device, layout, 16, (4, 16, 32), 0, instances=2, gpus=(0, 3) if device == "gpu" else (),
        threads=5, warmup=((4, 400),), profiles=(0, 2), engines={"9.0": "sm9.0.plan", "8.6": "sm8.6.plan"},
    )  # fmt: skip
    read = parsed(config_text(config))
    assert [item.name for item in read.input] == ["waveform", "lengths"][: 1 + (layout == "padded")]
    assert read.input[0].allow_ragged_batch == bool(read.batch_input) == (layout == "ragged")
    if layout == "padded":
        lengths = read.input[1]
        assert (word(lengths, "data_type"), list(lengths.dims)) == ("TYPE_INT64", [1])
        assert lengths.HasField("reshape") and not lengths.reshape.shape
    assert set(read.model_warmup[0].inputs) == {item.name for item in read.input}
    # The server refuses a preferred size above the most.
    assert (read.max_batch_size, list(read.dynamic_batching.preferred_batch_size)) == (16, [4, 16])
    assert read.HasField("dynamic_batching") and read.dynamic_batching.max_queue_delay_microseconds == 0
    (group,) = read.instance_group
    assert (group.count, list(group.gpus), list(group.profile)) == (2, list(config.gpus), ["0", "2"])
    assert word(group, "kind") == f"KIND_{device.upper()}"
    assert dict(read.cc_model_filenames) == config.engines
    assert read.HasField("optimization") == (where == "onnxruntime gpu")
    parameters = {key: value.string_value for key, value in read.parameters.items()}
    only = {"onnxruntime gpu": {"cudnn_conv_algo_search": "1"}, "onnxruntime cpu": {"intra_op_thread_count": "5"}}
    assert parameters == only.get(where, {})


def test_no_string_breaks_the_syntax(parsed) -> None:
    nasty = {"quote": '{"a": "b\\"}', "lines": "a\nb\r\t\0", "other": "é 声 😀 \x7f", "": "} name: 'x' #", '"': "'"}
    read = parsed(config_text(TritonConfig("m", 1, metadata=nasty)))
    found = {key: value.string_value for key, value in read.parameters.items()}
    assert found == nasty | {"cudnn_conv_algo_search": "1"} and read.name == "m"


class Server:
    """What Triton's onnxruntime backend makes of requests, by its sources; the kinds as model_config.proto has them."""

    def __init__(self, config: Any, path: Path) -> None:
        self.config = config
        self.session = exporter.session(path)
        names = [item.name for item in config.input] + [item.target_name[0] for item in config.batch_input]
        assert sorted(names) == sorted(value.name for value in self.session.get_inputs())
        shapes = {value.name: value.shape for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        types = {value.name: value.type for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        kinds = {"TYPE_FP32": "tensor(float)", "TYPE_INT32": "tensor(int32)", "TYPE_INT64": "tensor(int64)"}
        for item in (*config.input, *config.output):
            dims = item.reshape.shape if item.HasField("reshape") else item.dims
            dims = [] if getattr(item, "allow_ragged_batch", False) else list(dims)  # ragged: of all requests, [-1]
            shape = [-1 if isinstance(size, str) else size for size in shapes[item.name]]
            assert shape == [-1, *dims] and types[item.name] == kinds[word(item, "data_type")]
        for item in config.batch_input:
            assert types[item.target_name[0]] == kinds[word(item, "data_type")]
            assert len(shapes[item.target_name[0]]) == 1

    def __call__(self, requests: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        """Embeddings of each request (B, E), out of one batch of all."""
        rows = [len(request["waveform"]) for request in requests]
        assert sum(rows) <= self.config.max_batch_size
        feed = {}
        for item in self.config.input:
            parts = [request[item.name] for request in requests]
            if item.allow_ragged_batch:
                feed[item.name] = np.concatenate([part.ravel() for part in parts])
            else:
                assert len({part.shape[1:] for part in parts}) == 1, "the batcher joins equal shapes alone"
                feed[item.name] = np.concatenate(parts)
                if item.HasField("reshape"):
                    feed[item.name] = feed[item.name].reshape(sum(rows), *item.reshape.shape)
        for item in self.config.batch_input:
            source = [request[item.source_input[0]] for request in requests]
            dtype = {"TYPE_FP32": np.float32, "TYPE_INT32": np.int32}[word(item, "data_type")]
            if word(item, "kind") == "BATCH_ITEM_SHAPE_FLATTEN":
                made = np.array([size for part in source for _ in part for size in part.shape[1:]], dtype)
            else:
                assert word(item, "kind") == "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE"
                made = np.full(max(part.size for part in source), np.nan, dtype)  # its values are never set
            feed[item.target_name[0]] = made
        (output,) = self.session.run([item.name for item in self.config.output], feed)
        # The answers take the rows in turn, however many the graph gave.
        assert output.shape == (sum(rows), *self.config.output[0].dims)
        return np.split(output, np.cumsum(rows)[:-1])


@pytest.fixture(scope="module")
def made(encoders, tmp_path_factory):
    """A repository of each layout, written once."""
    found = {}

    def get(layout: str) -> Any:
        if layout not in found:
            folder = tmp_path_factory.mktemp("repository")
            found[layout] = triton_repository(
                encoders("wespeaker"), folder, device="cpu", layout=layout, warmup_seconds=(1.0,)
            )
        return found[layout]

    return get


def requests_of(lengths: list[int]) -> list[dict[str, np.ndarray]]:
    waveforms = [voice(seed, length)[None] for seed, length in enumerate(lengths)]
    return [{"waveform": waveform, "lengths": np.array([[waveform.shape[1]]])} for waveform in waveforms]


def errors(encoder: Any, have: list[np.ndarray], requests: list[dict[str, np.ndarray]]) -> float:
    want = torch.stack([encoder.embed(row) for request in requests for row in request["waveform"]])
    return float(relative_errors(torch.from_numpy(np.concatenate(have)), want).max())


BATCHES = {
    "lengths far apart": [400, 160000, 9000, 401, 48000, 719, 960000],
    "shortest alone": [400],
    "one": [31234],
    "64": [int(n) for n in np.random.default_rng(0).integers(400, 32000, 64)],
}


@needs_onnxruntime
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_ragged_batch_gives_each_request_its_own_embedding(encoders, parsed, made, lengths) -> None:
    report = made("ragged")
    server = Server(parsed((report.folder / "config.pbtxt").read_text()), report.folder / "1" / "model.onnx")
    requests = requests_of(lengths)
    assert errors(encoders("wespeaker"), server(requests), requests) < 1e-4


@needs_onnxruntime
def test_requests_of_several_rows_share_a_ragged_batch(encoders, parsed, made) -> None:
    report = made("ragged")
    server = Server(parsed((report.folder / "config.pbtxt").read_text()), report.folder / "1" / "model.onnx")
    first, last = requests_of([5000, 20000])
    requests = [first, {"waveform": np.stack([voice(seed, 7001) for seed in (7, 8, 9)])}, last]
    have = server(requests)
    assert [len(part) for part in have] == [1, 3, 1]
    assert errors(encoders("wespeaker"), have, requests) < 1e-4


@needs_onnxruntime
def test_too_short_a_request_gets_nan_and_the_others_their_embeddings(encoders, parsed, made) -> None:
    report = made("ragged")
    server = Server(parsed((report.folder / "config.pbtxt").read_text()), report.folder / "1" / "model.onnx")
    requests = requests_of([8000, 399, 16000])
    have = server(requests)
    assert np.isnan(have[1]).all()
    assert errors(encoders("wespeaker"), [have[0], have[2]], [requests[0], requests[2]]) < 1e-4


@needs_onnxruntime
@pytest.mark.parametrize("layout", ["padded", "equal"])
def test_requests_of_one_shape_give_their_own_embeddings(encoders, parsed, made, layout) -> None:
    report = made(layout)
    server = Server(parsed((report.folder / "config.pbtxt").read_text()), report.folder / "1" / "model.onnx")
    requests = requests_of([12345] * 3)
    assert errors(encoders("wespeaker"), server(requests), requests) < 1e-4
    if layout == "padded":  # a client pads its own batch
        rows = [voice(11, 12345), voice(12, 700)]
        padded = np.stack([np.pad(row, (0, 12345 - len(row)), constant_values=np.nan) for row in rows])
        have = server([{"waveform": padded, "lengths": np.array([[12345], [700]])}])
        want = [{"waveform": row[None]} for row in rows]
        assert errors(encoders("wespeaker"), have, want) < 1e-4


@needs_onnxruntime
def test_report_and_files_say_what_was_written(encoders, parsed, made) -> None:
    report = made("ragged")
    assert report.version == 1 and report.files == (report.folder / "config.pbtxt", report.folder / "1" / "model.onnx")
    assert sorted(report.folder.parent.rglob("*")) == sorted([report.folder, report.folder / "1", *report.files])
    assert report.max_error < 1e-4 and report.min_cosine > 1 - 1e-6
    parameters = parsed(report.files[0].read_text()).parameters
    encoder = encoders("wespeaker")
    assert parameters["model_hash"].string_value == encoder.fingerprint
    assert json.loads(parameters["frontend"].string_value) == encoder.frontend.to_dict()
    assert report.config.warmup == tuple((batch, 16000) for batch in (1, 8, 16, 32))


def engine(
    encoder: Any, path: Path, *, capability: str = "9.0", batches: tuple[int, int, int] = (1, 8, 64), **metadata: str
) -> Path:
    """A file that says it is an engine, and what is kept beside one."""
    hashes = {"model_hash": encoder.fingerprint, "spec_hash": encoder.frontend.hash}
    lengths = metadata.pop("layout", "padded") == "padded"
    graph = tensorrt_graphs.write(path.with_suffix(".onnx"), lengths=lengths, **(hashes | metadata))
    info, _ = read_onnx(graph)
    plan = plan_build(info, profiles=[Profile((1, 1, 1), (0, 3, 20)), Profile(batches, (0, 3, 20))])
    machine = Machine("NVIDIA H100", capability, "10.16.1", "13.0", "580.1")
    path.write_bytes(capability.encode())
    facts = make_sidecar(info, plan, machine, capability.encode(), list(info.inputs), list(info.outputs))
    sidecar_path(path).write_text(json.dumps(facts))
    return path


def test_an_engine_with_the_profiles_that_triton_can_load(encoders, parsed, tmp_path) -> None:
    encoder = encoders("wespeaker")
    plan = engine(encoder, tmp_path / "any.plan")
    report = triton_repository(encoder, tmp_path / "repository", name="voice", backend="tensorrt", engine=plan)
    assert [str(path.relative_to(report.folder)) for path in report.files] == [
        "config.pbtxt", "1/model.plan", "1/model.plan.json",
    ]  # fmt: skip
    assert report.files[1].read_bytes() == b"9.0" and report.max_error is None
    config = parsed(report.files[0].read_text())
    assert (config.backend, config.name, list(config.output[0].dims)) == ("tensorrt", "voice", [tensorrt_graphs.SIZE])
    # The profile of one row ends below the largest batch.
    assert list(config.instance_group[0].profile) == ["1"] and not config.cc_model_filenames
    assert [item.name for item in config.input] == ["waveform", "lengths"]
    assert config.parameters["model_hash"].string_value == encoder.fingerprint


def test_engines_of_several_gpus_are_told_apart_by_compute_capability(encoders, parsed, tmp_path) -> None:
    encoder = encoders("wespeaker")
    plans = [engine(encoder, tmp_path / f"{c}.plan", capability=c, layout="equal") for c in ("9.0", "8.6")]
    report = triton_repository(encoder, tmp_path / "repository", backend="tensorrt", engine=plans)
    config = parsed(report.files[0].read_text())
    assert dict(config.cc_model_filenames) == {"9.0": "sm9.0.plan", "8.6": "sm8.6.plan"}
    for capability, file in config.cc_model_filenames.items():
        assert (report.folder / "1" / file).read_text() == capability
    assert report.config.layout == "equal"
    with pytest.raises(InputError, match=r"the second engine for compute capability 9\.0"):
        triton_repository(encoder, tmp_path / "other", backend="tensorrt", engine=[plans[0], plans[0]])


def test_engines_that_do_not_fit_are_refused(encoders, tmp_path) -> None:
    encoder = encoders("wespeaker")

    def refused(plan: Path, words: str, **options: Any) -> None:
        with pytest.raises(InputError, match=words) as caught:
            triton_repository(encoder, tmp_path / "repository", backend="tensorrt", engine=plan, **options)
        assert "\n" not in str(caught.value) and not (tmp_path / "repository").exists()

    good = engine(encoder, tmp_path / "good.plan")
    refused(tmp_path / "none.plan", "no such file")
    refused(good, r"no profile holds all batches from 1 to max_batch_size=65", max_batch_size=65)
    refused(engine(encoder, tmp_path / "pairs.plan", batches=(2, 8, 64)), r"Profile\(\(1, 32, 64\), \.\.\.\)")
    refused(good, "its layout is 'padded', got layout='ragged'", layout="ragged")
    refused(good, "precision is fp32, the model's is fp16", precision="fp16")
    refused(good, "warm-up of 336000 samples lies in no profile", warmup_seconds=(21.0,))
    refused(engine(encoder, tmp_path / "other.plan", model_hash="abc"), "model_hash is abc")
    good.write_bytes(b"another")
    refused(good, r"not the engine that good\.plan\.json describes")


def test_an_engine_is_that_of_the_model_at_any_precision(encoders, tmp_path) -> None:
    encoder = encoders("wespeaker")
    plan = engine(encoder, tmp_path / "any.plan")
    net = copy.deepcopy(encoder.model)
    set_precision(net, "bf16")
    half = SpeakerEncoder(net, encoder.frontend)
    assert half.fingerprint != encoder.fingerprint
    options = {"backend": "tensorrt", "engine": plan}
    assert triton_repository(half, tmp_path / "repository", **options).version == 1
    # An exported graph in place of the model.
    exported = copy.copy(encoder)
    exported.model = types.SimpleNamespace(takes_waveforms=True, fingerprint=encoder.fingerprint)
    assert triton_repository(exported, tmp_path / "repository", **options).version == 2


@pytest.fixture
def write(encoders, tmp_path):
    """Writes the model again, without an export."""
    plan = engine(encoders("wespeaker"), tmp_path / "any.plan")
    options = {"backend": "tensorrt", "engine": plan, "name": "voice"}
    return lambda **more: triton_repository(encoders("wespeaker"), tmp_path / "repository", **(options | more))


def test_versions_follow_each_other_until_they_are_replaced(write) -> None:
    folder = write().folder
    (folder / "7").mkdir()
    report = write(max_batch_size=32)
    assert report.version == 8 and "max_batch_size: 32\n" in (folder / "config.pbtxt").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "7", "8", "config.pbtxt"]
    assert (folder / "1" / "model.plan").read_bytes() == b"9.0"
    (folder / "notes.txt").write_text("mine")
    assert write().version == 9 and (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match=r"would take out notes\.txt"):
        write(replace=True)
    (folder / "notes.txt").unlink()
    assert write(replace=True).version == 1
    assert sorted(path.name for path in folder.iterdir()) == ["1", "config.pbtxt"]
    assert [path.name for path in folder.parent.iterdir()] == ["voice"]


@pytest.mark.parametrize("kind", ["empty", "another's", "a file", "a link"])
def test_what_is_no_such_model_is_left_alone(write, tmp_path, kind) -> None:
    folder = tmp_path / "repository" / "voice"
    if kind == "a link":
        write()
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "a file":
        folder.parent.mkdir()
        folder.write_text("x")
    else:
        folder.mkdir(parents=True)
        if kind == "another's":
            (folder / "config.pbtxt").write_text('name: "voice"\n')
    before = sorted(tmp_path.rglob("*"))
    for replace in (False, True):
        with pytest.raises(InputError, match="is there, and no model of triton_repository"):
            write(replace=replace)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("step", ["copyfile", "rename"])
@pytest.mark.parametrize("replace", [False, True])
def test_a_failure_leaves_all_as_it_was(write, tmp_path, monkeypatch, step, replace) -> None:
    write()
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("disk full")

    rename = Path.rename
    if step == "copyfile":
        monkeypatch.setattr(triton_server.shutil, step, fail)
    else:  # the new folder cannot take the place of the old one, which was moved
        monkeypatch.setattr(Path, step, lambda self, to: fail() if ".new-" in self.name else rename(self, to))
    with pytest.raises(InputError, match=r"cannot be written: .*disk full"):
        write(replace=replace, max_batch_size=16)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    assert [path.name for path in (tmp_path / "repository").iterdir()] == ["voice"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "../voice"}, "name must be"),
        ({"name": ""}, "name must be"),
        ({"backend": "pytorch"}, "unknown backend 'pytorch'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"layout": "flat"}, "unknown layout 'flat'"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"max_batch_size": 0}, "max_batch_size must be an integer, 1 at least, got 0"),
        ({"max_batch_size": True}, "max_batch_size must be an integer"),
        ({"max_queue_delay_us": -1}, "max_queue_delay_us must be an integer, 0 at least"),
        ({"preferred_batch_sizes": (0,)}, "a preferred batch size must be"),
        ({"instances": 0}, "instances must be"),
        ({"threads": 1.5}, "threads must be"),
        ({"gpus": (-1,)}, "a GPU must be"),
        ({"gpus": (0,), "device": "cpu"}, "are for no instance on a CPU"),
        ({"backend": "tensorrt", "device": "cpu"}, "TensorRT has no instance on a CPU"),
        ({"backend": "tensorrt"}, "engine must be given for backend 'tensorrt'"),
        ({"engine": "model.plan"}, "engine must be given for backend 'tensorrt' and no other"),
        ({"warmup_seconds": (0.01,)}, r"at least 0\.025, one frame, and finite, got 0\.01"),
        ({"warmup_seconds": (float("nan"),)}, "and finite, got nan"),
        ({"warmup_seconds": (3.0, float("inf"))}, "and finite, got inf"),
        ({"precision": "bf16", "device": "cpu"}, "no such convolutions on a CPU"),
        ({"precision": "fp16", "calibration": []}, "calibration is for precision 'int8'"),
        ({"backend": "tensorrt", "engine": []}, "engine must be a file or some"),
        ({"backend": "tensorrt", "engine": [], "calibration": []}, "calibrate when it is built"),
    ],
    ids=str,
)
def test_wrong_arguments_are_told_in_one_line_and_nothing_is_written(encoders, tmp_path, options, words) -> None:
    with pytest.raises(InputError, match=words) as caught:
        triton_repository(encoders("wespeaker"), tmp_path / "repository", **options)
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())


def test_perf_analyzer_command() -> None:
    config = TritonConfig("voice", 192, metadata=METADATA)
    assert shlex.split(perf_analyzer_command(config, seconds=1.5, concurrency=(1, 16))) == [
        "perf_analyzer", "-m", "voice", "-i", "grpc", "-u", "localhost:8001", "--shape", "waveform:24000",
        "--input-data", "zero", "--percentile=95", "--concurrency-range", "1:16:2",
    ]  # fmt: skip
    padded = perf_analyzer_command(dataclasses.replace(config, layout="padded"))
    assert "--shape waveform:48000 --shape lengths:1 " in padded
