"""What leaves for other runtimes: ONNX files, TensorRT engines, compiled packages, and models for inference servers."""

from spkfast.export.aotinductor import AotGraph, AotReport, to_aotinductor
from spkfast.export.fbank import FbankGraph
from spkfast.export.onnx import OnnxReport, to_onnx
from spkfast.export.tensorrt import Profile, TensorRTGraph, TensorRTReport, build_tensorrt, trtexec_command
from spkfast.export.triton_server import TritonConfig, TritonReport, triton_repository

__all__ = [
    "AotGraph",
    "AotReport",
    "FbankGraph",
    "OnnxReport",
    "Profile",
    "TensorRTGraph",
    "TensorRTReport",
    "TritonConfig",
    "TritonReport",
    "build_tensorrt",
    "to_aotinductor",
    "to_onnx",
    "triton_repository",
    "trtexec_command",
]
