"""ONNX files of speaker networks: waveform or features in, embedding out, with a report of how exact they are."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from spkfast.errors import InputError, check_name
from spkfast.export.fbank import Form
from spkfast.export.graph import EmbeddingGraph, Inputs, RaggedGraph, plain_operators
from spkfast.export.onnx_checks import operators_of, sensitive_in_half, types_of, unsupported_by_tensorrt
from spkfast.export.onnx_edit import TARGETS, Target, emulated, quantise, tidy
from spkfast.export.parity import exact_encoder, model_hash, voice, within_bounds
from spkfast.frontends import FrontendSpec
from spkfast.inference import SpeakerEncoder
from spkfast.nn.inference import inference_layers, quantised_inputs, range_of
from spkfast.ops._packing import Range
from spkfast.reference import Precision

Layout = Literal["padded", "equal", "ragged"]
LAYOUTS = ("padded", "equal", "ragged")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
# The oldest that the exporter writes without converting, which old runtimes read; bfloat16 has convolutions since 22.
_OPSET, _OPSET_BF16, _NEWEST_OPSET = 18, 22, 25
# Of an utterance, as SpeakerEncoder.calibrate takes it.
_CALIBRATION_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class OnnxReport:
    """What :func:`to_onnx` wrote.

    Attributes:
        path: The file.
        opset: ONNX operator set.
        inputs: Type and shape of each input; a letter is a size that each call chooses.
        outputs: The same of the outputs.
        metadata: What the file says of itself.
        types: Type of every tensor inside.
        operators: How many nodes of each operator there are.
        unsupported: Why TensorRT's parser would refuse the graph, by its operator table; empty where it would not.
        checked: Batches that onnxruntime ran beside PyTorch: samples (frames) of each row.
        max_error: Largest ``|onnx - torch| / |torch|`` of an embedding, PyTorch at float32; None where onnxruntime is
            not installed.
        min_cosine: Smallest cosine of the two.
    """

    path: Path
    opset: int
    inputs: dict[str, tuple[str, tuple[int | str, ...]]]
    outputs: dict[str, tuple[str, tuple[int | str, ...]]]
    metadata: dict[str, str]
    types: dict[str, str]
    operators: dict[str, int]
    unsupported: tuple[str, ...]
    checked: tuple[tuple[int, ...], ...]
    max_error: float | None
    min_cosine: float | None

    @property
    def within_bounds(self) -> bool | None:
        """Whether the error is as small as the precision promises; None where it is not known."""
        return within_bounds(self.metadata["precision"], self.max_error, self.min_cosine)


def to_onnx(
    encoder: SpeakerEncoder,
    path: str | os.PathLike[str],
    *,
    inputs: Inputs = "waveform",
    precision: Precision = "fp32",
    calibration: Sequence[Any] | None = None,
    layout: Layout | None = None,
    target: Target = "cpu",
    form: Form = "conv",
    opset: int | None = None,
    language: str = "unknown",
    validate: bool = True,
) -> OnnxReport:
    """Writes one ONNX file that holds the network and, where it takes waveforms, its very front-end.

    A graph of waveforms has the inputs ``waveform``, float32 (B, S) in [-1, 1], and ``lengths``, int64 (B,) in samples,
    and the output ``embedding``, float32 (B, E), not normalised. B and S are free; S is at least one frame. A row of a
    padded batch gives what it gives alone, whatever its padding holds. A graph of features has ``feats`` (B, T, M)
    and ``embs``, the names of wespeaker, and no ``lengths`` unless asked for, as sherpa-onnx wants it.

    Precisions other than ``fp32`` are types in the graph: convolutions and what lies between them are in half
    precision, or multiply bytes; front-end, means, variances, softmax over time and embedding layer stay float32.

    Args:
        encoder: Network and front-end.
        path: File to write, whole or not at all.
        inputs: ``waveform`` or ``features``.
        precision: ``fp32``, ``fp16``, ``bf16``, ``int8``.
        calibration: Utterances like those to come for ``int8``, some hundred: paths or arrays, see
            :meth:`SpeakerEncoder.calibrate`. None takes the ranges that the model has, which are of the inputs of
            products alone: runtimes on a CPU are faster where those of the outputs are known, too.
        layout: Of a batch: ``padded`` rows with their ``lengths``; rows of ``equal`` length, without that input, which
            makes a smaller graph; or ``ragged``, the waveforms one after the other, for inference servers, see
            :class:`spkfast.export.graph.RaggedGraph`. None: waveforms ``padded``, features ``equal``.
        target: Who runs ``int8``: ``cpu`` (onnxruntime, OpenVINO: unsigned activations) or ``tensorrt`` (signed ones,
            around zero).
        form: Front-end as a ``conv``, or frames gathered and a ``matmul``.
        opset: ONNX operator set; None for 18, with ``bf16`` 22.
        language: What the metadata say of the training data.
        validate: Run onnxruntime beside PyTorch on a few batches, for the report: of synthetic voices and the first
            utterances of the calibration.

    Returns:
        The report.

    Raises:
        InputError: If an argument is another, ``int8`` lacks calibration, the path cannot be written, or a package is
            missing that the export needs.
    """
    check_name("precision", precision, list(PRECISIONS))
    check_name("target", target, list(TARGETS))
    if not isinstance(encoder, SpeakerEncoder):
        raise InputError(f"encoder must be a SpeakerEncoder, as its load() gives it, got a {type(encoder).__name__}")
    if hasattr(encoder.model, "takes_waveforms"):
        raise InputError("the encoder has no weights to export: it is an exported graph itself")
    layout = layout or ("padded" if inputs == "waveform" else "equal")
    check_name("layout", layout, list(LAYOUTS))
    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxscript") is None:
        raise InputError("the export needs the packages 'onnx' and 'onnxscript': pip install 'spkfast[export]'")
    import onnx

    if calibration is not None and precision != "int8":
        raise InputError(f"calibration is for precision 'int8', got {precision!r}")
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(f"{file}: is a folder, or in none that is there; name a file")
    audio = _utterances(encoder, calibration)
    ranges = _ranges(encoder, audio) if precision == "int8" else {}
    least = _OPSET_BF16 if precision == "bf16" else _OPSET
    kind = RaggedGraph if layout == "ragged" else EmbeddingGraph
    opset = least if opset is None else opset
    if not least <= opset <= _NEWEST_OPSET:
        raise InputError(f"opset must be from {least} to {_NEWEST_OPSET} for precision {precision!r}, got {opset}")
    graph = kind(encoder, inputs=inputs, precision="fp32" if precision == "int8" else precision, form=form)
    model = _exported(graph, encoder.frontend, layout, opset)
    tidy(model)
    # The oldest that has the operators, for the sake of old runtimes.
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import))
    if precision == "int8":
        peaks = _peaks(encoder, graph, ranges, audio) if audio and target == "cpu" else {}
        quantise(model, ranges, peaks, target)
    metadata = metadata_of(encoder, graph, precision, layout, target, language)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    types = types_of(model)
    sensitive = sensitive_in_half(model, types)
    if sensitive:
        raise RuntimeError(f"the graph keeps {sensitive[0]} in half precision, and {len(sensitive) - 1} more")
    fresh = file.with_name(f".{file.name}.new-{os.getpid()}")
    try:
        fresh.write_bytes(model.SerializeToString())
        fresh.replace(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}") from error
    finally:
        fresh.unlink(missing_ok=True)
    checked: tuple[tuple[int, ...], ...] = ()
    worst = cosine = None
    if validate and importlib.util.find_spec("onnxruntime") is not None:
        rate = encoder.frontend.sample_rate
        # Synthetic ones always: what was calibrated on silence does well on silence.
        voices = [*audio[:2], *(voice(k, 3 * rate, rate) for k in range(2 if audio else 4))]
        checked, worst, cosine = _compared(encoder, inputs, layout, model, voices)
    return OnnxReport(
        path=file,
        opset=model.opset_import[0].version,
        inputs=_signature(model.graph.input),
        outputs=_signature(model.graph.output),
        metadata=metadata,
        types=types,
        operators=operators_of(model),
        unsupported=tuple(unsupported_by_tensorrt(model, types)),
        checked=checked,
        max_error=worst,
        min_cosine=cosine,
    )


def _utterances(encoder: SpeakerEncoder, calibration: Sequence[Any] | None) -> list[np.ndarray]:
    if calibration is None:
        return []
    if isinstance(calibration, str | os.PathLike) or not len(calibration):
        raise InputError(f"calibration must be a list of utterances, got {calibration!r}")
    most = int(_CALIBRATION_SECONDS * encoder.frontend.sample_rate)
    return [encoder.load_audio(audio)[:most] for audio in calibration]


def _ranges(encoder: SpeakerEncoder, audio: list[np.ndarray]) -> dict[str, Range]:
    """Range of the inputs of each convolution by the name of its weight in the graph."""
    network = encoder.model
    if audio:
        network = copy.deepcopy(network)
        SpeakerEncoder(network, encoder.frontend).calibrate(audio)
    paths = {id(module): name for name, module in network.named_modules()}
    found = {}
    for name, layer in inference_layers(network).items():
        for key, inner in quantised_inputs(layer).items():
            if key not in layer.input_ranges:
                raise InputError(
                    f"precision 'int8' needs calibration: {name} has no range of {key!r}; give audio as calibration "
                    "(--calibration)"
                )
            if id(inner) not in paths:
                raise InputError("precision 'int8' needs a network of spkfast.models")
            found[f"network.{paths[id(inner)]}.conv.weight"] = layer.input_ranges[key]
    if not found:
        raise InputError(f"precision 'int8' needs a network of spkfast.models, got a {type(network).__name__}")
    return found


def _peaks(
    encoder: SpeakerEncoder, graph: EmbeddingGraph, ranges: Iterable[str], audio: list[np.ndarray]
) -> dict[str, float]:
    """Largest output of the ReLU after each of these convolutions, by the name of its weight."""
    peaks: dict[str, float] = {}

    def watcher(name: str) -> Any:
        def watch(_: nn.Module, inputs: Any, output: Tensor) -> None:
            peaks[name] = max(peaks.get(name, 0.0), range_of(output.relu().flatten())[1])

        return watch

    names = [name.removesuffix(".weight") for name in ranges]
    handles = [graph.get_submodule(name).register_forward_hook(watcher(f"{name}.weight")) for name in names]
    with torch.inference_mode():
        for waveform in audio:
            features, _ = encoder._features([waveform], "auto")
            graph.network(features.float().cpu())
    for handle in handles:
        handle.remove()
    return peaks


def _exported(graph: EmbeddingGraph, spec: FrontendSpec, layout: Layout, opset: int) -> Any:
    """The graph as ONNX, with free sizes."""
    # No batch of one, and no two sizes alike: the exporter would take them for constants.
    size = graph.min_size + 97 * (1 if graph.frontend is None else spec.frame_shift) + 6
    rows = torch.tensor([size, size // 2 + 1, size // 3 + 1])
    batch = torch.export.Dim("B", min=1)
    signal, letter = ("feats", "T") if graph.frontend is None else ("waveform", "S")
    # A hop more than the least, since torch.export takes sizes of 1 for constants; ONNX keeps no such bound.
    free = torch.export.Dim(letter, min=graph.min_size + (1 if graph.frontend is None else spec.frame_shift))
    example: tuple[Tensor, ...]
    if layout == "ragged":
        example = torch.randn(int(rows.sum())), rows.int(), torch.zeros(size)
        names = ["waveform", "lengths", "longest"]
        axes: list[dict[int, Any]] = [{0: torch.export.Dim("N")}, {0: batch}, {0: free}]
    else:
        shape = (len(rows), size) if graph.frontend is not None else (len(rows), size, spec.output_size)
        example, names, axes = (torch.randn(shape), rows), [signal, "lengths"], [{0: batch, 1: free}, {0: batch}]
        if layout == "equal":
            example, names, axes = example[:1], names[:1], axes[:1]
    with plain_operators(), quiet():
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            dynamic_shapes=tuple(axes),
            opset_version=opset,
            input_names=names,
            output_names=["embs" if graph.frontend is None else "embedding"],
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for value, free_axes in zip(model.graph.input, axes, strict=True):
        fixed = [axis for axis in free_axes if not value.type.tensor_type.shape.dim[axis].dim_param]
        if fixed:
            raise RuntimeError(f"the exporter made axis {fixed[0]} of {value.name} a constant")
    return model


def metadata_of(
    encoder: SpeakerEncoder, graph: EmbeddingGraph, precision: str, layout: str, target: str, language: str
) -> dict[str, str]:
    """What an exported file says of itself, sherpa-onnx's keys too where it can run it."""
    from spkfast import __version__

    spec = encoder.frontend
    facts = {
        "spkfast_version": __version__,
        "inputs": graph.inputs,
        "layout": layout,
        "precision": precision,
        "frontend": json.dumps(spec.to_dict(), sort_keys=True),
        "spec_hash": spec.hash,
        "sample_rate": str(spec.sample_rate),
        "min_samples": str(spec.frame_length),
        "model_hash": model_hash(encoder),
        "language": language,
    }
    size = getattr(encoder.model, "embedding_dim", None)
    if size is not None:
        facts |= {"embedding_dim": str(size), "output_dim": str(size)}
    if encoder.threshold is not None:
        facts["threshold"] = json.dumps(encoder.threshold._asdict())
    if precision == "int8":
        facts["target"] = target
    if graph.frontend is None and layout == "equal" and _is_kaldi(spec):
        scaled = spec.sample_scale != 1
        facts |= {
            "framework": "wespeaker" if scaled else "3d-speaker",
            "normalize_samples": "0" if scaled else "1",
            "feature_normalize_type": "global-mean" if spec.mean_norm else "",
        }
    return facts


def _is_kaldi(spec: FrontendSpec) -> bool:
    """Whether sherpa-onnx has features of this kind: Kaldi's, to the window and the edges of filters and signal."""
    kaldi = FrontendSpec(sample_rate=spec.sample_rate)
    names = (
        "waveform_norm", "preemphasis", "preemphasis_mode", "remove_dc", "frame_length_ms", "frame_shift_ms",
        "round_to_power_of_two", "center", "power", "mel_scale", "mel_norm", "use_energy", "num_ceps", "log",
        "std_norm", "top_db",
    )  # fmt: skip
    return spec.n_mels == 80 and all(getattr(spec, name) == getattr(kaldi, name) for name in names)


def _signature(values: Any) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    import onnx

    found = {}
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        found[value.name] = (onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape)
    return found


def session(model: Any, *, exact: bool = False, threads: int = 1) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        model: The model, or the path of its file.
        exact: Run the graph as it stands, without optimisations.
        threads: Of one operator; 0 takes one per core.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if exact:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = os.fspath(model) if isinstance(model, str | os.PathLike) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def feed(signal: Tensor, lengths: Tensor, inputs: Inputs, layout: Layout) -> dict[str, np.ndarray]:
    """What a graph of this kind is called with, for a padded batch."""
    name = "waveform" if inputs == "waveform" else "feats"
    if layout == "ragged":
        flat = torch.cat([row[:length] for row, length in zip(signal, lengths.tolist(), strict=True)])
        longest = np.zeros(signal.shape[1], np.float32)
        return {"waveform": flat.numpy(), "lengths": lengths.int().numpy(), "longest": longest}
    return {name: signal.numpy()} | ({"lengths": lengths.numpy()} if layout == "padded" else {})


def _compared(
    encoder: SpeakerEncoder, inputs: Inputs, layout: Layout, model: Any, voices: list[np.ndarray]
) -> tuple[tuple[tuple[int, ...], ...], float, float]:
    """Batches that were run, largest relative error and smallest cosine of an embedding; NaN counts as the worst."""
    exact = exact_encoder(encoder)
    spec = encoder.frontend
    least, rate = max(spec.frame_length, spec.frame_shift), spec.sample_rate
    sizes = [[least + 2 * spec.frame_shift + 1], [len(voices[0])], [len(v) for v in voices], [rate, rate // 2 + 7]]
    half = model_precision(model) in ("fp16", "bf16")
    runtime = session(emulated(model) if half else model, exact=half)
    found, wanted, checked = [], [], []
    for lengths in sizes:
        rows = [samples[:size] for samples, size in zip(voices, lengths, strict=False)]
        rows = [row[: min(map(len, rows))] for row in rows] if layout == "equal" else rows
        counts = torch.tensor([len(row) for row in rows])
        signal = nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
        with torch.inference_mode():
            wanted.append(exact._forward(rows, "auto").double())
            if inputs == "features":
                signal, counts = exact._inputs(rows, "auto")
                signal = signal[:, : counts.max()]  # not those that fill up a multiple
        found.append(torch.from_numpy(runtime.run(None, feed(signal, counts, inputs, layout))[0]).double())
        checked.append(tuple(counts.tolist()))
    have, want = torch.cat(found), torch.cat(wanted)
    errors = (have - want).norm(dim=1) / want.norm(dim=1)
    cosines = torch.cosine_similarity(have, want, dim=1)
    return tuple(checked), float(errors.nan_to_num(torch.inf).max()), float(cosines.nan_to_num(-1).min())


def model_precision(model: Any) -> str:
    """The precision that a graph of :func:`to_onnx` names."""
    return next((prop.value for prop in model.metadata_props if prop.key == "precision"), "fp32")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress and advice that exporters and quantisers print."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
