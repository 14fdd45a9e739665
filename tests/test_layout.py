"""Rules of the layout that no other tool checks: packages, pins, who touches the extension, the files of an op."""

import ast
import fnmatch
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(path for folder in ("spkfast", "kernels") for path in (ROOT / folder).rglob("*.py"))
OPS = sorted(path.stem for path in (ROOT / "spkfast" / "ops").glob("[!_]*.py"))
# Without a form in CUDA C++.
TRITON_ALONE = {"margin_softmax_loss"}
# Without a form for GPUs, where the definition runs, and measured together.
CPU_ALONE = {"add_noise", "change_speed", "reverberate"}
SCORING = {"paired_dot", "top_moments"}  # likewise


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _touched(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, reaches as attributes, or spells as text for importlib."""
    yield from _imported(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            yield node.value


def _names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}


def test_listed_packages_are_the_folders():
    folders = set()
    for root, prefix in ((ROOT / "spkfast", "spkfast"), (ROOT / "kernels", "spkfast.kernels")):
        for init in root.rglob("__init__.py"):
            folders.add(".".join((prefix, *init.parent.relative_to(root).parts)))
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(folders), "pyproject.toml: [tool.setuptools] packages"


def test_every_direct_dependency_is_pinned():
    pinned = _names(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")
    )
    extras = PROJECT["project"]["optional-dependencies"]
    asked = _names([line for lines in extras.values() for line in lines])
    asked |= _names(PROJECT["project"]["dependencies"]) | _names(PROJECT["build-system"]["requires"])
    assert asked - pinned == {"spkfast"}


def test_base_install_needs_torch_and_numpy_alone():
    assert _names(PROJECT["project"]["dependencies"]) == {"torch", "numpy"}


def test_only_ops_and_backends_touch_the_extension():
    allowed = {ROOT / "spkfast" / "backends.py", ROOT / "spkfast" / "export" / "plugins.py"}
    allowed |= set((ROOT / "spkfast" / "ops").glob("*.py"))
    extension = ("torch.ops.spkfast", "spkfast._C", "spkfast.kernels")
    touching = {path for path in SOURCES if any(name.startswith(extension) for name in _touched(path))}
    assert touching - allowed == set()
    assert touching, "nothing touches the extension: this test looks for the wrong names"


@pytest.mark.parametrize("folder", ["spkfast", "kernels"])
def test_installed_code_imports_no_development_code(folder):
    foreign = ("spkfast",) if folder == "kernels" else ()
    for path in (path for path in SOURCES if path.is_relative_to(ROOT / folder)):
        roots = {name.split(".")[0] for name in _imported(path)}
        assert roots.isdisjoint({"benchmarks", "tests", "examples", "tools", *foreign}), path


@pytest.mark.parametrize("op", OPS)
def test_op_has_the_same_name_everywhere(op):
    files = [
        f"spkfast/reference/{op}.py",
        f"csrc/cpu/{op}.cpp",
        f"tests/ops/test_{op}.py",
        f"docs/ops/{op}.md",
    ]
    if op in CPU_ALONE:
        files += ["benchmarks/data/bench_augmentation.py"]
    elif op in SCORING:
        files += ["benchmarks/evaluation/bench_scoring.py"]
    else:
        files += [f"kernels/triton/{op}.py", f"benchmarks/ops/bench_{op.removesuffix('_loss')}.py"]
    if op not in TRITON_ALONE | CPU_ALONE | SCORING:
        files += [f"csrc/cuda/{op}.cpp", f"kernels/cuda/{op}.cuh", f"kernels/cuda/{op}.cu"]
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert f'"{op}(' in (ROOT / "csrc" / "library.cpp").read_text()
    assert f"ops/{op}.md" in (ROOT / "mkdocs.yml").read_text()


def test_version_is_that_of_the_changelog():
    version = re.search(r'^__version__ = "([^"]+)"', (ROOT / "spkfast" / "__init__.py").read_text(), re.M)[1]
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert not headings[1:] or headings[1] == version


def test_no_folder_of_tests_is_left_out(pytestconfig):
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    patterns = pytestconfig.getini("norecursedirs")
    assert not [f for f in folders for part in f.parts for pattern in patterns if fnmatch.fnmatch(part, pattern)]
