"""The command ``export``, what it says of the file that it wrote, and the commands that take such a file as a model."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest

import spkfast as package
from spkfast import export as library
from spkfast.cli import export as command
from spkfast.cli.main import main
from spkfast.data.embeddings import read_embeddings
from spkfast.export import aotinductor, graph, onnx_edit, tensorrt_plan, triton_server
from spkfast.export import onnx as exporter

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


class Exported(NamedTuple):
    path: Path
    printed: dict[str, Any]
    report: library.OnnxReport


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """The small model, exported once by the command: the file, what was printed, and the report behind it."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    reports = []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        written = library.to_onnx
        patch.setattr(library, "to_onnx", lambda *a, **k: reports.append(written(*a, **k)) or reports[0])
        assert main(["export", "onnx", str(model), str(path), "--json"]) == 0
    return Exported(path, json.loads(out.getvalue()), reports[0])


@pytest.fixture
def instead(exported, monkeypatch):
    """Has the command get the report of the file that is there, changed; gives what it asked for."""

    def become(**changes):
        asked = {}

        def to_onnx(encoder, path, **options):
            shutil.copyfile(exported.path, path)
            asked.update(options)
            return dataclasses.replace(exported.report, path=Path(path), **changes)

        monkeypatch.setattr(library, "to_onnx", to_onnx)
        return asked

    return become


def test_names_are_those_of_the_library():
    assert (command.INPUTS, command.LAYOUTS, command.TARGETS) == (graph.INPUTS, exporter.LAYOUTS, onnx_edit.TARGETS)
    assert set(command.PRECISIONS) == set(exporter.PRECISIONS) and command.LAYOUTS[:2] == aotinductor.LAYOUTS
    assert get_args(exporter.Form) == command.FORMS and triton_server.BACKENDS == command.BACKENDS
    assert get_args(tensorrt_plan.HardwareCompatibility) == command.HARDWARE
    assert command.OPSETS[0] == exporter._OPSET and exporter._OPSET_BF16 in command.OPSETS


def test_what_leaves_loads_nothing_optional():
    run = subprocess.run(
        [sys.executable, "-c", "import sys, spkfast.export; print(*sys.modules)"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    heavy = {"onnx", "onnxscript", "onnxruntime", "tensorrt", "soundfile", "yaml", "torch._inductor.compile_fx"}
    assert heavy.isdisjoint(run.stdout.split())


def test_help_loads_no_torch():
    program = (
        "import sys; from spkfast.cli.main import main; "
        "kinds = ['onnx', 'tensorrt', 'triton-server', 'aotinductor']; "
        "assert not any(main(['export', *kind, '--help']) for kind in ([], *([kind] for kind in kinds))); "
        "sys.exit('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for kind in ("onnx", "tensorrt", "triton-server", "aotinductor"):
        assert f"usage: spkfast export {kind} " in run.stdout
    assert "load only what you trust" in " ".join(run.stdout.split())


def test_report_for_programs(exported, model):
    printed, report = exported.printed, exported.report
    assert "types" not in printed and printed["path"] == str(exported.path)
    assert printed["bytes"] == exported.path.stat().st_size
    assert printed["inputs"] == {"waveform": ["float32", ["B", "S"]], "lengths": ["int64", ["B"]]}
    assert printed["outputs"] == {"embedding": ["float32", ["B", 24]]}
    assert printed["metadata"]["model_hash"] == package.SpeakerEncoder.load(model).fingerprint
    assert printed["operators"] == report.operators and printed["unsupported"] == []
    assert (printed["max_error"], printed["min_cosine"]) == (report.max_error, report.min_cosine)
    assert printed["within_bounds"] is report.within_bounds is True


def test_report_for_people(spkfast, instead, exported, model, tmp_path):
    instead()
    status, out, _ = spkfast("export", "onnx", model, tmp_path / "m.onnx")
    report = exported.report
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines() if "  " in line)
    assert status == 0 and rows["written to"] == f"{tmp_path}/m.onnx"
    assert rows["inputs"] == "waveform float32 (B, S), lengths int64 (B)"
    assert rows["nodes"] == f"{sum(report.operators.values())} of {len(report.operators)} operators"
    assert f"{list(report.types.values()).count('float32')} float32" in rows["tensors"].split(", ")
    assert rows["TensorRT would refuse"] == "nothing, by its operator table"
    assert rows["largest relative error"] == f"{report.max_error:.1e}" and rows["batches"] == str(len(report.checked))
    assert rows["fp32: relative error at most 0.0001"] == "yes"


def test_types_on_request(spkfast, instead, exported, model, tmp_path):
    instead()
    arguments = ("export", "onnx", model, tmp_path / "m.onnx", "--types")
    assert json.loads(spkfast(*arguments, "--json").out)["types"] == exported.report.types
    assert re.search(r"^waveform +float32$", spkfast(*arguments).out, re.M)


def test_refused_operators_are_grouped(spkfast, instead, model, tmp_path):
    instead(unsupported=("Conv a/b: uint8", "Conv a/c: uint8", "Loop d: not in the operator table"))
    out = spkfast("export", "onnx", model, tmp_path / "m.onnx").out
    assert re.search(r"^Conv +uint8 +2$", out, re.M) and re.search(r"^Loop +not in the operator table +1$", out, re.M)


@pytest.mark.parametrize(
    ("precision", "changes", "words"),
    [
        ("fp32", {"max_error": 2e-4}, "fp32 promises relative error at most 0.0001, got 0.0002"),
        ("bf16", {"min_cosine": 0.999}, "bf16 promises cosine at least 0.9995, got 0.999"),
        ("int8", {"min_cosine": float("nan")}, "int8 promises cosine at least 0.995, got nan"),
    ],
)
def test_out_of_bounds_is_printed_and_fails(spkfast, instead, exported, model, tmp_path, precision, changes, words):
    metadata = exported.report.metadata | {"precision": precision}
    instead(metadata=metadata, **changes)
    assert dataclasses.replace(exported.report, metadata=metadata, **changes).within_bounds is False
    out = tmp_path / "m.onnx"
    outcome = spkfast("export", "onnx", model, out, "--json")
    assert (
        outcome.error == f"spkfast export: error: {out}: is written, but gives other embeddings than the model: {words}"
    )
    assert json.loads(outcome.out)["within_bounds"] is False and out.is_file()


def test_without_comparison_nothing_is_claimed(spkfast, instead, model, tmp_path):
    asked = instead(max_error=None, min_cosine=None, checked=())
    status, out, _ = spkfast("export", "onnx", model, tmp_path / "m.onnx", "--no-validate")
    assert status == 0 and asked["validate"] is False and "compared with the model  no\n" in out


def test_options_are_passed_on(spkfast, instead, model, tmp_path):
    asked = instead()
    options = (
        "--inputs features --precision fp16 --layout equal --target tensorrt --form matmul --opset 20 --language L"
    )
    assert spkfast("export", "onnx", model, tmp_path / "m.onnx", *options.split()).status == 0
    assert asked == {
        "inputs": "features", "precision": "fp16", "calibration": None, "layout": "equal", "target": "tensorrt",
        "form": "matmul", "opset": 20, "language": "L", "validate": True,
    }  # fmt: skip


def test_calibration_is_drawn_at_random_and_passes_over_bad_files(spkfast, instead, model, data, tmp_path):
    asked = instead()
    (data / "s0" / "bad.wav").write_bytes(b"no audio")

    def drawn(*options):
        outcome = spkfast(
            "export", "onnx", model, tmp_path / "m.onnx", "--precision", "int8", "--calibration", data, *options
        )
        assert outcome.status == 0
        return [utterance.tobytes() for utterance in asked["calibration"]], outcome.err

    every, told = drawn()
    assert len(set(every)) == 9 and "skipped: " in told and "bad.wav" in told and "1 of 10 files skipped" in told
    some, _ = drawn("--max-utterances", "3", "--seed", "1")
    assert len(some) == 3 and set(some) < set(every)
    assert drawn("--max-utterances", "3", "--seed", "1")[0] == some
    assert drawn("--max-utterances", "3", "--seed", "2")[0] != some


def test_int8_of_audio(spkfast, model, data, tmp_path):
    path = tmp_path / "m.onnx"
    outcome = spkfast("export", "onnx", model, path, "--precision", "int8", "--calibration", data, "--json")
    printed = json.loads(outcome.out)
    assert outcome.status == 0 and printed["within_bounds"] is True and printed["min_cosine"] > 0.995
    assert printed["metadata"]["target"] == "cpu" and printed["operators"]["QuantizeLinear"] > 10
    assert {line.split()[0] for line in printed["unsupported"]} == {"QuantizeLinear", "DequantizeLinear"}
    refused = spkfast("export", "tensorrt", path, tmp_path / "m.plan").error
    assert "int8 graph for 'cpu'" in refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "the following arguments are required: kind, MODEL, OUT"),
        ("onx M m.onnx", "argument kind: invalid choice: 'onx'"),
        ("onnx M m.safetensors", "m.safetensors: name a file that ends in .onnx"),
        ("onnx M none/m.onnx", "none/m.onnx: is a folder, or in none that is there"),
        ("onnx none m.onnx", "none: no such model"),
        ("onnx M m.onnx --precison int8", "unknown option --precison (did you mean '--precision'?)"),
        ("onnx M m.onnx --layout flat", "argument --layout: invalid choice: 'flat'"),
        ("onnx M m.onnx --inputs features --layout ragged", "a ragged batch is one of waveforms"),
        ("onnx M m.onnx --opset 17", "argument --opset: invalid choice: 17"),
        ("onnx M m.onnx --opset 18 --precision bf16", "--opset must be 22 at least for bf16"),
        ("onnx M m.onnx --precision int8", "precision 'int8' needs calibration: encoder.stem has no range"),
        ("onnx M m.onnx --precision int8 --calibration none.wav", "none.wav: no such file"),
        ("onnx M m.onnx --precision int8 --calibration none.txt", "none.txt: no such list file"),
        ("onnx M m.onnx --precision int8 --calibration a --seed -1", "--max-utterances must be at least 1 and --seed"),
        ("onnx M m.onnx --calibration a.wav", "--calibration goes with --precision int8, got fp32"),
        ("tensorrt X m.onnx", "m.onnx: name a file that ends in .engine or .plan"),
        ("tensorrt none.onnx m.plan", "none.onnx: no readable ONNX file"),
        ("tensorrt X m.plan --profile 1", "--profile 1: expected BATCH:SECONDS, each MIN,OPT,MAX or one number"),
        ("tensorrt X m.plan --profile 1,2:3", "--profile 1,2:3: expected BATCH:SECONDS"),
        ("tensorrt X m.plan --profile 8,1,1:3", "--profile 8,1,1:3: batch of a profile must be (min, opt, max)"),
        ("tensorrt X m.plan --tf32", "tf32 ruins the front-end of a waveform graph"),
        ("tensorrt X m.plan --optimization-level 6 --print-trtexec", "optimization_level must be 0 to 5, got 6"),
        ("triton-server M repo --name a/b", "name must be of letters, digits"),
        ("triton-server M repo --backend tensorrt", "engine must be given for backend 'tensorrt'"),
        ("triton-server M repo --calibration a.wav", "--calibration goes with --precision int8, got none"),
        ("aotinductor M m.so", "m.so: a package is named .pt2"),
        ("aotinductor M m.pt2 --precision int8", "argument --precision: invalid choice: 'int8'"),
        ("aotinductor M m.pt2 --max-seconds 0.001", "max_seconds must be at least that of a frame"),
        ("aotinductor M m.pt2 --max-seconds nan", "max_seconds must be at least that of a frame, and finite, got nan"),
        ("aotinductor M m.pt2 --device gpu", "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
    ],
)
def test_wrong_usage_is_one_line(spkfast, exported, model, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    places = {"M": model, "X": exported.path}
    error = spkfast("export", *(places.get(word, word) for word in arguments.split())).error
    assert error.startswith("spkfast export: error: ") and words in error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["onnx", "triton-server", "aotinductor"])
def test_an_exported_graph_is_no_model_to_export(spkfast, exported, tmp_path, kind):
    error = spkfast("export", kind, exported.path, tmp_path / "m.onnx").error
    assert "is an exported graph; name the model that it was made of" in error


@pytest.mark.parametrize(
    ("missing", "arguments", "words"),
    [
        ("onnxscript", "onnx M m.onnx", "the export needs the packages 'onnx' and 'onnxscript'"),
        ("onnx", "tensorrt X m.plan --print-trtexec", "building needs the onnx package"),
        ("tensorrt", "tensorrt X m.plan", "TensorRT is not installed"),
        ("onnxruntime", "tensorrt X m.plan", "the comparison needs onnxruntime"),
    ],
)
def test_missing_packages_are_told(spkfast, exported, model, tmp_path, monkeypatch, missing, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    places = {"M": model, "X": exported.path}
    assert words in spkfast("export", *(places.get(word, word) for word in arguments.split())).error


def test_trtexec_without_tensorrt(spkfast, exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    options = "--profile 1:0,3,20 --profile 2,8,64:1.5 --exact --optimization-level 4 --timing-cache t --print-trtexec"
    arguments = ("export", "tensorrt", exported.path, "m.engine", *options.split())
    line = shlex.split(spkfast(*arguments).out)
    profiles = [library.Profile((1, 1, 1), (0.0, 3.0, 20.0)), library.Profile((2, 8, 64), (1.5, 1.5, 1.5))]
    want = library.trtexec_command(
        exported.path, "m.engine", profiles, timing_cache_path="t", exact=True, optimization_level=4
    )
    assert line == want and "--optShapes=waveform:8x24000,lengths:8" in line and "--noTF32" in line
    assert json.loads(spkfast(*arguments, "--json").out) == {"trtexec": want}


def test_engine_report(spkfast, exported, tmp_path, monkeypatch):
    """By a stand-in for the build, which has tests of its own and needs a GPU."""
    from spkfast.export.tensorrt import Parity

    asked = {}
    machine = {"gpu": "NVIDIA X", "capability": "9.0"}

    def build(onnx_path, engine_path, **options):
        asked.update(options, onnx_path=onnx_path)
        parity = (Parity((400,), 2e-6, 1.0), Parity((400, 900), 3e-6, 0.9999999))
        facts = {"precision": "fp32", "machine": machine}
        return library.TensorRTReport(Path(engine_path), facts, 12345, 6.5, Path("timings/x.timing"), parity)

    monkeypatch.setattr(library, "build_tensorrt", build)
    plan = tmp_path / "m.plan"
    arguments = ("export", "tensorrt", exported.path, plan, "--timing-cache", "timings", "--no-validate")
    printed = json.loads(spkfast(*arguments, "--json").out)
    assert asked == {
        "onnx_path": str(exported.path), "profiles": None, "timing_cache": "timings", "tf32": False, "exact": False,
        "workspace_bytes": None, "optimization_level": 3, "version_compatible": False,
        "hardware_compatibility": "none", "validate": False, "reference": None, "device": "cuda",
    }  # fmt: skip
    assert (printed["engine_path"], printed["timing_cache"]) == (str(plan), "timings/x.timing")
    assert printed["parity"][1] == {"lengths": [400, 900], "relative_error": 3e-6, "cosine": 0.9999999}
    out = spkfast(*arguments).out
    assert re.search(r"^2 +900 +3.0e-06 +0.9999999$", out, re.M) and re.search(r"^gpu +NVIDIA X$", out, re.M)


def test_triton_repository(spkfast, model, tmp_path):
    options = (
        "--name voice --device cpu --max-batch-size 16 --preferred-batch-sizes 4 16 --warmup-seconds 1 --threads 2"
    )
    arguments = ("export", "triton-server", model, tmp_path / "repo", *options.split(), "--json")
    printed = json.loads(spkfast(*arguments).out)
    folder = tmp_path / "repo" / "voice"
    assert (printed["folder"], printed["version"]) == (str(folder), 1) and printed["within_bounds"] is True
    assert printed["files"] == [str(folder / "config.pbtxt"), str(folder / "1" / "model.onnx")]
    assert all(Path(file).is_file() for file in printed["files"])
    assert printed["perf_analyzer"].startswith("perf_analyzer -m voice ")
    config = printed["config"]
    assert (config["max_batch_size"], config["preferred_batch_sizes"], config["threads"]) == (16, [4, 16], 2)
    assert config["warmup"] == [[1, 16000], [4, 16000], [16, 16000]] and config["device"] == "cpu"


def test_triton_repository_out_of_bounds(spkfast, model, tmp_path, monkeypatch):
    config = library.TritonConfig("voice", 24, metadata={"precision": "int8", "sample_rate": "16000"})
    folder = tmp_path / "voice"
    report = library.TritonReport(folder, 3, config, (folder / "3" / "model.onnx",), 0.2, 0.98)
    monkeypatch.setattr(library, "triton_repository", lambda *arguments, **options: report)
    outcome = spkfast("export", "triton-server", model, tmp_path)
    assert outcome.error.endswith("int8 promises cosine at least 0.995, got 0.98") and "version     3\n" in outcome.out


def test_package_report(spkfast, model, tmp_path, monkeypatch):
    """By a stand-in for the compilation, which takes long and has tests of its own."""
    import torch

    asked = {}

    def compiled(encoder, path, **options):
        asked.update(options, device=encoder.device)
        Path(path).write_bytes(b"12345")
        metadata = {"precision": options["precision"]}
        return library.AotReport(
            Path(path), torch.device("cpu"), ("waveform", "lengths"), metadata, 2.5, ((400,),), 0.01, 0.9999
        )

    monkeypatch.setattr(library, "to_aotinductor", compiled)
    path = tmp_path / "m.pt2"
    arguments = ("export", "aotinductor", model, path, "--device", "cpu", "--max-batch", "4", "--max-seconds", "5")
    printed = json.loads(spkfast(*arguments, "--precision", "bf16", "--max-autotune", "--json").out)
    assert asked == {
        "device": torch.device("cpu"), "inputs": "waveform", "precision": "bf16", "layout": "padded", "max_batch": 4,
        "max_seconds": 5.0, "settings": {"max_autotune": True}, "validate": True,
    }  # fmt: skip
    assert (printed["path"], printed["bytes"], printed["device"]) == (str(path), 5, "cpu")
    assert printed["within_bounds"] is True and printed["inputs"] == ["waveform", "lengths"]
    assert spkfast(*arguments).error.endswith("fp32 promises relative error at most 0.0001, got 0.01")


def test_verify_with_an_exported_file(spkfast, exported, model, data):
    pair = data / "s0/r0/u.wav", data / "s1/r1/u.wav"
    scores = [
        json.loads(spkfast("verify", *pair, "--model", source, "--json").out)["score"]
        for source in (model, exported.path)
    ]
    # A relative error of 1e-4 turns an embedding by as much at most, and there are two.
    assert abs(scores[0] - scores[1]) < 2e-4


def test_embed_with_an_exported_file(spkfast, exported, model, data, tmp_path):
    for name, source in (("a", model), ("b", exported.path)):
        assert spkfast("embed", data, "--model", source, "--out", tmp_path / f"{name}.npz").status == 0
    want, have = (read_embeddings(tmp_path / f"{name}.npz") for name in "ab")
    assert have.keys == want.keys and (have.model, have.frontend) == (want.model, want.frontend)
    errors = np.linalg.norm(have.embeddings - want.embeddings, axis=1) / np.linalg.norm(want.embeddings, axis=1)
    assert len(errors) == 9 and errors.max() < 1e-4
    again = spkfast("embed", data, "--model", exported.path, "--out", tmp_path / "a.npz", "--json")
    assert json.loads(again.out)["already_there"] == 9


def test_evaluate_with_an_exported_file(spkfast, exported, model, data):
    results = []
    for source in (model, exported.path):
        outcome = spkfast("evaluate", "--model", source, "--data", data, "--trials", data / "trials.txt", "--json")
        results.append(json.loads(outcome.out))
    want, have = results
    assert have["model"] == {"name": str(exported.path), "fingerprint": want["model"]["fingerprint"]}
    (want,), (have,) = want["lists"], have["lists"]
    # Of a score, as above; no two of these are so near each other that their order could change.
    assert abs(have.pop("eer_threshold") - want.pop("eer_threshold")) < 2e-4
    assert have == want


@pytest.mark.parametrize("name", ["verify", "embed", "evaluate"])
def test_another_precision_than_that_of_the_file_is_told(spkfast, exported, data, tmp_path, name):
    audio = data / "s0/r0/u.wav"
    arguments = {
        "verify": (audio, audio),
        "embed": (audio, "--out", tmp_path / "x.npz"),
        "evaluate": ("--data", data, "--trials", data / "trials.txt"),
    }[name]
    error = spkfast(name, *arguments, "--model", exported.path, "--precision", "bf16").error
    assert error.endswith(f"{exported.path}: was exported at precision 'fp32', 'bf16' was asked for")


def test_examples_of_the_page(tmp_path, monkeypatch):
    """Each block of Python in docs/export.md, one after another."""
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.wav", "b.wav")):
        noise = np.random.default_rng(seed).normal(size=16000 + 8000 * seed)
        soundfile.write(name, np.cumsum(noise) / 1000, 16000)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    want = package.SpeakerEncoder.load("ecapa-mini", device="cpu").embed_batch(["a.wav", "b.wav"]).numpy()
    assert names["report"].within_bounds
    for have in (names["embeddings"], names["by_hand"], names["of_features"]):
        errors = np.linalg.norm(np.asarray(have) - want, axis=1) / np.linalg.norm(want, axis=1)
        assert errors.max() < 1e-4
