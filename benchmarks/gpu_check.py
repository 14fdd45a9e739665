"""Checks and measures kernels and networks on a machine with an NVIDIA GPU: offline, with torch, triton, pytest, numpy
and nvcc.

``python3 -m benchmarks.gpu_check --ops all --results DIR`` from the root of a checkout, nothing installed. One JSON
file per call; a call stops at its budget, and the next one goes on with what is not yet in DIR. Whole networks follow
the kernels, where all ops are asked for.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import checkout
from benchmarks.gpu_status import FIGURES, ROOT, Kernel, kernels, network_hash
from benchmarks.timing import Figure

# Error of a kernel against the definition in float64, in multiples of the error that the float32 definition makes, or
# of one rounding of the largest value; tests/parity.py has the same rule.
_ERROR_MULTIPLE = 4
# Below this there is no point in starting another kernel.
_LEAST_SECONDS = 15


def main(argv: list[str] | None = None) -> int:
    """Runs what is pending.

    Returns:
        0 when everything asked for has passed, 1 when something failed, 2 when the machine or the arguments do not
        allow the check, 3 when the budget ran out first.
    """
    args = _parse(argv)
    if args.part:
        kind, _, name = args.part.partition(":")
        if kind == "machine":
            _write(args.out, _machine(args.device))
        else:
            _write(args.out, _network(name, args.device) if kind == "network" else _benchmark(args.part, args.device))
        return 0
    known = kernels()
    names = sorted({kernel.op for kernel in known})
    asked = names if args.ops.split() in ([], ["all"]) else args.ops.replace(",", " ").split()
    unknown = sorted(set(asked) - set(names))
    if unknown:
        print(f"gpu_check: unknown op {unknown[0]!r}; known: {', '.join(names)}", file=sys.stderr)
        return 2
    return _Check(args, [kernel for kernel in known if kernel.op in asked], networks=asked == names).run()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--ops", default="all", help="op names, separated by spaces or commas, or all")
    parser.add_argument("--results", type=Path, default=Path("gpu-results"), help="folder for the JSON files")
    parser.add_argument("--budget", type=float, default=450, help="seconds after which no further work is begun")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only the plumbing, Triton interpreted"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)  # One piece of work, in a process of its own.
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


class _Check:
    """One call: the pending kernels, and the result file that grows with each that is done."""

    def __init__(self, args: argparse.Namespace, asked: list[Kernel], networks: bool) -> None:
        self.device: str = args.device
        self.folder: Path = args.results
        self.asked = asked
        self.networks = networks
        self.start = time.monotonic()
        self.deadline = self.start + args.budget
        self.tests: dict[str, dict[str, Any]] = {}

    def run(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        machine = self._part("machine")
        if "error" in machine:
            print(f"gpu_check: {machine['error']}", file=sys.stderr)
            return 3 if machine.get("timed_out") else 2
        done = self._done(machine["gpu"])
        pending = [kernel for kernel in self.asked if (kernel.op, kernel.backend, kernel.source_hash()) not in done]
        print(f"{machine['gpu']}: {len(pending)} of {len(self.asked)} kernels to do", flush=True)
        source_hash = network_hash()
        networks = [name for name in FIGURES if self.networks and ("network", name, source_hash) not in done]
        result: dict[str, Any] = {
            "format": 1,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "device": self.device,
            "commit": _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]) or None,
            "machine": machine,
            "build": self._build(machine) if pending or networks else {},
            "kernels": [],
            "models": [],
        }
        path = self.folder / f"{result['created'][:23].replace(':', '')}-{self.device}.json"
        unfinished = False
        for kernel in pending:
            entry = self._kernel(kernel, machine) if self._remaining() > _LEAST_SECONDS else None
            if entry is not None:
                result["kernels"].append(entry)
                result["seconds"] = round(time.monotonic() - self.start, 1)
                _write(path, result)
            unfinished |= entry is None or not entry["finished"]
            print(_summary(kernel, entry), flush=True)
        for name in networks:
            entry = self._of_network(name, source_hash) if self._remaining() > _LEAST_SECONDS else None
            if entry is not None:
                result["models"].append(entry)
                result["seconds"] = round(time.monotonic() - self.start, 1)
                _write(path, result)
            unfinished |= entry is None or not entry["finished"]
            print(_network_summary(name, entry), flush=True)
        if any(entry["failed"] for entry in result["kernels"] + result["models"]):
            return 1
        return 3 if unfinished else 0

    def _done(self, gpu: str) -> set[tuple[str, str, str]]:
        """What an earlier call finished on this kind of machine without a failure: op, backend and source hash, where a
        network is the op ``network`` and its part the backend."""
        results = [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]
        return {
            (entry.get("op", "network"), entry.get("backend", entry.get("name")), entry["source_hash"])
            for result in results
            if (result["device"], result["machine"]["gpu"]) == (self.device, gpu)
            for entry in [*result["kernels"], *result.get("models", [])]
            if entry["finished"] and not entry["failed"]
        }

    def _build(self, machine: dict[str, Any]) -> dict[str, str]:
        """Builds the op libraries in place; returns the outcome of each."""
        if self.device == "cpu":
            return {}
        outcome = {}
        for library in checkout.SOURCES:
            try:
                built = checkout.ensure_built(library, [machine["capability"].replace(".", "")])
                outcome[library] = "built" if built else "up to date"
            except checkout.BuildError as error:
                # The Triton kernels can still be checked.
                outcome[library] = str(error)
                print(f"{library} was not built: {error}", file=sys.stderr)
        return outcome

    def _kernel(self, kernel: Kernel, machine: dict[str, Any]) -> dict[str, Any]:
        """Tests and measurements of one kernel. It is verified where tests that name it passed, none failed or was
        skipped, and every workload was within the bound; on a CPU nothing is ever verified."""
        if kernel.op not in self.tests:
            self.tests[kernel.op] = self._pytest(kernel.op)
        run = self.tests[kernel.op]
        tests = {outcome: _matching(run[outcome], kernel) for outcome in ("passed", "failed", "skipped")}
        measured = self._part(f"{kernel.op}:{kernel.backend}")
        workloads = measured.get("workloads", [])
        for load in workloads:
            if "median_ms" in load:
                load["percent_of_copy"] = 100 * load["gb_s"] / machine["copy_gb_s"]
                load["percent_of_fp32"] = 100 * load["tflop_s"] / machine["matmul_tflop_s"]["fp32"]
        finished = not (run["timed_out"] or measured.get("timed_out", False))
        wrong = bool(tests["failed"]) or not all(load["within_bound"] for load in workloads)
        tested = any(kernel.backend in name for name in tests["passed"]) and not tests["skipped"]
        verified = self.device == "cuda" and finished and tested and bool(workloads) and not wrong
        verified &= not measured.get("error")
        return {
            "op": kernel.op,
            "backend": kernel.backend,
            "source_hash": kernel.source_hash(),
            "finished": finished,
            "verified": verified,
            "failed": wrong or (self.device == "cuda" and finished and not verified),
            "tests": {**{outcome: len(names) for outcome, names in tests.items()}, "failures": tests["failed"]},
            "test_output": "" if verified else run["output"],
            "error": measured.get("error", ""),
            "workloads": workloads,
        }

    def _of_network(self, name: str, source_hash: str) -> dict[str, Any]:
        """Figures of a whole network; for its latency the tests of the graphs too. A missed goal is no failure."""
        tests = self._pytest("cuda_graphs") if name.startswith("latency") else {"failed": [], "timed_out": False}
        measured = self._part(f"network:{name}")
        finished = not (tests["timed_out"] or measured.get("timed_out", False))
        return {
            **measured,
            "name": name,
            "source_hash": source_hash,
            "finished": finished,
            "failed": bool(tests["failed"]) or (finished and bool(measured.get("error"))),
            "failures": tests["failed"],
            "error": measured.get("error", ""),
        }

    def _pytest(self, op: str) -> dict[str, Any]:
        """Runs the GPU tests of an op or a module; names of the tests by outcome."""
        require = {"SPKFAST_REQUIRE": "cuda,triton"} if self.device == "cuda" else {}
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            command = ["-m", "pytest", "-p", "benchmarks.checkout", "-p", "no:cacheprovider", "-q", "-m", "gpu"]
            files = [f"tests/{name}.py" for name in (f"ops/test_{op}", f"ops/test_{op}_triton", f"nn/test_{op}")]
            command += [f"--junitxml={report}", *(file for file in files if (ROOT / file).exists())]
            code, output = self._run(command, require)
            outcomes: dict[str, Any] = {"passed": [], "failed": [], "skipped": []}
            if report.exists():
                for case in ElementTree.parse(report).iter("testcase"):
                    tags = {child.tag for child in case}
                    bad = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
                    outcomes[bad].append(case.get("name", ""))
            elif code is not None:
                outcomes["failed"].append(f"pytest ended with status {code} and no report")
        return {**outcomes, "timed_out": code is None, "output": output[-4000:]}

    def _part(self, part: str) -> dict[str, Any]:
        """One piece of work in a process of its own: a kernel that brings its process down costs only itself."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "part.json")
            command = ["-m", "benchmarks.gpu_check", "--part", part, "--device", self.device, "--out", str(out)]
            code, output = self._run(command, {})
            if out.exists():
                return dict(json.loads(out.read_text()))
        if code is None:
            return {"timed_out": True, "error": "out of time"}
        return {"error": f"{part} ended with status {code}: {output[-2000:]}"}

    def _run(self, command: list[str], variables: dict[str, str]) -> tuple[int | None, str]:
        """Exit status and output; the status is None where the time ran out."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, **variables}
        environment.pop("TRITON_INTERPRET", None)
        if self.device == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        try:
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, text=True, timeout=max(1, self._remaining()),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None, ""
        return done.returncode, done.stdout

    def _remaining(self) -> float:
        return self.deadline - time.monotonic()


def _matching(names: list[str], kernel: Kernel) -> list[str]:
    """Tests that speak of this backend, or of none."""
    others = {"native", "triton"} - {kernel.backend}
    return [name for name in names if not any(other in name for other in others)]


def _summary(kernel: Kernel, entry: dict[str, Any] | None) -> str:
    label = f"{kernel.op} {kernel.backend}:"
    if entry is None:
        return f"{label} left for the next call"
    tests = ", ".join(f"{entry['tests'][outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    lines = [f"{label} {'verified' if entry['verified'] else 'NOT verified'}; tests: {tests}"]
    if entry["error"]:
        lines.append(f"  {entry['error']}")
    for load in entry["workloads"]:
        line = f"  {load['name']}: error {load['max_abs_error']:.2e} (float32 definition {load['own_error']:.2e})"
        if "median_ms" in load:
            line += f", {load['median_ms']:.3f} ms, {load['gb_s']:.1f} GB/s, {load['tflop_s']:.3f} TFLOP/s"
        for name, peer_ms in load.get("peers_ms", {}).items():
            line += f", {peer_ms / load['median_ms']:.2f}x {name}"
        lines.append(line)
    return "\n".join(lines)


def _network_summary(name: str, entry: dict[str, Any] | None) -> str:
    if entry is None:
        return f"{name}: left for the next call"
    lines = [f"{name}: {'measured' if entry['finished'] and not entry['failed'] else 'NOT measured'}"]
    lines += [f"  {text}" for text in (*entry["failures"], entry["error"]) if text]
    for key, row in entry.get("contenders", {}).items():
        error = f", relative error {row['relative_error']:.1e}" if "relative_error" in row else ""
        lines.append(f"  {key}: {row['median_ms']:.3f} ms{error}")
    lines += [f"  {key}: absent: {reason}" for key, reason in entry.get("absent", {}).items()]
    for figure in (Figure(**values) for values in entry.get("figures", [])):
        lines.append(
            f"  {figure.name}: {figure.value:.4g} {f'({figure.goal}: {figure.verdict})' if figure.goal else ''}"
        )
    return "\n".join(lines)


# In a process of its own ---------------------------------------------------------------------------------------------


def _machine(device: str) -> dict[str, Any]:
    """Versions, and the ceilings that the kernels are held against."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return {"error": f"torch {torch.__version__} finds no CUDA device; --device cpu runs the plumbing alone"}
    cuda = device == "cuda"
    side = 8192 if cuda else 256
    copied = torch.randn(2**29 if cuda else 2**18, device=device)
    target = torch.empty_like(copied)
    copy_ms = statistics.median(_times(functools.partial(target.copy_, copied), device))
    del target, copied
    matmul = {}
    for name, dtype, tf32 in (
        ("fp32", torch.float32, False), ("tf32", torch.float32, True), ("bf16", torch.bfloat16, False),
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        matmul[name] = 2 * side**3 / statistics.median(_times(functools.partial(torch.matmul, a, b), device)) / 1e9
    properties = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "gpu": properties.name if properties else "none",
        "capability": f"{properties.major}.{properties.minor}" if properties else "none",
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if cuda else "none",
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "nvcc": _output([nvcc, "--version"]).splitlines()[-1] if (nvcc := checkout.find_nvcc()) else "none",
        "copy_gb_s": 2 * 4 * (2**29 if cuda else 2**18) / copy_ms / 1e6,
        "matmul_tflop_s": matmul,
    }


def _benchmark(part: str, device_name: str) -> dict[str, Any]:
    """Parity, then time, of one kernel on every workload; nothing is timed that is not right."""
    import torch

    op, backend = part.split(":")
    cases = importlib.import_module(f"benchmarks.gpu.{op}").cases
    device, cuda = torch.device(device_name), device_name == "cuda"
    workloads = []
    for case in cases(device):
        expected = case.definition(torch.float64)
        own_error = (case.definition(torch.float32) - expected).abs().max().item()
        rounding = torch.finfo(torch.float32).eps * expected.abs().max().item()
        try:
            error = (case.run(backend) - expected).abs().max().item()
        except ValueError as problem:  # This backend does not exist here; the message says why.
            return {"error": str(problem), "workloads": workloads}
        load: dict[str, Any] = {
            "name": case.name,
            "max_abs_error": error,
            "own_error": own_error,
            "within_bound": error <= _ERROR_MULTIPLE * max(own_error, rounding),  # False for NaN
        }
        del expected
        workloads.append(load)
        if not load["within_bound"]:
            continue
        if cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            case.run(backend)
            load["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        times = _times(functools.partial(case.run, backend), device_name)
        median = statistics.median(times)
        gb_s, tflop_s = case.bytes_moved / median / 1e6, case.flops / median / 1e9
        load |= {"median_ms": median, "min_ms": min(times), "max_ms": max(times), "repeats": len(times)}
        load |= {"gb_s": gb_s, "tflop_s": tflop_s}
        if cuda:
            load |= _graph_time(functools.partial(case.run, backend))
        if case.peers:
            load["peers_ms"] = {name: statistics.median(_times(peer, device_name)) for name, peer in case.peers.items()}
    return {"workloads": workloads}


def _network(name: str, device: str) -> dict[str, Any]:
    from benchmarks.data import bench_augmentation_gpu
    from benchmarks.models import bench_ecapa_gpu, bench_latency_gpu, bench_training_gpu

    modules = (bench_ecapa_gpu, bench_augmentation_gpu, bench_latency_gpu, bench_training_gpu)
    measure: Callable[[str, str], dict[str, Any]] = next(one.measure for one in modules if name in one.PARTS)
    return measure(name, device)


def _graph_time(run: Callable[[], object]) -> dict[str, Any]:
    """Median time of the call replayed from a CUDA graph, without the launches; or why it cannot be captured."""
    import torch

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as problem:
        return {"graph_error": str(problem).splitlines()[0]}
    return {"graph_median_ms": statistics.median(_times(graph.replay, "cuda"))}


def _times(run: Callable[[], object], device: str, warm_up: int = 3, repeats: int = 20) -> list[float]:
    """Milliseconds of each call, on a GPU by its own clock and with the L2 cache overwritten before each."""
    import torch

    times = []
    if device == "cpu":
        for _ in range(2):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    for _ in range(warm_up):
        run()
    flush = torch.empty(2**28, dtype=torch.int8, device=device)
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def _triton_version() -> str:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return "none"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _write(path: Path, value: dict[str, Any]) -> None:
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(value, indent=1) + "\n")
    fresh.replace(path)


if __name__ == "__main__":
    sys.exit(main())
