"""The C++ example builds without warnings over each runtime, and gives what Python gives."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from spkfast import SpeakerEncoder
from spkfast.export import to_onnx
from spkfast.export.parity import BOUNDS
from tests.conftest import require
from tests.export.conftest import voice

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/cpp"
ENVIRONMENT = os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
WRONG_RECORDINGS = {
    "odd.pcm": (bytes(1601), "expected 16-bit samples, got an odd number of bytes"),
    "short.pcm": (bytes(2 * 399), "expected at least 400 samples, got 399"),
    "empty.pcm": (b"", "expected at least 400 samples, got 0"),
    "voice.wav": (b"RIFF" + bytes(1600), "expected samples alone, got a file that begins with RIFF; convert it: ffmpeg "),
    "voice.flac": (b"fLaC" + bytes(1600), "expected samples alone, got a file that begins with fLaC; convert it: ffmpeg "),
}

Program = Callable[..., subprocess.CompletedProcess[str]]


def openvino() -> Path | None:
    """The CMake folder of the wheel."""
    spec = importlib.util.find_spec("openvino")
    folders = (Path(folder) for folder in (spec and spec.submodule_search_locations) or ())
    return next((folder / "cmake" for folder in folders if (folder / "cmake/OpenVINOConfig.cmake").is_file()), None)


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Runs ``embed``, built over a runtime."""
    if request.param == "openvino":
        require("openvino", openvino() is not None, "openvino is installed neither here nor by make bench")
        setting = f"-DOpenVINO_DIR={openvino()}"
    else:
        require("onnxruntime-cpp", "ORT_ROOT" in os.environ, "ORT_ROOT names no release archive of onnxruntime")
        setting = f"-DORT_ROOT={os.environ['ORT_ROOT']}"
    folder = tmp_path_factory.mktemp(request.param)
    for command in (
        ["cmake", "-G", "Ninja", "-S", EXAMPLE, "-B", folder, setting, "-DCMAKE_CXX_FLAGS=-Werror"],
        ["cmake", "--build", folder],
    ):
        result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
        assert result.returncode == 0, result.stdout + result.stderr
    return lambda *arguments: subprocess.run([folder / "embed", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def encoder() -> SpeakerEncoder:
    return SpeakerEncoder.load("ecapa-mini", device="cpu")


@pytest.fixture(scope="module")
def model(encoder: SpeakerEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(encoder, tmp_path_factory.mktemp("model") / "model.onnx", validate=False).path


@pytest.fixture(scope="module")
def recordings(encoder: SpeakerEncoder) -> list[np.ndarray]:
    """Voices as int16, the last of the least length: real ones where there are any."""
    speech = os.environ.get("SPKFAST_SPEECH")
    audio = sorted(Path(speech).rglob("*.flac"))[::400][:4] if speech else [voice(k, 40000 + 777 * k) for k in range(4)]
    found = [np.round(32768 * encoder.load_audio(item)).clip(-32768, 32767).astype(np.int16) for item in audio]
    return [*found, found[0][8000:8400]]


def test_gives_what_python_gives(
    program: Program, encoder: SpeakerEncoder, model: Path, recordings: list[np.ndarray], tmp_path: Path
) -> None:
    wanted, paths = [encoder.embed(samples).double() for samples in recordings], []
    for k, (samples, want) in enumerate(zip(recordings, wanted, strict=True)):
        paths.append(tmp_path / f"{k}.pcm")
        samples.astype("<i2").tofile(paths[-1])
        result = program(model, paths[-1])
        assert (result.returncode, result.stderr) == (0, "")
        have = torch.tensor([float(line) for line in result.stdout.splitlines()], dtype=torch.float64)
        assert (have - want).norm() < BOUNDS["fp32"][1] * want.norm()
    cosine = float(program(model, *paths[:2]).stdout)
    # Vectors that are off by a share e turn by at most e, and a cosine changes by no more than the angle.
    assert abs(cosine - float(torch.cosine_similarity(*wanted[:2], dim=0))) < 2 * BOUNDS["fp32"][1]


def test_errors_are_one_line(program: Program, model: Path, tmp_path: Path) -> None:
    def fails(message: str, *arguments: Path) -> None:
        result = program(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"embed: {message}")
        assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n")

    legal, absent, other = tmp_path / "legal.pcm", tmp_path / "absent", tmp_path / "other.onnx"
    legal.write_bytes(bytes(1600))
    for arguments in ([model], [model, legal, legal, legal]):
        fails("usage: embed MODEL.onnx AUDIO.pcm [AUDIO2.pcm]", *arguments)
    fails(f"{absent}: there is no such file", absent, legal)
    for path in (absent, tmp_path):
        fails(f"{path}: not a file that can be read", model, path)
    for name, (content, text) in WRONG_RECORDINGS.items():
        (tmp_path / name).write_bytes(content)
        fails(f"{tmp_path / name}: {text}", model, legal, tmp_path / name)

    other.write_bytes(model.read_bytes()[:10000])
    fails("", other, legal)
    for key, value in (("inputs", "features"), ("layout", "equal"), ("inputs", None)):
        graph = onnx.load(model)
        facts = {fact.key: fact.value for fact in graph.metadata_props} | {key: value}
        del graph.metadata_props[:]
        onnx.helper.set_model_props(graph, facts if value else {})
        onnx.save(graph, other)
        fails(f"{other}: expected the inputs 'waveform' and 'lengths'; write the file with to_onnx", other, legal)

    graph = onnx.load(model)
    for weight in graph.graph.initializer:
        if weight.dims == [192]:
            weight.CopyFrom(onnx.numpy_helper.from_array(np.full(192, np.nan, np.float32), weight.name))
    onnx.save(graph, other)
    fails(f"{legal}: the embedding is not finite", other, legal)


def test_is_short() -> None:
    files = sorted(path for path in EXAMPLE.iterdir() if path.suffix in (".cpp", ".h"))
    assert len(files) == 4
    assert sum(len(path.read_text().splitlines()) for path in files) < 150
