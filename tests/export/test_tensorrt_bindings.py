"""Every name of TensorRT that the code uses, against the real Python bindings of the oldest and newest versions.

The bindings are importable without TensorRT: three empty libraries take the place of the real ones.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from spkfast.export import tensorrt, tensorrt_graph
from spkfast.export.tensorrt_plan import OLDEST_TENSORRT, HardwareCompatibility, plan_build, read_onnx, version_of
from tests.fixtures import tensorrt_double, tensorrt_graphs

FOLDER = Path(os.environ.get("SPKFAST_TENSORRT_BINDINGS", Path(__file__).parents[2] / "build" / "tensorrt"))
# What the code calls an object of each class, with or without a leading underscore.
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "config": "IBuilderConfig",
    "optimization": "IOptimizationProfile",
    "cache": "ITimingCache",
    "host": "IHostMemory",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
}
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
# Runs with the bindings: prints what is wrong with a list of uses.
CHECK = r"""
import json, re, sys
import tensorrt_bindings as trt

def overloads(member):
    # The signatures are in the docstring alone: name(self: X, a: int, b: str = None) -> bool
    for text, returned in re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> (.*)$", member.__doc__ or "", re.M):
        parts = re.split(r", (?=\w+: )", text)
        yield [(p.split(":")[0], " = " in p) for p in parts if not p.startswith("self")], returned

def problem(use):
    kind = getattr(trt, use["class"], None)
    if kind is None:
        return "no such class"
    if use["member"] is None:
        return None
    member = getattr(kind, use["member"], None)
    if member is None:
        return "no such member"
    if isinstance(member, property):
        if use["called"]:
            return "a property, which is called"
        return "cannot be set" if use["set"] and member.fset is None else None
    if use["class"] in ENUMS:
        return None if use["member"] in kind.__members__ else "no member of the enum"
    if not use["called"]:
        return "a method, which is not called"
    fitting = []
    for parameters, returned in overloads(member):
        names = [name for name, _ in parameters]
        given = names[: use["positional"]] + use["keywords"]
        needed = {name for name, optional in parameters if not optional}
        if use["positional"] <= len(names) and needed <= set(given) <= set(names) and len(given) == len(set(given)):
            fitting.append(returned)
    if not fitting:
        return f"no overload takes {use['positional']} arguments and {use['keywords']}"
    if use["checked"] is not None and any((returned == "bool") > use["checked"] for returned in fitting):
        return "gives a bool, which is not looked at"
    return None

uses = json.load(sys.stdin)
ENUMS = {name for name in dir(trt) if hasattr(getattr(trt, name), "__members__")}
found = [(use, problem(use)) for use in uses]

# What subclasses and exceptions rely on.
class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, msg):
        pass

complaints = []
for kind in (trt.Builder, trt.Runtime):
    try:
        kind(Log())
    except TypeError as error:
        complaints.append(str(error))
json.dump({
    "version": trt.__version__,
    "problems": [f"{use['class']}.{use['member']}: {text}" for use, text in found if text],
    "complaints": complaints,
    "severities": list(trt.ILogger.Severity.__members__),
    "typed": int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
}, sys.stdout)
"""


def uses_of(source: str) -> Iterator[dict[str, Any]]:
    """Classes and members of TensorRT in source code, with how each is used."""
    tree = ast.parse(source)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    checked = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ensure":
            checked |= {id(inner) for inner in ast.walk(node.args[0])}
        if isinstance(node, ast.If | ast.IfExp):
            checked |= {id(inner) for inner in ast.walk(node.test)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        base = node.value
        name = base.attr if isinstance(base, ast.Attribute) else base.id if isinstance(base, ast.Name) else ""
        if name == "trt" and node.attr != "__version__":
            call = called.get(id(node))
            yield use(node.attr, "__init__" if call else None, call)
        elif isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name) and base.value.id == "trt":
            call = called.get(id(node))
            if node.attr != "__init__":
                yield use(name, node.attr, call)
        elif name.lstrip("_") in CLASSES:
            call = called.get(id(node))
            answer = None if call is None else id(call) in checked
            assigned = isinstance(node.ctx, ast.Store)
            yield use(CLASSES[name.lstrip("_")], node.attr, call, checked=answer, assigned=assigned)


def use(
    kind: str,
    member: str | None = None,
    call: ast.Call | None = None,
    checked: bool | None = None,
    assigned: bool = False,
) -> dict[str, Any]:
    keywords = [str(keyword.arg) for keyword in call.keywords] if call else []
    return {
        "class": kind, "member": member, "called": call is not None, "set": assigned, "checked": checked,
        "positional": len(call.args) if call else 0, "keywords": keywords,
    }  # fmt: skip


def chosen_by_name(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Members that the code takes by getattr: flags, levels of compatibility, types of tensors."""
    info, _ = read_onnx(tensorrt_graphs.write(tmp_path / "model.onnx", "features"))
    for asked in (False, True):
        plan = plan_build(info, tf32=asked, exact=asked, version_compatible=asked)
        yield from (use("BuilderFlag", flag) for flag in plan.set_flags + plan.clear_flags)
    yield from (use("HardwareCompatibilityLevel", level.upper()) for level in get_args(HardwareCompatibility))
    yield from (use("DataType", kind) for kind in tensorrt_graph._DTYPES)


def of_double(major: int) -> Iterator[dict[str, Any]]:
    """Enums and methods of the double of the other tests, with the most arguments that each takes."""
    double = tensorrt_double.Double(major)
    for kind, value in vars(double).items():
        if not isinstance(value, type) or kind == "ILogger":
            continue
        members = getattr(value, "__members__", None)
        if members is not None:
            yield from (use(kind, name) for name in members)
            continue
        for name, member in vars(value).items():
            if not name.startswith("_") and callable(member):
                names = member.__code__.co_varnames[1 : member.__code__.co_argcount]
                yield {**use(kind, name), "called": True, "keywords": list(names)}
            elif isinstance(member, property):
                yield use(kind, name)


SOURCES = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (tensorrt, tensorrt_graph)]


@pytest.fixture(scope="session")
def check(
    tmp_path_factory: pytest.TempPathFactory, require: Callable[[str, bool, str], None]
) -> Callable[[str, list[dict[str, Any]]], dict[str, Any]]:
    """Looks at uses in a process that has the bindings of a version."""
    compiler = shutil.which("cc")
    require("tensorrt-bindings", compiler is not None, "no C compiler for the empty libraries")
    folder = tmp_path_factory.mktemp("libraries")
    source = folder / "empty.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))

    def run(version: str, uses: list[dict[str, Any]]) -> dict[str, Any]:
        major, libraries = version.split(".")[0], folder / version
        if not libraries.is_dir():
            libraries.mkdir()
            for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
                library = f"lib{name}.so.{major}"
                command = [str(compiler), "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(libraries / library)]
                subprocess.run([*command, str(source)], check=True)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(FOLDER / version)}
        done = subprocess.run(
            [sys.executable, "-c", CHECK], input=json.dumps(uses), env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run


def versions() -> list[str]:
    return sorted((path.name for path in FOLDER.glob("[0-9]*")), key=version_of)


@pytest.fixture(params=[10, 11])
def version(request: pytest.FixtureRequest, require: Callable[[str, bool, str], None]) -> list[str]:
    """The versions of a major one that are installed."""
    found = [name for name in versions() if version_of(name)[0] == request.param]
    reason = f"no bindings of TensorRT {request.param} in {FOLDER}: tools/install_tensorrt_bindings.sh PYTHON"
    require("tensorrt-bindings", bool(found), reason)
    return found


def test_the_bindings_have_all_that_is_used(version: list[str], check: Any, tmp_path: Path) -> None:
    uses = [use for source in SOURCES for use in uses_of(source)] + list(chosen_by_name(tmp_path))
    # An object of another name would be overlooked: of each class something is used.
    assert {found["class"] for found in uses} >= set(CLASSES.values()) - {"INetworkDefinition", "IHostMemory"}
    for name in version:
        found = check(name, uses)
        assert found["version"] == name and found["problems"] == []
        # As it is told where there is no driver.
        assert ["nullptr" in complaint for complaint in found["complaints"]] == [True, True]
        assert {"INTERNAL_ERROR", "ERROR", "WARNING", "INFO"} < set(found["severities"])


def test_the_oldest_version_is_among_them(require: Callable[[str, bool, str], None]) -> None:
    require("tensorrt-bindings", bool(versions()), f"no bindings of TensorRT in {FOLDER}")
    assert version_of(versions()[0])[:2] == OLDEST_TENSORRT


def test_the_double_is_like_the_bindings(version: list[str], check: Any) -> None:
    major = version_of(version[0])[0]
    for name in version:
        found = check(name, list(of_double(major)))
        # Flags for weak typing exist in 10.x alone, and numbers moved.
        assert found["problems"] == [] and found["typed"] == tensorrt_double._STRONGLY_TYPED[major]
    other = check(version[-1], list(of_double(21 - major)))["problems"]
    assert other == ([] if major == 10 else ["BuilderFlag.FP16: no such member", "BuilderFlag.INT8: no such member"])


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("builder.build_engine(network, config)", "Builder.build_engine: no such member"),
        ("engine.device_memory_size_v3", "ICudaEngine.device_memory_size_v3: no such member"),
        ("trt.BuilderFlag.TF64", "BuilderFlag.TF64: no such member"),
        ("trt.Bilder(logger)", "Bilder.__init__: no such class"),
        ("trt.OnnxParser(network)", "OnnxParser.__init__: no overload takes 1 arguments"),
        ("engine.num_io_tensors = 1", "ICudaEngine.num_io_tensors: cannot be set"),
        ("engine.num_io_tensors()", "ICudaEngine.num_io_tensors: a property, which is called"),
        ("self._context.infer_shapes", "IExecutionContext.infer_shapes: a method, which is not called"),
        ("context.execute_async_v3(1)", "IExecutionContext.execute_async_v3: gives a bool, which is not looked at"),
        ("ensure(context.execute_async_v3(), '')", "IExecutionContext.execute_async_v3: no overload takes 0 arguments"),
        ("optimization.set_shape(1, minimum=2, opt=3, max=4)", "IOptimizationProfile.set_shape: no overload takes 1"),
        ("ensure(config.set_timing_cache(1, ignore=2), '')", "IBuilderConfig.set_timing_cache: no overload takes 1"),
    ],
)  # fmt: skip
def test_wrong_uses_are_found(version: list[str], check: Any, code: str, problem: str) -> None:
    problems = check(version[-1], list(uses_of(code)))["problems"]
    assert len(problems) == 1 and problems[0].startswith(problem)
