"""The command ``export``: a model as an ONNX file, a TensorRT engine, a model of Triton's, or a compiled package."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spkfast.cli.common import (
    MODEL_HELP,
    PRECISIONS,
    BadFiles,
    Parser,
    add_json,
    print_result,
    progress,
)
from spkfast.cli.embed import INPUTS_HELP, collect
from spkfast.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from spkfast.export import Profile
    from spkfast.inference import SpeakerEncoder

HELP = "a model for other runtimes: ONNX, TensorRT, Triton Inference Server, AOTInductor"

# Those of spkfast.export, which loads torch.
INPUTS = ("waveform", "features")
LAYOUTS = ("padded", "equal", "ragged")
TARGETS = ("cpu", "tensorrt")
FORMS = ("conv", "matmul")
OPSETS = range(18, 26)  # what the exporter writes without converting
BACKENDS = ("onnxruntime", "tensorrt")
HARDWARE = ("none", "same_compute_capability", "ampere_plus")


def main(argv: list[str]) -> None:
    """Runs ``spkfast export``."""
    if argv and argv[0] in _KINDS:
        return _KINDS[argv[0]](argv[1:])
    parser = Parser("export", HELP)
    parser.add_argument("kind", choices=tuple(_KINDS), help="'spkfast export KIND --help' lists its options")
    parser.add_argument("model", metavar="MODEL", help="what is there")
    parser.add_argument("out", metavar="OUT", help="what is made")
    parser.parse_args(argv)


def _onnx(argv: list[str]) -> None:
    parser = Parser("export onnx", "one ONNX file with front-end and network, and how near it is to the model")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="file to write, .onnx")
    parser.add_argument("--inputs", choices=INPUTS, default="waveform", help="what the graph takes [waveform]")
    _add_precision(parser, PRECISIONS)
    _add_calibration(parser)
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="of a batch: padded rows with their lengths; rows of equal length; waveforms one after the other "
        "[waveforms padded, features equal]",
    )
    parser.add_argument("--target", choices=TARGETS, default="cpu", help="who runs int8 [cpu]")
    parser.add_argument("--form", choices=FORMS, default="conv", help="of the products of the front-end [conv]")
    parser.add_argument(
        "--opset", type=int, choices=OPSETS, metavar="N", help="ONNX operator set, 18 to 25, bf16 from 22 [18, 22]"
    )
    parser.add_argument("--language", default="unknown", metavar="L", help="of the training data [unknown]")
    _add_no_validate(parser, "run onnxruntime beside the model")
    parser.add_argument("--types", action="store_true", help="print the type of every tensor")
    add_json(parser)
    args = parser.parse_args(argv)
    _check_suffix(args.out, ".onnx")
    _check_calibration(args)
    if args.precision == "bf16" and args.opset is not None and args.opset < 22:
        raise InputError(f"--opset must be 22 at least for bf16, whose convolutions are since then, got {args.opset}")

    from spkfast.export import to_onnx

    encoder = _load(args.model)
    report = to_onnx(
        encoder,
        args.out,
        inputs=args.inputs,
        precision=args.precision,
        calibration=_calibration(encoder, args),
        layout=args.layout,
        target=args.target,
        form=args.form,
        opset=args.opset,
        language=args.language,
        validate=args.validate,
    )
    parity = _parity(report.metadata["precision"], report.max_error, report.min_cosine)
    size = report.path.stat().st_size
    result = dataclasses.asdict(report) | {"path": args.out, "bytes": size, "within_bounds": parity.met}
    if not args.types:
        del result["types"]
    types = Counter(report.types.values())
    shown: dict[str, Any] = {
        "written to": args.out,
        "bytes": size,
        "inputs": _signature(report.inputs),
        "output": _signature(report.outputs),
        "precision": report.metadata["precision"],
        "operator set": report.opset,
        "nodes": f"{sum(report.operators.values())} of {len(report.operators)} operators",
        "tensors": ", ".join(f"{count} {kind}" for kind, count in types.most_common()),
        "TensorRT would refuse": _grouped(report.unsupported) or "nothing, by its operator table",
        "compared with the model": parity.shown(len(report.checked)) or "no",
    }
    if args.types:
        shown["types"] = [{"tensor": name, "type": kind} for name, kind in report.types.items()]
    print_result(result, args.json, shown=shown)
    parity.check(args.out)


def _tensorrt(argv: list[str]) -> None:
    parser = Parser("export tensorrt", "an engine for the GPU of this machine, compared with onnxruntime")
    parser.add_argument("model", metavar="MODEL", help="file of 'spkfast export onnx'; int8 with --target tensorrt")
    parser.add_argument("out", metavar="ENGINE", help="file to write, .engine or .plan; its facts lie beside it, .json")
    parser.add_argument(
        "--profile",
        action="append",
        metavar="BATCH:SECONDS",
        help="range of inputs to have kernels for, each MIN,OPT,MAX or one number; repeatable "
        "[1:0,3,20 and 2,32,64:0,3,20]",
    )
    parser.add_argument(
        "--timing-cache",
        metavar="PATH",
        help="folder that keeps what was measured for later builds; with --print-trtexec a file",
    )
    parser.add_argument(
        "--optimization-level", type=int, default=3, metavar="N", help="0 to 5: time spent on the search [3]"
    )
    parser.add_argument("--tf32", action="store_true", help="float32 products of ten bits; of features graphs alone")
    parser.add_argument("--exact", action="store_true", help="rows independent of their place in the batch")
    parser.add_argument("--workspace-bytes", type=int, metavar="N", help="most memory of a layer [all of the GPU]")
    parser.add_argument("--version-compatible", action="store_true", help="newer TensorRT may load it; costs speed")
    parser.add_argument(
        "--hardware-compatibility", choices=HARDWARE, default="none", help="other GPUs that may load it [none]"
    )
    parser.add_argument("--reference", metavar="FILE", help="fp32 ONNX file to compare with, where MODEL is bf16")
    parser.add_argument("--device", default="cuda", help="GPU to build on [cuda]")
    _add_no_validate(parser, "compare with onnxruntime")
    parser.add_argument(
        "--print-trtexec", action="store_true", help="print the command line that builds the same, and build nothing"
    )
    add_json(parser)
    args = parser.parse_args(argv)
    _check_suffix(args.out, ".engine", ".plan")

    from spkfast.export import build_tensorrt, trtexec_command

    profiles = None if args.profile is None else [_profile(text) for text in args.profile]
    settings = {
        "tf32": args.tf32,
        "exact": args.exact,
        "workspace_bytes": args.workspace_bytes,
        "optimization_level": args.optimization_level,
        "version_compatible": args.version_compatible,
        "hardware_compatibility": args.hardware_compatibility,
    }
    if args.print_trtexec:
        command = trtexec_command(args.model, args.out, profiles, timing_cache_path=args.timing_cache, **settings)
        if args.json:
            print_result({"trtexec": command}, as_json=True)
        else:
            print(shlex.join(command))
        return
    report = build_tensorrt(
        args.model,
        args.out,
        profiles=profiles,
        timing_cache=args.timing_cache,
        validate=args.validate,
        reference=args.reference,
        device=args.device,
        **settings,
    )
    result = dataclasses.asdict(report) | {
        "engine_path": args.out,
        "timing_cache": None if report.timing_cache is None else str(report.timing_cache),
    }
    shown = {
        "written to": args.out,
        "bytes": report.engine_bytes,
        "seconds": report.build_seconds,
        "timings": result["timing_cache"],
        "precision": report.facts["precision"],
        "machine": report.facts["machine"],
        "compared with onnxruntime": [
            {
                "rows": len(row.lengths),
                "longest": max(row.lengths),
                "relative error": f"{row.relative_error:.1e}",
                "cosine": f"{row.cosine:.7f}",
            }
            for row in report.parity
        ]
        or "no",
    }
    print_result(result, args.json, shown=shown)


def _triton_server(argv: list[str]) -> None:
    parser = Parser("export triton-server", "a model, or its next version, in a repository of Triton Inference Server")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="FOLDER", help="the repository; made where it is missing")
    parser.add_argument("--name", default="speaker_embedding", help="of the model [speaker_embedding]")
    parser.add_argument("--backend", choices=BACKENDS, default="onnxruntime", help="that runs it [onnxruntime]")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="that it runs on [gpu]")
    parser.add_argument(
        "--engine", nargs="+", metavar="FILE", help="for tensorrt: one of 'export tensorrt' a GPU model"
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="products of the graph; engines have theirs [fp32]")
    _add_calibration(parser)
    parser.add_argument(
        "--layout", choices=LAYOUTS, help="of a batch: requests of any lengths, or of one; engines have theirs [ragged]"
    )
    parser.add_argument("--max-batch-size", type=int, default=64, metavar="N", help="most utterances of a batch [64]")
    parser.add_argument(
        "--max-queue-delay-us", type=int, default=2000, metavar="N", help="longest wait for other requests [2000]"
    )
    parser.add_argument(
        "--preferred-batch-sizes", type=int, nargs="*", default=[8, 16, 32], metavar="N", help="[8 16 32]"
    )
    parser.add_argument("--instances", type=int, default=1, metavar="N", help="copies on each GPU or the CPU [1]")
    parser.add_argument("--gpus", type=int, nargs="*", default=[], metavar="N", help="numbers of GPUs [all]")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of a copy on the CPU [one per core]")
    parser.add_argument(
        "--warmup-seconds", type=float, nargs="*", default=[3.0], metavar="S", help="audio that runs at the start [3]"
    )
    parser.add_argument("--replace", action="store_true", help="take out the versions that are there")
    add_json(parser)
    args = parser.parse_args(argv)
    _check_calibration(args)

    from spkfast.export import triton_repository
    from spkfast.export.triton_server import perf_analyzer_command

    encoder = _load(args.model)
    report = triton_repository(
        encoder,
        args.out,
        name=args.name,
        backend=args.backend,
        device=args.device,
        precision=args.precision,
        layout=args.layout,
        max_batch_size=args.max_batch_size,
        max_queue_delay_us=args.max_queue_delay_us,
        preferred_batch_sizes=args.preferred_batch_sizes,
        instances=args.instances,
        gpus=args.gpus,
        threads=args.threads,
        warmup_seconds=args.warmup_seconds,
        engine=args.engine,
        calibration=_calibration(encoder, args),
        replace=args.replace,
    )
    parity = _parity(report.config.metadata["precision"], report.max_error, report.min_cosine)
    measure = perf_analyzer_command(report.config)
    result = dataclasses.asdict(report) | {
        "folder": str(report.folder),
        "files": [str(path) for path in report.files],
        "within_bounds": parity.met,
        "perf_analyzer": measure,
    }
    shown = {
        "written to": str(report.folder),
        "version": report.version,
        "files": [str(path.relative_to(report.folder)) for path in report.files],
        "backend": f"{report.config.backend} on {report.config.device}",
        "precision": report.config.metadata["precision"],
        "layout": report.config.layout,
        "to measure": measure,
        "compared with the model": parity.shown() or "no",
    }
    print_result(result, args.json, shown=shown)
    parity.check(str(report.folder))


def _aotinductor(argv: list[str]) -> None:
    parser = Parser("export aotinductor", "a compiled package that needs libtorch alone, for one kind of device")
    parser.epilog = "A package is code, which runs when it is loaded: load only what you trust."
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="file to write, .pt2")
    parser.add_argument("--inputs", choices=INPUTS, default="waveform", help="what the package takes [waveform]")
    _add_precision(parser, PRECISIONS[:3])
    parser.add_argument(
        "--layout",
        choices=LAYOUTS[:2],
        default="padded",
        help="of a batch: padded rows with their lengths, or rows of equal length [padded]",
    )
    parser.add_argument("--device", default="auto", help="cpu, or cuda, which auto takes where it is there [auto]")
    parser.add_argument("--max-batch", type=int, default=64, metavar="N", help="most rows [64]")
    parser.add_argument("--max-seconds", type=float, default=20.0, metavar="S", help="longest row [20]")
    parser.add_argument("--max-autotune", action="store_true", help="time more kernels while compiling")
    _add_no_validate(parser, "run the package beside the model")
    add_json(parser)
    args = parser.parse_args(argv)

    from spkfast.export import to_aotinductor

    report = to_aotinductor(
        _load(args.model, args.device),
        args.out,
        inputs=args.inputs,
        precision=args.precision,
        layout=args.layout,
        max_batch=args.max_batch,
        max_seconds=args.max_seconds,
        settings={"max_autotune": args.max_autotune},
        validate=args.validate,
    )
    parity = _parity(args.precision, report.max_error, report.min_cosine)
    size = report.path.stat().st_size
    result = dataclasses.asdict(report) | {
        "path": args.out,
        "bytes": size,
        "device": str(report.device),
        "within_bounds": parity.met,
    }
    shown = {
        "written to": args.out,
        "bytes": size,
        "inputs": report.inputs,
        "device": str(report.device),
        "precision": args.precision,
        "seconds": report.compile_seconds,
        "compared with the model": parity.shown(len(report.checked)) or "no",
    }
    print_result(result, args.json, shown=shown)
    parity.check(args.out)


_KINDS = {"onnx": _onnx, "tensorrt": _tensorrt, "triton-server": _triton_server, "aotinductor": _aotinductor}


@dataclasses.dataclass(frozen=True)
class _Parity:
    """How near an export is to its model, and how near its precision must be: ``max_error`` or ``min_cosine``."""

    precision: str
    max_error: float | None
    min_cosine: float | None
    name: str
    bound: float

    @property
    def value(self) -> float | None:
        """What is bounded."""
        return self.max_error if self.name == "max_error" else self.min_cosine

    @property
    def met(self) -> bool | None:
        """Whether the bound is met; None where nothing was compared."""
        from spkfast.export.parity import within_bounds

        return within_bounds(self.precision, self.max_error, self.min_cosine)

    @property
    def promise(self) -> str:
        """The bound in words."""
        return (
            f"relative error at most {self.bound:g}" if self.name == "max_error" else f"cosine at least {self.bound:g}"
        )

    def shown(self, batches: int | None = None) -> dict[str, Any]:
        """The same for people; empty where nothing was compared."""
        if self.max_error is None or self.min_cosine is None:
            return {}
        facts: dict[str, Any] = {} if batches is None else {"batches": batches}
        return facts | {
            "largest relative error": f"{self.max_error:.1e}",
            "smallest cosine": f"{self.min_cosine:.7f}",
            f"{self.precision}: {self.promise}": self.met,
        }

    def check(self, out: str) -> None:
        """Refuses what is out of bounds.

        Raises:
            InputError: If the bound is not met.
        """
        if self.met is False:
            raise InputError(
                f"{out}: is written, but gives other embeddings than the model: {self.precision} promises "
                f"{self.promise}, got {self.value:.6g}"
            )


def _parity(precision: str, max_error: float | None, min_cosine: float | None) -> _Parity:
    from spkfast.export.parity import BOUNDS

    return _Parity(precision, max_error, min_cosine, *BOUNDS[precision])


def _add_precision(parser: argparse.ArgumentParser, names: tuple[str, ...]) -> None:
    parser.add_argument("--precision", choices=names, default="fp32", help="products of the network [fp32]")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        nargs="+",
        metavar="AUDIO",
        help=f"for int8, in place of the ranges that 'spkfast calibrate' put into MODEL: {INPUTS_HELP}",
    )
    parser.add_argument(
        "--max-utterances", type=int, default=200, metavar="N", help="most utterances to calibrate on [200]"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice among more utterances [0]")


def _add_no_validate(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--no-validate", dest="validate", action="store_false", help=f"do not {what}")


def _check_suffix(out: str, *suffixes: str) -> None:
    """Refuses a name by which the file would not be known again, such as that of the weights."""
    if Path(out).suffix not in suffixes:
        raise InputError(f"{out}: name a file that ends in {' or '.join(suffixes)}")


def _check_calibration(args: argparse.Namespace) -> None:
    if args.calibration and args.precision != "int8":
        raise InputError(f"--calibration goes with --precision int8, got {args.precision or 'none'}")
    if args.max_utterances < 1 or args.seed < 0:
        raise InputError(
            f"--max-utterances must be at least 1 and --seed at least 0, got {args.max_utterances} and {args.seed}"
        )


def _load(model: str, device: str = "cpu") -> SpeakerEncoder:
    from spkfast.inference import GRAPHS, SpeakerEncoder

    if Path(model).suffix in GRAPHS and Path(model).is_file():
        raise InputError(f"{model}: is an exported graph; name the model that it was made of")
    return SpeakerEncoder.load(model, device=device)


def _calibration(encoder: SpeakerEncoder, args: argparse.Namespace) -> list[np.ndarray] | None:
    """Audio of at most ``--max-utterances`` files, drawn at random; None where none was named."""
    if not args.calibration:
        return None
    import numpy as np

    # One by one: two folders may hold files of the same name.
    files = sorted({path for text in args.calibration for path in collect([text]).values()})
    bad = BadFiles(strict=len(files) == 1)
    utterances: list[np.ndarray] = []
    wanted = min(args.max_utterances, len(files))
    for i in progress(np.random.default_rng(args.seed).permutation(len(files)), wanted, "reading"):
        try:
            utterances.append(encoder.load_audio(files[i]))
        except InputError as error:
            bad.skip(error)
        if len(utterances) == wanted:
            break
    bad.close(len(files))
    return utterances


def _profile(text: str) -> Profile:
    """Of ``BATCH:SECONDS``."""
    from spkfast.export import Profile

    try:
        batch, seconds = text.split(":")
        return Profile(_range(batch, int), _range(seconds, float))
    except InputError as error:
        raise InputError(f"--profile {text}: {error}") from error
    except ValueError as error:
        raise InputError(
            f"--profile {text}: expected BATCH:SECONDS, each MIN,OPT,MAX or one number, such as 1,8,64:0,3,20"
        ) from error


def _range(text: str, kind: type[Any]) -> tuple[Any, Any, Any]:
    numbers = [kind(part) for part in text.split(",")]
    least, common, most = numbers * 3 if len(numbers) == 1 else numbers
    return least, common, most


def _signature(tensors: dict[str, tuple[str, tuple[int | str, ...]]]) -> str:
    return ", ".join(f"{name} {kind} ({', '.join(map(str, shape))})" for name, (kind, shape) in tensors.items())


def _grouped(lines: tuple[str, ...]) -> list[dict[str, Any]]:
    """How many nodes of an operator are refused for a reason; a line is ``operator node: reason``."""
    counts = Counter((line.split(" ", 1)[0], line.split(": ", 1)[1]) for line in lines)
    return [{"operator": name, "reason": reason, "nodes": count} for (name, reason), count in counts.items()]
