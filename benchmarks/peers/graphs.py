"""ONNX graphs of a network for other runtimes: as it is, and quantised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from spkfast.export.onnx import quiet

INPUT, OUTPUT = "features", "embedding"

# Of the values seen: with the outliers after ReLU and batch norm in the range, fewer steps are left to all others; with
# much less, an utterance unlike the calibration's is cut.
_PERCENTILE = 99.995


def export(net: nn.Module, features: Tensor, path: Path) -> None:
    """Writes the graph of ``net`` for features of this very shape, which leaves a runtime the most freedom."""
    with quiet():
        torch.onnx.export(
            net.eval(), (features,), str(path), dynamo=True, external_data=False, input_names=[INPUT],
            output_names=[OUTPUT], verbose=False,
        )  # fmt: skip


def quantise(path: Path, calibration: Tensor, out: Path) -> None:
    """Writes the graph with its products in int8 (static QDQ, u8 activations, s8 weights per channel).

    Linear layers of whole utterances, a negligible part of the time, stay as they are.

    Args:
        path: Graph that :func:`export` wrote.
        calibration: Batches of its input, (N, B, T, M).
        out: Graph to write.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(calibration)

        def get_next(self) -> dict[str, object] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    prepared = out.with_suffix(".prepared.onnx")
    with quiet():
        quant_pre_process(str(path), str(prepared))
        quantization.quantize_static(
            str(prepared),
            str(out),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            # Whatever else is quantised makes onnxruntime slower, and the embeddings useless.
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.Percentile,
            extra_options={"WeightSymmetric": True, "CalibPercentile": _PERCENTILE},
        )
