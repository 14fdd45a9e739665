"""The ops as functions, like ``torch.nn.functional``."""

from spkfast.ops import log_mel_fbank

__all__ = ["log_mel_fbank"]
