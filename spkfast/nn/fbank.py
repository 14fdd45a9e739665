"""The acoustic front-end as a module."""

from __future__ import annotations

from torch import Tensor, nn

from spkfast import functional
from spkfast.backends import Backend
from spkfast.frontends import FrontendSpec
from spkfast.reference.log_mel_fbank import fbank_tables


class Fbank(nn.Module):
    """Log-mel filterbank features of padded waveforms; it has no parameters.

    Args:
        spec: The front-end.
        backend: See :func:`spkfast.functional.log_mel_fbank`.
        validate: See :func:`spkfast.functional.log_mel_fbank`.

    Raises:
        InputError: If the spec asks for what the op does not compute.
    """

    def __init__(self, spec: FrontendSpec, *, backend: Backend = "auto", validate: bool = True) -> None:
        super().__init__()
        fbank_tables(spec)  # raises here, not at the first call
        self.spec, self.backend, self.validate = spec, backend, validate

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features (B, T, M) and frames per utterance (B,) of waveforms (B, S) with ``lengths`` (B,) samples."""
        return functional.log_mel_fbank(
            waveforms, lengths, spec=self.spec, backend=self.backend, validate=self.validate
        )

    def extra_repr(self) -> str:
        """The settings that tell two front-ends apart at a glance."""
        return f"{self.spec.n_mels} mels, window={self.spec.window!r}, hash={self.spec.hash}, backend={self.backend!r}"
