"""The acoustic front-end as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spkfast import frontend_tables, functional
from spkfast.backends import Backend
from spkfast.errors import InputError
from spkfast.frontends import FrontendSpec, require_spec
from spkfast.nn.spec_augment import SpecAugment
from spkfast.ops.log_mel_fbank import check_arguments
from spkfast.reference.log_mel_fbank import count_frames


class Fbank(nn.Module):
    """Acoustic features of padded waveforms; it has no parameters.

    In training mode each utterance gets the noise of ``spec.dither`` and the masks of ``spec_augment``, in evaluation
    mode neither.

    Args:
        spec: The front-end.
        spec_augment: Masks to draw in training, or None.
        dtype: See :func:`spkfast.functional.log_mel_fbank`.
        backend: See :func:`spkfast.functional.log_mel_fbank`.
        validate: See :func:`spkfast.functional.log_mel_fbank`.
    """

    def __init__(
        self,
        spec: FrontendSpec,
        *,
        spec_augment: SpecAugment | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend = "auto",
        validate: bool = True,
    ) -> None:
        super().__init__()
        require_spec(spec)
        if not (spec_augment is None or isinstance(spec_augment, SpecAugment)):
            raise InputError(f"spec_augment must be a SpecAugment or None, got {spec_augment!r}")
        self.output_size = spec.output_size
        self.spec, self.spec_augment, self.dtype = spec, spec_augment, dtype
        self.backend, self.validate = backend, validate
        self._settings = frontend_tables.settings(spec)

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None, seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features of waveforms.

        Args:
            waveforms: Samples in [-1, 1], shape (B, S).
            lengths: Samples per utterance, int64, shape (B,); None means that all have S.
            seeds: One int64 per utterance, shape (B,), that decides its noise and its masks; None draws them from
                torch's default generator of the device. They count in training mode alone.

        Returns:
            Features (B, T, D) and frames per utterance (B,).

        Raises:
            InputError: As :func:`spkfast.functional.log_mel_fbank` does.
        """
        check_arguments(waveforms, lengths, seeds, None)
        masks = None
        if not self.training or (self.spec_augment is None and not self.spec.dither):
            seeds = None
        elif seeds is None:
            seeds = torch.randint(2**63 - 1, waveforms.shape[:1], device=waveforms.device)
        if seeds is not None and self.spec_augment is not None:
            samples = torch.full_like(seeds, waveforms.shape[-1]) if lengths is None else lengths
            frame_lengths = count_frames(samples, self._settings)
            masks = self.spec_augment.masks(frame_lengths, self.spec.output_size, seeds)
        return functional.log_mel_fbank(
            waveforms,
            lengths,
            spec=self.spec,
            seeds=seeds,
            masks=masks,
            dtype=self.dtype,
            backend=self.backend,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        """The settings that tell two front-ends apart at a glance."""
        settings = f"{self.spec.output_size} values, window={self.spec.window!r}, hash={self.spec.hash}"
        settings += f", dither={self.spec.dither}" if self.spec.dither else ""
        augment = "" if self.spec_augment is None else f", {self.spec_augment}"
        return f"{settings}, backend={self.backend!r}{augment}"
