"""TensorRT builds and the runner, against a double of the module that insists on the order of calls and can fail."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from spkfast.errors import InputError
from spkfast.export import tensorrt_graph
from spkfast.export.runners import GraphNetwork
from spkfast.export.tensorrt import Profile, TensorRTGraph, build_tensorrt, trtexec_command
from spkfast.export.tensorrt_graph import Gpu
from spkfast.export.tensorrt_plan import read_sidecar, sidecar_path
from tests.fixtures import tensorrt_graphs
from tests.fixtures.tensorrt_double import Double

PROFILES = [Profile((1, 1, 1), (0, 0.2, 0.5)), Profile((2, 3, 6), (0, 0.2, 0.5))]


class StandIn(Gpu):
    """A CPU whose graphs launch again what the double launched last."""

    trt: Any = None
    gpu = "NVIDIA Double"

    def __init__(self, device: Any) -> None:
        self.device = torch.device("cpu")
        self.captures = self.finished = 0
        self.busy = False

    def facts(self) -> dict[str, str]:
        return {"gpu": self.gpu, "capability": "9.0", "cuda": "13.0", "driver": "580.1"}

    def current(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def turn(self, tensors: Iterable[Tensor]) -> Iterator[int]:
        assert not self.busy, "two calls at once share memory"
        self.busy = True
        try:
            yield 7
        finally:
            self.busy = False

    def handed_over(self, output: Tensor) -> Tensor:
        return output

    def capture(self, launch: Any) -> Any:
        self.captures += 1
        self.trt.capturing = True
        try:
            launch()
        finally:
            self.trt.capturing = False
        return type("Graph", (), {"replay": staticmethod(self.trt.launches[-1])})

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(params=[10, 11])
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Double:
    double = Double(request.param)
    monkeypatch.setitem(sys.modules, "tensorrt", double)
    monkeypatch.setattr(StandIn, "trt", double)
    for module in ("tensorrt", "tensorrt_graph"):
        monkeypatch.setattr(f"spkfast.export.{module}.Gpu", StandIn)
    return double


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tensorrt_graphs.write(tmp_path / "model.onnx")


def build(model: Path, **settings: Any) -> Any:
    return build_tensorrt(model, model.with_suffix(".plan"), **{"profiles": PROFILES, **settings})


def batch(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Noise with NaN in its padding."""
    rows = torch.randn(len(lengths), max(lengths), generator=torch.Generator().manual_seed(seed))
    counts = torch.tensor(lengths)
    rows[torch.arange(max(lengths)) >= counts[:, None]] = torch.nan
    return {"waveform": rows, "lengths": counts}


def wanted(inputs: dict[str, Tensor]) -> np.ndarray:
    pairs = zip(inputs["waveform"], inputs["lengths"].tolist(), strict=True)
    return tensorrt_graphs.expected([row[:length].numpy() for row, length in pairs])


def error(got: Tensor, inputs: dict[str, Tensor]) -> float:
    want = wanted(inputs)
    return float(np.abs(got.numpy() - want).max() / np.abs(want).max())


ROUNDING = 8000 * 2**-24  # of a sum of so many float32 values, at worst


def test_build_writes_an_engine_with_its_facts(trt: Double, model: Path) -> None:
    report = build(model, exact=True, workspace_bytes=2**30, optimization_level=4)
    assert trt.config.flags == {trt.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE}  # and TF32 no more
    assert trt.config.builder_optimization_level == 4
    assert ("set_memory_pool_limit", trt.MemoryPoolType.WORKSPACE, 2**30) in trt.calls
    assert ("create_network", 2 if trt.major == 10 else 0) in trt.calls
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.onnx", "model.plan", "model.plan.json"]
    facts = read_sidecar(report.engine_path)
    assert [tensor.name for tensor in facts["inputs"]] == ["waveform", "lengths"]
    assert facts["machine"].tensorrt == trt.__version__ and facts["engine_sha256"] == report.facts["engine_sha256"]
    assert report.engine_bytes == model.with_suffix(".plan").stat().st_size
    # The last one is ragged.
    assert [len(parity.lengths) for parity in report.parity] == [1, 1, 1, 2, 2, 6, 4, 4]
    assert all(parity.relative_error == 0 and parity.cosine > 0.999999 for parity in report.parity)


def test_tf32_of_features_stays_on(trt: Double, tmp_path: Path) -> None:
    features = tensorrt_graphs.write(tmp_path / "model.onnx", "features", lengths=False)
    report = build(features, tf32=True, hardware_compatibility="ampere_plus")
    assert trt.config.flags == {trt.BuilderFlag.TF32} and report.facts["tf32"]
    graph = TensorRTGraph(report.engine_path)
    assert not graph.full_float32 and graph.max_samples is None
    assert GraphNetwork(graph, "0" * 64).fingerprint == "0" * 16
    assert trt.config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("builder", "finds no GPU or driver"),
        ("parse", "STFT 'node_7': no importer registered"),
        ("profile", "refuses profile 0"),
        ("add_optimization_profile", "refuses profile 0"),
        ("create_timing_cache", "no timing cache: delete it"),
        ("set_timing_cache", "timings of another machine: delete it"),
        ("build", "builds no engine"),
        ("deserialize", "does not load the engine"),
        ("shape_tensor", "lengths decides on shapes"),
        ("context", "makes no context"),
        ("set_profile", "no such profile"),
        ("set_input_shape", "does not take"),
        ("infer_shapes", "shapes of lengths remain unknown"),
        ("infer_error", "shapes do not go together"),
        ("set_tensor_address", "has no place"),
        ("execute", "TensorRT did not run it"),
        ("wrong", "other embeddings than onnxruntime"),
    ],
)
def test_a_failure_is_told_and_leaves_nothing(trt: Double, model: Path, fault: str, complaint: str) -> None:
    trt.fail = {fault}
    with pytest.raises(InputError) as caught:
        build(model, timing_cache=model.parent / "cache")
    message = str(caught.value)
    assert complaint in message and "\n" not in message
    # What the logger was told, but where the error says the same or nothing was said.
    assert fault in ("parse", "shape_tensor", "wrong") or f"[{fault}] went wrong" in message
    left = {path.name for path in model.parent.iterdir()} - {"cache"}
    assert left == {"model.onnx"}


def test_a_failed_build_keeps_the_engine_before_it(trt: Double, model: Path) -> None:
    build(model)
    before = {path: path.read_bytes() for path in model.parent.iterdir()}
    trt.fail = {"wrong"}
    with pytest.raises(InputError, match="other embeddings"):
        build(model)
    assert {path: path.read_bytes() for path in model.parent.iterdir()} == before
    report = build(model, validate=False)
    assert report.parity == ()


@pytest.mark.parametrize("place", ["folder", "folder_of_facts", "parent", "timing_cache"])
def test_places_are_checked_before_the_build(trt: Double, model: Path, place: str) -> None:
    target, cache = model.with_suffix(".plan"), model.parent / "cache"
    complaint = f"engine_path: a file is expected, {target}.* is a folder"
    if place == "folder":
        target.mkdir()
    elif place == "folder_of_facts":
        sidecar_path(target).mkdir()
    elif place == "parent":
        target = model.parent / "missing" / "model.plan"
        complaint = f"engine_path: a file in an existing folder is expected, got {target}"
    else:
        cache.touch()
        complaint = "timing_cache: a folder is expected, .*cache is a file"
    before = sorted(model.parent.iterdir())
    with pytest.raises(InputError, match=complaint):
        build_tensorrt(model, target, profiles=PROFILES, timing_cache=cache)
    assert trt.calls == [] and sorted(model.parent.iterdir()) == before


def test_a_folder_that_takes_no_files_is_told_before_the_build(
    trt: Double, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(self: Path) -> None:
        raise PermissionError(13, "not allowed")

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(InputError, match=r"engine_path: .*model.plan cannot be written \(not allowed\): choose"):
        build(model)
    assert trt.calls == [] and list(model.parent.iterdir()) == [model]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["model.plan", "model.plan.json", "timing"])
def test_what_cannot_be_moved_leaves_all_as_it_was(
    trt: Double, model: Path, monkeypatch: pytest.MonkeyPatch, name: str, again: bool
) -> None:
    cache = model.parent / "cache"
    if again:
        build(model, timing_cache=cache, validate=False)
    files = [model, model.with_suffix(".plan"), sidecar_path(model.with_suffix(".plan"))]
    before = {file: file.read_bytes() for file in files if file.exists()}
    replace, seen = os.replace, []

    def moved(source: Path, place: Path) -> None:
        seen.append(source.name)
        if place.name.endswith(name):
            raise PermissionError(13, "not allowed")
        replace(source, place)

    monkeypatch.setattr(os, "replace", moved)
    with pytest.raises(InputError, match=r"cannot be written \(not allowed\): choose"):
        build(model, timing_cache=cache, validate=False, optimization_level=4)
    assert all(f".{os.getpid()}.partial" in source for source in seen)
    assert {file: file.read_bytes() for file in model.parent.iterdir() if file.is_file()} == before
    assert not list(cache.glob("*.partial"))


def test_corners_are_compared_unpadded(trt: Double, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buckets, choose = set(), tensorrt_graph.choose_bucket

    def chosen(*args: Any) -> Any:
        buckets.add(choose(*args))
        return choose(*args)

    monkeypatch.setattr(tensorrt_graph, "choose_bucket", chosen)
    build(model)
    assert {bucket[1:] for bucket in buckets if bucket} == {
        (1, 400), (1, 3200), (1, 8000), (2, 400), (2, 8000), (6, 400), (4, 3200)
    }  # fmt: skip


def test_graphs_are_compared_too(trt: Double, model: Path) -> None:
    report = build(model, profiles=[Profile((1, 1, 1), (0, 1, 2))])
    # Three sizes, each launched directly and then for a graph.
    assert len(report.parity) == 3 and len(trt.launches) == 6


def test_nan_is_no_parity(trt: Double, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = TensorRTGraph.__call__
    monkeypatch.setattr(TensorRTGraph, "__call__", lambda self, inputs: call(self, inputs) * torch.nan)
    with pytest.raises(InputError, match="relative error inf"):
        build(model)


def test_timings_are_kept_for_the_next_build(trt: Double, model: Path) -> None:
    folder = model.parent / "cache"
    for expected in (b"+", b"++"):
        report = build(model, timing_cache=folder, validate=False)
        assert report.timing_cache is not None and report.timing_cache.read_bytes() == expected
    name = f"NVIDIA_Double-sm9.0-trt{trt.__version__}-cuda13.0.timing"
    assert [path.name for path in folder.iterdir()] == [name]


def test_version_compatible_engines_are_let_run_their_code(trt: Double, model: Path) -> None:
    build(model, version_compatible=True)
    trt.__version__ = f"{trt.major}.99.0"
    assert TensorRTGraph(model.with_suffix(".plan"))(batch(500)).shape == (1, 3)


def test_the_reference_must_be_of_the_same_model(trt: Double, model: Path) -> None:
    other = tensorrt_graphs.write(model.with_name("other.onnx"), model_hash="def")
    with pytest.raises(InputError, match=r"model_hash 'def', that of .* is 'abc'"):
        build(model, reference=other)
    for inputs, lengths, names in (("waveform", False, "waveform"), ("features", True, "feats, lengths")):
        tensorrt_graphs.write(other, inputs, lengths=lengths)
        with pytest.raises(InputError, match=f"inputs '{names}', that of .* is 'waveform, lengths'"):
            build(model, reference=other)
    assert trt.calls == []
    same = tensorrt_graphs.write(model.with_name("same.onnx"), precision="fp32")
    assert build(model, reference=same).parity


def test_what_onnxruntime_cannot_run_needs_a_reference(trt: Double, model: Path) -> None:
    graph = onnx.load(model)
    graph.graph.node[0].domain = "nowhere"
    onnx.save(graph, model)
    with pytest.raises(InputError, match=r"onnxruntime does not run it .* give the fp32 export as reference"):
        build(model)
    assert trt.calls == []


def test_trtexec_does_the_same_build(trt: Double, model: Path) -> None:
    settings: dict[str, Any] = {
        "exact": True,
        "workspace_bytes": 123456,
        "optimization_level": 5,
        "version_compatible": True,
        "hardware_compatibility": "same_compute_capability",
    }
    engine = model.with_suffix(".plan")
    command = trtexec_command(model, engine, PROFILES, timing_cache_path="timings", **settings)
    build(model, validate=False, **settings)
    options = [part.removeprefix("--").split("=", 1) for part in command[1:]]
    alone = {option[0] for option in options if len(option) == 1}
    values = {option[0]: option[1] for option in options if len(option) == 2}
    assert command[0] == "trtexec" and (values["onnx"], values["saveEngine"]) == (str(model), str(engine))
    flags = {"versionCompatible": "VERSION_COMPATIBLE", "distributiveIndependence": "DISTRIBUTIVE_INDEPENDENCE"}
    assert {trt.BuilderFlag[flags[name]] for name in flags.keys() & alone} == trt.config.flags
    assert alone - flags.keys() == {"skipInference", "stronglyTyped", "noTF32"}
    assert values["memPoolSize"] == "workspace:123456B" and ("set_memory_pool_limit", 0, 123456) in trt.calls
    assert int(values["builderOptimizationLevel"]) == trt.config.builder_optimization_level == 5
    assert values["hardwareCompatibilityLevel"] == "sameComputeCapability"
    assert trt.config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    assert values["timingCacheFile"] == "timings"
    # Options after --profile=N are those of that profile.
    profiles: list[dict[str, Any]] = []
    for name, value in (option for option in options if len(option) == 2):
        if name == "profile":
            assert int(value) == len(profiles)
            profiles.append({})
        elif name.endswith("Shapes"):
            for part in value.split(","):
                tensor, shape = part.split(":")
                profiles[-1].setdefault(tensor, []).append(tuple(map(int, shape.split("x"))))
    assert profiles == [{k: list(v) for k, v in p.shapes.items()} for p in trt.config.profiles]


def test_tf32_is_the_default_of_trtexec(tmp_path: Path) -> None:
    features = tensorrt_graphs.write(tmp_path / "model.onnx", "features")
    command = trtexec_command(features, "x.plan", tf32=True)
    assert "--noTF32" not in command and "--hardwareCompatibilityLevel=none" in command
    assert not any(part.startswith(("--memPoolSize", "--timingCacheFile")) for part in command)


@pytest.fixture
def graph(trt: Double, model: Path) -> TensorRTGraph:
    return TensorRTGraph(build(model, validate=False).engine_path, step_seconds=0.1)


def captures(graph: TensorRTGraph) -> int:
    return graph._gpu.captures  # type: ignore[attr-defined, no-any-return]


def test_runner_says_what_it_is(graph: TensorRTGraph) -> None:
    assert graph.inputs == ("waveform", "lengths") and (graph.max_batch, graph.max_samples) == (6, 8000)
    assert graph.full_float32 and GraphNetwork(graph, "0" * 64).fingerprint == "abc"
    assert graph.metadata["spec_hash"] == tensorrt_graphs.SPEC.hash and graph.device.type == "cpu"


def test_dropped_sizes_leave_no_memory(graph: TensorRTGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    graph(batch(500))
    graph(batch(500, 600))
    memories = [weakref.ref(memory) for memory in graph._memories.values()]
    busy: list[bool] = []
    monkeypatch.setattr(graph._gpu, "finish", lambda: busy.extend(ref() is not None for ref in memories))
    graph.clear()
    assert busy == [True, True] and all(ref() is None for ref in memories)
    assert error(graph(batch(500)), batch(500)) < ROUNDING


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_padding_changes_no_result(trt: Double, model: Path, cuda_graphs: bool) -> None:
    path = build(model, validate=False).engine_path
    graph = TensorRTGraph(path, step_seconds=0.1, cuda_graphs=cuda_graphs)
    cases = [(400,), (8000,), (1600, 1), (4001, 3000, 8000), (7999, 5, 600, 401, 2000), (800,) * 6]
    with torch.inference_mode():
        for seed in range(3):
            for case in cases:
                inputs = batch(*case, seed=seed)
                got = graph(inputs)
                assert got.shape == (len(case), 3) and error(got, inputs) < ROUNDING
    inputs = batch(*cases[-1])
    assert error(graph(inputs), inputs) < ROUNDING  # out of inference mode, what was made inside
    assert len(graph) == len(cases) and captures(graph) == (len(cases) if cuda_graphs else 0)


def test_sizes_share_graphs_from_the_second_batch_on(graph: TensorRTGraph) -> None:
    seen = []
    for lengths in ((1599, 500), (1600, 1600), (401, 400), (1600, 1601), (1,) * 3 + (400,), (1700,) * 4):
        graph(batch(*lengths))
        seen.append((len(graph), captures(graph)))
    # 2 x 1600 three times, 2 x 3200, 4 x 1600, 4 x 3200.
    assert seen == [(1, 0), (1, 1), (1, 1), (2, 1), (3, 1), (4, 1)]
    graph.clear()
    assert len(graph) == 0


def test_the_least_recently_used_graph_goes(trt: Double, model: Path) -> None:
    graph = TensorRTGraph(build(model, validate=False).engine_path, step_seconds=0.1, max_graphs=2)
    sizes = []
    for length in (400, 2000, 400, 4000, 400, 2000):
        inputs = batch(length)
        assert error(graph(inputs), inputs) < ROUNDING
        sizes.append([bucket.length for bucket in graph._slots])
    assert sizes == [[1600], [1600, 3200], [3200, 1600], [1600, 4800], [4800, 1600], [1600, 3200]]
    assert graph._gpu.finished == 2 and captures(graph) == 1  # type: ignore[attr-defined]


def test_result_is_the_callers(graph: TensorRTGraph) -> None:
    for _ in range(3):
        first = graph(batch(500, 600))
        kept = first.clone()
        graph(batch(500, 600, seed=1))
        assert torch.equal(first, kept)


def test_lengths_beyond_the_samples_end_with_them(graph: TensorRTGraph) -> None:
    graph(batch(1600, 1600))  # leaves samples in the padding of the next one
    inputs = batch(500, 500)
    assert error(graph({**inputs, "lengths": torch.tensor([900, 500])}), inputs) < ROUNDING


def test_without_lengths_every_length_is_a_size(trt: Double, tmp_path: Path) -> None:
    features = tensorrt_graphs.write(tmp_path / "model.onnx", "features", lengths=False)
    graph = TensorRTGraph(build(features).engine_path)
    for frames in (7, 8, 8, 8):
        x = torch.randn(3, frames, 80)
        want = tensorrt_graphs.expected([row[:, 0].numpy() for row in x])
        np.testing.assert_allclose(graph({"feats": x}).numpy(), want, rtol=1e-4, atol=1e-5)
    assert [bucket[1:] for bucket in graph._slots] == [(4, 7), (4, 8)] and captures(graph) == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"lengths": None}, "inputs must be waveform, lengths, got waveform"),
        ({"feats": torch.zeros(1)}, "inputs must be waveform, lengths, got waveform, lengths, feats"),
        ({"waveform": torch.zeros(2, 500).half()}, r"must be torch.float32 \(B, S\).*got torch.float16 \(2, 500\)"),
        ({"waveform": torch.zeros(500)}, r"waveform must be .*got torch.float32 \(500,\)"),
        ({"waveform": torch.zeros(0, 500), "lengths": torch.zeros(0).long()}, r"waveform must be .*\(0, 500\)"),
        ({"waveform": [0.0]}, r"waveform must be .*, got list"),
        ({"lengths": torch.zeros(3).long()}, r"lengths must be torch.int64 \(B\), .*got torch.int64 \(3,\)"),
        ({"lengths": torch.zeros(2).int()}, r"lengths must be torch.int64 \(B\), .*got torch.int32 \(2,\)"),
        ({"waveform": torch.zeros(2, 399)}, "waveform must have 400 at least along its second axis, got 399"),
        ({"waveform": torch.zeros(2, 8001)}, "2 x 8001 lies in no profile.*1 x 400 to 1 x 8000, 2 x 400 to 6"),
        ({"waveform": torch.zeros(7, 800), "lengths": torch.zeros(7).long()}, "waveform of 7 x 800 lies in no profile"),
    ],
)  # fmt: skip
def test_unfit_inputs_are_refused(graph: TensorRTGraph, change: dict[str, Any], complaint: str) -> None:
    inputs = {name: value for name, value in {**batch(500, 500), **change}.items() if value is not None}
    with pytest.raises(InputError, match=complaint):
        graph(inputs)


def test_a_failed_run_is_not_captured(trt: Double, graph: TensorRTGraph) -> None:
    trt.fail = {"execute"}
    with pytest.raises(InputError, match="did not run"):
        graph(batch(500))
    trt.fail = set()
    assert error(graph(batch(500)), batch(500)) < ROUNDING and captures(graph) == 0


def test_what_cannot_be_captured_runs_directly(
    trt: Double, graph: TensorRTGraph, caplog: pytest.LogCaptureFixture
) -> None:
    trt.fail = {"capture"}
    with caplog.at_level(logging.WARNING, "spkfast.tensorrt"):
        for seed in range(4):
            inputs = batch(500, seed=seed)
            assert error(graph(inputs), inputs) < ROUNDING
    told = [record.message for record in caplog.records if "has no CUDA graph" in record.message]
    assert captures(graph) == 1 and len(told) == 1 and "1 x 1600" in told[0] and "[capture] went wrong" in told[0]
    trt.fail = set()
    graph(batch(500))
    assert captures(graph) == 1  # remembered
    for _ in range(2):
        graph(batch(3000))
    assert captures(graph) == 2  # other sizes have theirs
    graph.clear()
    for _ in range(2):
        graph(batch(500))
    assert captures(graph) == 3


def test_threads_take_turns(graph: TensorRTGraph) -> None:
    errors: list[float] = []

    def work(seed: int) -> None:
        for step in range(20):
            inputs = batch(500 + 100 * (step % 3), 450, seed=seed)
            errors.append(error(graph(inputs), inputs))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 80 and max(errors) < ROUNDING


def test_an_engine_of_another_machine_is_not_even_read(
    trt: Double, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(model, validate=False).engine_path
    trt.calls.clear()
    monkeypatch.setattr(StandIn, "gpu", "NVIDIA Other")
    trt.__version__ = "10.12.1"
    with pytest.raises(
        InputError, match=r"built for TensorRT .*, here is 10.12.1; built on .*Double, here is .*Other: rebuild"
    ):
        TensorRTGraph(engine)
    assert trt.calls == []


def test_an_engine_of_another_file_is_refused(trt: Double, model: Path) -> None:
    engine = build(model, validate=False).engine_path
    TensorRTGraph(engine, onnx_path=model)
    tensorrt_graphs.write(model, model_hash="def")
    with pytest.raises(InputError, match="built from another ONNX file: rebuild"):
        TensorRTGraph(engine, onnx_path=model)
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"not the one that its .json describes: rebuild"):
        TensorRTGraph(engine)


def test_tensors_must_be_those_of_the_facts(trt: Double, model: Path) -> None:
    engine = build(model, validate=False).engine_path
    facts = json.loads(sidecar_path(engine).read_text())
    facts["outputs"][0]["name"] = "embs"
    sidecar_path(engine).write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"other inputs and outputs than its .json says"):
        TensorRTGraph(engine)


@pytest.mark.parametrize(
    "settings",
    [{"max_graphs": 0}, {"max_graphs": True}, {"step_seconds": 0.0}, {"step_seconds": float("nan")}],
    ids=str,
)
def test_settings_of_the_runner_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(settings))} must be"):
        TensorRTGraph("missing.plan", **settings)


def test_old_versions_are_refused(trt: Double, model: Path) -> None:
    trt.__version__ = "10.11.0.33"
    with pytest.raises(InputError, match=r"TensorRT 10.11.0.33 is too old, 10.12 at least is needed: pip install"):
        build(model)


def test_without_tensorrt_the_package_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(InputError, match=r"TensorRT is not installed .*: pip install 'tensorrt-cu13>=10.13'"):
        build(model, validate=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_that_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", Double(11))
    with pytest.raises(InputError, match="TensorRT needs an NVIDIA GPU, torch finds none"):
        build(model, validate=False)


def test_messages_go_to_logging(trt: Double, caplog: pytest.LogCaptureFixture) -> None:
    log = tensorrt_graph.log_of(trt)
    with caplog.at_level(logging.INFO, "spkfast.tensorrt"):
        log.log(trt.ILogger.Severity.WARNING, "slow")
        log.log(trt.ILogger.Severity.VERBOSE, "much")
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", "slow")]


def test_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of waits around what an engine does, and what holds the caller's memory meanwhile."""
    events: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name, self.cuda_stream = name, 7

        def wait_stream(self, other: Any) -> None:
            events.append(f"{self.name} waits for {other.name}")

    class OnGpu:
        device = torch.device("cuda", 0)

        def record_stream(self, stream: Any) -> None:
            events.append(f"kept for {stream.name}")

    gpu = Gpu.__new__(Gpu)
    gpu.device, gpu._stream = torch.device("cuda", 0), Stream("own")  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream("caller"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(RuntimeError), gpu.turn([OnGpu(), torch.zeros(1)]) as handle:  # type: ignore[list-item]
        events.append(f"runs on {handle}")
        raise RuntimeError
    gpu.handed_over(OnGpu())  # type: ignore[arg-type]
    assert events == [
        "own waits for caller", "runs on 7", "caller waits for own", "kept for own", "kept for caller"
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(InputError, match="outside of a capture"), gpu.turn([]):
        pass
