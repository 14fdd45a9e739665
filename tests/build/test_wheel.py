"""The wheel: what is in it, and that it works beside torch and numpy alone, far from the checkout."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]

SMOKE = """
import importlib.util, json
import torch
import spkfast

spec = spkfast.frontend("wespeaker")
waveforms = 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
lengths = torch.tensor([16000, 9000])
fast, _ = spkfast.functional.log_mel_fbank(waveforms, lengths, spec=spec, backend="native")
plain, _ = spkfast.functional.log_mel_fbank(waveforms, lengths, spec=spec, backend="reference")
shapes = {}
for name in spkfast.models.list():
    net = spkfast.models.create(name).eval()
    with torch.inference_mode():
        shapes[name] = list(net(fast).shape)
print(json.dumps({
    "file": spkfast.__file__,
    "version": spkfast.__version__,
    "info": spkfast.info(),
    "extras": [name for name in ("rich", "soundfile", "triton", "yaml") if importlib.util.find_spec(name)],
    "difference": float((fast - plain).abs().max()),
    "features": list(fast.shape),
    "models": shapes,
    "bundled": spkfast.models.bundled.list(),
}, default=str))
"""


def _run(*command: str | Path, cwd: Path) -> str:
    # Neither the checkout nor the caller's own settings may help.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    # Set-up builds the same sources with an optimiser; without one it takes half the time.
    environment["CMAKE_BUILD_TYPE"] = "None"
    result = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from an sdist, built from a copy: nothing of the checkout's own build leaks in."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    leave_out = shutil.ignore_patterns(".*", "build", "dist", "demo", "exp", "*.so", "*.egg-info", "__pycache__")
    # tests/build is a folder of tests, not a build.
    shutil.copytree(ROOT, copy, ignore=lambda path, names: set() if path.endswith("tests") else leave_out(path, names))
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=copy)
    (path,) = folder.glob("*.whl")
    return path


def _requirements(*names: str) -> set[str]:
    """Installed distributions that these need, themselves included; extras are left out."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # meant for another platform or Python
            continue
        found.add(name)
        waiting += [re.match(r"[\w.-]+", line)[0] for line in needed if "extra ==" not in line]
    return found


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory) -> Path:
    """A new environment that sees torch, numpy and what these need, with the wheel installed."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    visible = folder / "visible"
    visible.mkdir()
    for name in _requirements("torch", "numpy"):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files if file.parts[0] != ".."}:
            if not (visible / top).exists():
                (visible / top).symlink_to(distribution.locate_file(top))
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "visible.pth").write_text(f"{visible}\n")
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return python


def test_wheel_holds_what_it_should(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
        entry_points = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "linux" in wheel.name and "none-any" not in wheel.name
    assert "spkfast/_ops_cpu.so" in names
    assert any(re.fullmatch(r"spkfast/_C\..*\.so", name) for name in names)
    for path in sorted((ROOT / "spkfast").rglob("*.py")):
        assert path.relative_to(ROOT).as_posix() in names
    for path in sorted((ROOT / "kernels").rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh"):
            assert f"spkfast/{path.relative_to(ROOT).as_posix()}" in names
    assert "spkfast/py.typed" in names
    bundled = {name for name in names if re.match(r"spkfast/models/bundled/[^/]+/", name)}
    files = ("README.md", "config.yaml", "model.safetensors")
    assert bundled == {f"spkfast/models/bundled/ecapa-mini/{file}" for file in files}
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"spkfast"}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".pyc")) or "test" in name]
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names)
    base = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert sorted(re.match(r"Requires-Dist: (\w+)", line)[1] for line in base) == ["numpy", "torch"]
    assert "spkfast = spkfast.cli.main:main" in entry_points


def test_wheel_works_beside_torch_and_numpy_alone(clean_python, tmp_path):
    seen = json.loads(_run(clean_python, "-c", SMOKE, cwd=tmp_path).splitlines()[-1])
    assert Path(seen["file"]).is_relative_to(clean_python.parents[1])
    assert seen["extras"] == [], "the clean environment must not see packages of the extras"
    assert seen["features"] == [2, 98, 80]
    assert seen["difference"] < 1e-3
    assert seen["models"] and all(shape[0] == 2 for shape in seen["models"].values())
    assert seen["bundled"] == ["ecapa-mini"]


def test_command_line_starts_from_the_wheel(clean_python, tmp_path):
    command = clean_python.with_name("spkfast")
    assert "info" in _run(command, "--help", cwd=tmp_path)
    assert json.loads(_run(command, "info", "--json", cwd=tmp_path))
