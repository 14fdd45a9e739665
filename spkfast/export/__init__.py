"""What leaves for other runtimes: ONNX files, and modules of plain operators."""

from spkfast.export.fbank import FbankGraph
from spkfast.export.onnx import OnnxReport, to_onnx

__all__ = ["FbankGraph", "OnnxReport", "to_onnx"]
