"""AOTInductor packages: compiled networks equal the encoder at any size, also in graphs, and say what they are."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

import spkfast
from spkfast import InputError, SpeakerEncoder
from spkfast.export import aotinductor
from spkfast.export.aotinductor import AotGraph, AotReport, read_metadata, to_aotinductor
from spkfast.models import create
from spkfast.nn.cuda_graphs import _Gpu
from tests.export.conftest import DIALECTS, relative_errors, voice

# From the shortest legal utterance on; few and many rows, as inductor chooses by sizes (16 rows, 4096 samples).
BATCHES = [[400], [401, 400], [560], [16000], [20000, 400, 9001], [4000 - k for k in range(17)], [80000, 16001]]


@pytest.fixture(scope="module")
def small() -> SpeakerEncoder:
    """An ECAPA-TDNN of one block of two groups, which compiles soon."""
    torch.manual_seed(0)
    sizes = {"mfa_channels": 32, "attention_channels": 16, "se_channels": 16}
    net = create("ecapa_tdnn", channels=16, scale=2, kernel_sizes=(5, 3), dilations=(1, 2), **sizes)
    spec = spkfast.frontend("wespeaker")
    waveforms = torch.stack([torch.from_numpy(voice(seed, 16000)) for seed in range(100, 108)])
    with torch.no_grad():  # batch norms that do something
        net.train()(spkfast.functional.log_mel_fbank(waveforms, spec=spec)[0])
    return SpeakerEncoder(net.eval(), spec, device="cpu")


@pytest.fixture(scope="module")
def package(small: SpeakerEncoder, tmp_path_factory: pytest.TempPathFactory) -> AotReport:
    return to_aotinductor(small, tmp_path_factory.mktemp("aot") / "model.pt2", max_batch=20, max_seconds=5.0)


def batch_of(lengths: list[int]) -> dict[str, Tensor]:
    """Voices of these lengths; their padding is NaN."""
    rows = [torch.from_numpy(voice(k, length)) for k, length in enumerate(lengths)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)
    return {"waveform": padded, "lengths": torch.tensor(lengths)}


def embedded(encoder: SpeakerEncoder, lengths: list[int]) -> Tensor:
    """Each utterance alone."""
    return torch.stack([encoder.embed(voice(k, length)) for k, length in enumerate(lengths)])


def test_equals_the_encoder(small, package) -> None:
    report = package
    assert report.within_bounds and report.checked[0] == (400,)
    assert max(map(len, report.checked)) > 16 and max(map(max, report.checked)) == 80000
    graph = AotGraph(report.path)
    assert (graph.inputs, graph.device) == (("waveform", "lengths"), torch.device("cpu"))
    assert (graph.max_batch, graph.max_samples) == (20, 80000)
    for lengths in BATCHES:
        got = graph(batch_of(lengths))
        assert got.dtype == torch.float32
        # The bound of the export; rows of the batch against utterances alone.
        assert relative_errors(got, embedded(small, lengths)).max() < 1e-4, lengths


def test_needs_nothing_of_this_library(package) -> None:
    report = package
    lengths = [8000, 5000]
    program = f"""
import sys, torch
torch.set_num_threads({torch.get_num_threads()})  # which decide the order of sums
package = torch._inductor.aoti_load_package({str(report.path)!r})
inputs = torch.load({str(report.path.with_suffix(".inputs"))!r})
torch.save(package(inputs["waveform"], inputs["lengths"]), {str(report.path.with_suffix(".output"))!r})
assert "spkfast" not in sys.modules
"""
    torch.save(batch_of(lengths), report.path.with_suffix(".inputs"))
    subprocess.run([sys.executable, "-c", program], check=True, cwd=report.path.parent)
    assert torch.equal(torch.load(report.path.with_suffix(".output")), AotGraph(report.path)(batch_of(lengths)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_row_that_is_not_finite_is_out_of_bounds(small, package, value: float) -> None:
    class Broken:
        inputs, metadata = package.inputs, package.metadata

        def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
            found = torch.stack([small.embed(row[:n]) for row, n in zip(*inputs.values(), strict=True)])
            if len(found) == 3:  # neither the first batch nor the last one
                found[1] = value
            return found

    checked, error, cosine = aotinductor._compared(small, cast(Any, Broken()), 20, 80000)
    assert [len(lengths) for lengths in checked].index(3) not in (0, len(checked) - 1)
    for precision in ("fp32", "bf16"):  # by error, by cosine
        report = dataclasses.replace(
            package, metadata=package.metadata | {"precision": precision}, max_error=error, min_cosine=cosine
        )
        assert report.within_bounds is False


def test_products_of_float32_are_switched_by_one_thread_at_a_time(package) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with aotinductor._float32_products():
            inside.set()
            leave.wait(60)

    graph = AotGraph(package.path)
    holder = threading.Thread(target=hold)
    caller = threading.Thread(target=lambda: graph(batch_of([400])))
    matmul.fp32_precision = "tf32"
    try:
        holder.start()
        assert inside.wait(60) and matmul.fp32_precision == "ieee"
        caller.start()
        caller.join(0.5)  # without the turn it ends long before
        waits = caller.is_alive()
        leave.set()
        holder.join()
        caller.join()
        assert waits and matmul.fp32_precision == "tf32"
    finally:
        leave.set()
        matmul.fp32_precision = before


class _StandIn(_Gpu):
    """Captures without a GPU: what is replayed reads the same memory, and writes where the first call wrote."""

    captures = 0

    def captures_on(self, device: torch.device) -> bool:
        return True

    def capture(self, net: Any, inputs: tuple[Tensor, Tensor | None], beside: Any) -> tuple[Any, Tensor]:
        type(self).captures += 1
        output = net(*inputs)
        captured = type("Captured", (), {"replay": staticmethod(lambda: output.copy_(net(*inputs)))})()
        return captured, output

    @contextlib.contextmanager
    def in_order(self, device: torch.device) -> Iterator[None]:
        yield


def test_padding_to_sizes_of_graphs_changes_no_result(small, package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aotinductor, "_Gpu", _StandIn)
    monkeypatch.setattr(_StandIn, "captures", 0)
    graph = AotGraph(package.path, max_graphs=2)
    # Sizes 4 x 24000, again, 1 x 8000, 4 x 24000 in the memory of longer ones, 20 rows; the limit drops one of three.
    for lengths in ([20000, 400, 9001], [16001, 23000, 24000, 401], [400], [16001], [16002, 500, 400], [900] * 20):
        with torch.inference_mode():
            got = graph(batch_of(lengths))
        assert relative_errors(got, embedded(small, lengths)).max() < 1e-4, lengths
    assert (_StandIn.captures, len(graph)) == (5, 2)
    # No row reads beyond its samples, where an earlier batch lies.
    assert torch.equal(graph(batch_of([500]) | {"lengths": torch.tensor([9999])}), graph(batch_of([500])))
    graph.clear()
    assert len(graph) == 0


def test_says_what_it_is(small, package) -> None:
    report, encoder = package, small
    facts = read_metadata(report.path)
    assert facts == report.metadata == AotGraph(report.path).metadata
    assert (facts["inputs"], facts["layout"], facts["precision"]) == ("waveform", "padded", "fp32")
    assert (facts["min_size"], facts["max_size"], facts["max_batch"]) == ("400", "80000", "20")
    assert facts["model_hash"] == encoder.fingerprint and facts["spec_hash"] == encoder.frontend.hash
    assert json.loads(facts["frontend"]) == encoder.frontend.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AOTI_DEVICE_KEY": "cuda"}, "cuda"),
        ({"AOTI_MACHINE": "s390x"}, "compiled for s390x"),
        ({"torch_version": "99.1.0"}, "torch 99.1.0, this is the older"),
        ({"spkfast_version": None}, "no 'spkfast_version'"),
        ({"max_batch": "many"}, "damaged: invalid literal for int"),
        ({"max_batch": "0"}, "damaged: it takes 1 to 0 rows of 400 to 80000"),
        ({"max_batch": 20}, "damaged: its metadata are no texts"),
        ({"frontend": "{"}, "damaged: Expecting"),
        ({"frontend": "[]"}, "damaged: the fields of a front-end must be a mapping"),
        ({"frontend": '{"n_mels": "x"}'}, "damaged: "),
        ({"layout": "flat"}, "damaged: unknown layout 'flat'"),
        ({"torch_version": "new"}, "damaged: invalid literal for int"),
        ({"AOTI_DEVICE_KEY": "toaster"}, "compiled for 'toaster', not for cpu or cuda"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refuses_packages_for_elsewhere(package, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "other.pt2"
    with zipfile.ZipFile(package.path) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("_metadata.json"):
                data = json.dumps({k: v for k, v in (json.loads(data) | change).items() if v is not None}).encode()
            target.writestr(name, data)
    with pytest.raises(InputError, match=message):
        AotGraph(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda library: b"text", "torch cannot load it: .*: export it again"),
        (lambda library: None, "torch cannot load it: .*: export it again"),
        ("", r"damaged: .*\.so has another checksum: export it again"),
    ],
    ids=["text", "missing", "flipped"],
)
def test_refuses_a_damaged_library(package, tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "damaged.pt2"
    with zipfile.ZipFile(package.path) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith(".so"):
                library = data
                data = damage(data) if damage else data
            if data is not None:
                target.writestr(name, data)
    if not damage:
        path.write_bytes(path.read_bytes().replace(library, library[:-1] + bytes([library[-1] ^ 1])))
    with pytest.raises(InputError, match=message) as caught:
        AotGraph(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", ["mkdir", "replace"])
def test_a_file_that_cannot_be_written(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: Any) -> None:
        raise PermissionError(13, "not allowed")

    exported: list[Any] = []
    monkeypatch.setattr(aotinductor, "_exported", lambda *given: exported.append(given))
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: None)
    monkeypatch.setattr({"mkdir": Path, "replace": os}[step], step, fail)
    with pytest.raises(InputError, match=r"model\.pt2: cannot be written: .*not allowed"):
        to_aotinductor(small, tmp_path / "model.pt2")
    assert len(exported) == (step == "replace")  # told before the export, where it can be
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_features_of_the_longest_utterance_fit(
    encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dialect: str
) -> None:
    class Seen(Exception):
        pass

    def stop(graph: Any, place: Any, layout: str, most: tuple[int, int], *_: Any) -> None:
        raise Seen(*most)

    monkeypatch.setattr(aotinductor, "_exported", stop)
    encoder = encoders(dialect)
    for seconds in (1.0, 2.345):
        with pytest.raises(Seen) as seen:
            to_aotinductor(encoder, tmp_path / "model.pt2", inputs="features", max_batch=7, max_seconds=seconds)
        features, _ = encoder._features([voice(0, int(seconds * 16000))], "auto")
        assert seen.value.args == (7, features.shape[1])


def test_refuses_instructions_that_the_cpu_lacks(package, monkeypatch: pytest.MonkeyPatch) -> None:
    if not package.metadata["AOTI_CPU_ISA"].startswith("AVX"):
        pytest.skip("the package has no instructions of AVX")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(InputError, match="this CPU has DEFAULT"):
        AotGraph(package.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": None}, "inputs must be waveform, lengths, got waveform"),
        (
            {"waveform": torch.zeros(2, 500, dtype=torch.float64)},
            r"waveform must be float32 \(B, S\), got torch.float64",
        ),
        ({"waveform": torch.zeros(500)}, r"waveform must be float32 \(B, S\), got torch.float32 \(500,\)"),
        ({"waveform": torch.zeros(2, 399)}, "1 to 20 rows of 400 to 80000"),
        ({"waveform": torch.zeros(21, 400)}, "1 to 20 rows"),
        ({"lengths": torch.tensor([500])}, r"lengths must be int64 of shape \(B,\) = \(2,\)"),
        ({"lengths": torch.tensor([500, 400.0])}, "lengths must be int64"),
    ],
)
def test_refuses_inputs(package, change: dict[str, Any], message: str) -> None:
    inputs = {key: value for key, value in (batch_of([500, 400]) | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        AotGraph(package.path)(inputs)


def test_refuses_arguments(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, path = small, tmp_path / "model.pt2"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for options, message in (
        ({"layout": "ragged"}, "unknown layout"),
        ({"inputs": "audio"}, "unknown inputs"),
        ({"precision": "int8"}, "unknown precision"),
        ({"device": "meta"}, "cpu or cuda"),
        ({"device": "cuda:7"}, "device 'cuda:7': torch finds 1 CUDA devices here"),
        ({"device": "toaster"}, "device must be auto, cpu, cuda or cuda:N, got 'toaster'"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_seconds": 0.02}, "max_seconds"),
        ({"max_seconds": float("nan")}, "max_seconds must be at least that of a frame, and finite, got nan"),
        ({"max_seconds": float("inf")}, "max_seconds"),
    ):
        with pytest.raises(InputError, match=message):
            to_aotinductor(encoder, path, **options)
    with pytest.raises(InputError, match=r"named \.pt2, got '\.onnx'"):
        to_aotinductor(encoder, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="is a folder, or in none"):
        to_aotinductor(encoder, tmp_path / "none" / "model.pt2")
    # Not by monkeypatch, whose undoing hides the setting for good.
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)}),
        pytest.raises(InputError, match=r"C\+\+ compiler"),
    ):
        to_aotinductor(encoder, path)
    (tmp_path / "text.pt2").write_text("text")
    for file in ("text.pt2", "absent.pt2"):
        with pytest.raises(InputError, match=f"{file}: is no AOTInductor package"):
            AotGraph(tmp_path / file)
    assert not list(tmp_path.glob(".*")) and not path.exists()


@pytest.mark.full
@pytest.mark.parametrize("inputs", ["waveform", "features"])
@pytest.mark.parametrize("layout", ["padded", "equal"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_form(encoders, tmp_path: Path, dialect: str, layout: Any, inputs: Any) -> None:
    report = to_aotinductor(encoders(dialect, 16), tmp_path / "model.pt2", layout=layout, inputs=inputs, max_batch=20)
    assert report.within_bounds, (report.max_error, report.checked)
    assert report.inputs[0] == {"waveform": "waveform", "features": "feats"}[inputs]
    assert report.inputs[1:] == (("lengths",) if layout == "padded" else ())
    graph = AotGraph(report.path)
    assert graph.max_samples == (320000 if inputs == "waveform" else None)
    if report.inputs == ("waveform",):  # what lies behind the samples is not read
        least = int(graph.metadata["min_size"])
        memory = torch.cat([torch.from_numpy(voice(0, 3 * least)), torch.full((64,), torch.nan)])
        assert graph({"waveform": memory[: 3 * least].view(3, least)}).isfinite().all()


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision(mini: SpeakerEncoder, tmp_path: Path, precision: Any) -> None:
    # Trained weights: in a few random channels bfloat16 alone, uncompiled, is further away than the bound.
    report = to_aotinductor(mini, tmp_path / "model.pt2", precision=precision)
    assert report.within_bounds, report.min_cosine
    assert report.max_error is not None and report.max_error > 1e-4  # and not float32 by another name


@pytest.mark.full
def test_runs_from_cpp(package: AotReport, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    source, program = tmp_path / "embed.cpp", tmp_path / "embed"
    source.write_text(CPP)
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    (libraries,) = cpp_extension.library_paths()
    command = [compiler, "-std=c++20", "-O0", *includes, str(source), "-o", str(program), f"-L{libraries}"]
    command += [f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    inputs = batch_of([8000, 5000])
    samples = inputs["waveform"].nan_to_num()
    (tmp_path / "samples.f32").write_bytes(samples.numpy().tobytes())
    subprocess.run([program, package.path, tmp_path / "samples.f32", tmp_path / "embeddings.f32"], check=True)
    got = torch.frombuffer(bytearray((tmp_path / "embeddings.f32").read_bytes()), dtype=torch.float32).view(2, -1)
    assert relative_errors(got, AotGraph(package.path)(inputs)).max() < 1e-6  # the same code, by other threads at most


# Reads 2 x 8000 samples, of which the second row has 5000.
CPP = """
#include <fstream>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main(int, char** argv) {
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  torch::Tensor samples = torch::empty({2, 8000});
  std::ifstream(argv[2], std::ios::binary).read(static_cast<char*>(samples.data_ptr()), samples.nbytes());
  torch::Tensor lengths = torch::tensor({8000, 5000}, torch::kInt64);
  torch::Tensor embeddings = loader.run({samples, lengths})[0].contiguous();
  std::ofstream(argv[3], std::ios::binary).write(static_cast<char*>(embeddings.data_ptr()), embeddings.nbytes());
}
"""
