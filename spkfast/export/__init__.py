"""What leaves for other runtimes: modules of plain operators that torch.onnx and TensorRT read."""

from spkfast.export.fbank import FbankGraph

__all__ = ["FbankGraph"]
