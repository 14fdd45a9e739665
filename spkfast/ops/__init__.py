"""The public functions of the ops, with their checks, fakes and gradients."""

from spkfast import backends

backends.load()

from spkfast.ops.log_mel_fbank import log_mel_fbank  # noqa: E402  the libraries hold the schemas

__all__ = ["log_mel_fbank"]
