"""A speaker network out of plain operators, from waveforms or features to embeddings, for other runtimes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from spkfast import backends
from spkfast.errors import InputError, check_name
from spkfast.export.fbank import FbankGraph, Form
from spkfast.inference import SpeakerEncoder
from spkfast.models.base import SpeakerModel
from spkfast.nn.inference import NORMS, InferenceLayer, has_inference_form, inference_params
from spkfast.nn.se_res2net import SqueezeExcitation, TdnnLayer
from spkfast.reference import Precision
from spkfast.reference.tdnn_layer import HALF

Inputs = Literal["waveform", "features"]
INPUTS = ("waveform", "features")


class EmbeddingGraph(nn.Module):
    """What a :class:`spkfast.SpeakerEncoder` computes, out of operators that every runtime has.

    The network is a copy in evaluation mode: its batch norms are a factor and a summand, made in float64, and what
    ``precision`` names is multiplied, added and kept between the layers of encoder and attention alone. Front-end,
    means, variances, the softmax over time and the projector are float32 at any precision. A row of a padded batch
    gives the embedding that it gives alone.

    Args:
        encoder: Network and front-end.
        inputs: ``waveform``: samples; ``features``: what the front-end gives. Features from which it takes their mean
            may come with their mean: it is taken here, too.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        form: Of the front-end, see :class:`FbankGraph`.

    Raises:
        InputError: If an argument is another, or the network is at half precision none of :mod:`spkfast.models`.
    """

    def __init__(
        self,
        encoder: SpeakerEncoder,
        *,
        inputs: Inputs = "waveform",
        precision: Precision = "fp32",
        form: Form = "conv",
    ) -> None:
        super().__init__()
        check_name("inputs", inputs, list(INPUTS))
        check_name("precision", precision, ["fp32", *HALF])
        spec = encoder.frontend
        self.inputs, self.dtype = inputs, HALF.get(precision, torch.float32)
        self.frontend = FbankGraph(spec, form=form) if inputs == "waveform" else None
        self.centres = inputs == "features" and spec.mean_norm and not spec.std_norm
        self.network = _plain(encoder.model, precision)
        self.train(False)

    @property
    def min_size(self) -> int:
        """Samples, or frames, of the shortest batch."""
        return 1 if self.frontend is None else self.frontend.min_samples

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embeddings (B, E), float32.

        Args:
            signal: Samples in [-1, 1], float32, shape (B, S); or features, shape (B, T, M).
            lengths: Samples, or frames, per row, int64, shape (B,); None where all are real.
        """
        if self.frontend is not None:
            features, frames = self.frontend(signal, lengths)
            if lengths is not None:
                lengths = frames
            elif self.frontend.spec.pad_frames_to > 1:
                features = features[:, : self.frontend.num_frames(signal.shape[1])]
        else:
            features = signal
            if lengths is not None:
                lengths = lengths.clamp(0, signal.shape[1])
                real = torch.arange(signal.shape[1], device=signal.device) < lengths[:, None]
                features = features.masked_fill(~real[..., None], 0)  # a sum would keep NaN
            if self.centres:
                count = features.shape[1] if lengths is None else lengths.clamp_min(1)[:, None, None]
                features = features - features.sum(dim=1, keepdim=True) / count
        return cast(Tensor, self.network(features.to(self.dtype), lengths)).float()


class RaggedGraph(EmbeddingGraph):
    """An :class:`EmbeddingGraph` that takes the waveforms of a batch one after the other, as inference servers do.

    Args:
        encoder: Network and front-end.
        **options: Of :class:`EmbeddingGraph`; ``inputs`` is ``waveform``.
    """

    def __init__(self, encoder: SpeakerEncoder, **options: Any) -> None:
        super().__init__(encoder, **options)
        self.frame_length = encoder.frontend.frame_length
        if self.frontend is None:
            raise InputError(f"a ragged batch is one of waveforms, got inputs={self.inputs!r}")

    def forward(self, waveform: Tensor, lengths: Tensor, longest: Tensor) -> Tensor:  # type: ignore[override]
        """Embeddings (B, E), float32; NaN for a row shorter than a frame, which has none.

        Args:
            waveform: Samples of all rows, float32, shape (N,).
            lengths: Samples of each row, int32, shape (B,).
            longest: Of the shape (S,), S the samples of the longest row; its values are not read.
        """
        rows = torch.arange(lengths.shape[0], device=lengths.device)
        # Not a cumulative sum, of which TensorRT has had wrong ones.
        ends = torch.where(rows <= rows[:, None], lengths, 0).sum(dim=1)
        begins = ends - lengths
        index = begins[:, None] + torch.arange(longest.shape[0], device=waveform.device)
        padded = waveform.index_select(0, index.clamp(max=waveform.shape[0] - 1).flatten()).reshape(index.shape)
        found = super().forward(padded, lengths.long())
        return found.masked_fill((lengths < self.frame_length)[:, None], torch.nan)


class _Affine(nn.Module):
    """Batch norm of evaluation mode as a factor and a summand per channel.

    Args:
        bn: The batch norm.
        before: The convolution or linear layer before the ReLU that comes before it. That takes the size of the factor,
            since ``relu(x) * s = sign(s) * relu(x * |s|)``: what is left is a sign, and mostly nothing.
    """

    def __init__(self, bn: nn.Module, before: nn.Conv1d | nn.Linear | None = None) -> None:
        super().__init__()
        # Of a layer that does nothing; the statistics alone count.
        params = inference_params(nn.Linear(1, 1, bias=False, dtype=torch.float64), bn)
        assert params.scale is not None and params.shift is not None
        scale = params.scale.detach()
        if before is not None:
            size = scale.abs()
            before.weight.copy_(before.weight.double() * size.reshape(-1, *[1] * (before.weight.ndim - 1)))
            if before.bias is not None:
                before.bias.copy_(before.bias.double() * size)
            scale = scale.sign()
        self.register_buffer("scale", None if bool((scale == 1).all()) else scale.float())
        self.register_buffer("shift", params.shift.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) or (B, C, T) to the same."""
        shape = (-1, *[1] * (x.ndim - 2))
        if self.scale is not None:
            x = x * cast(Tensor, self.scale).reshape(shape)
        return x + cast(Tensor, self.shift).reshape(shape)


# Of layers in which a ReLU alone is between a product and its batch norm: the name of the product.
_BEFORE_RELU: dict[type[nn.Module], str] = {TdnnLayer: "conv", SqueezeExcitation: "fc1"}


@torch.no_grad()
def _plain(model: nn.Module, precision: Precision) -> nn.Module:
    network = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    for module in list(network.modules()):
        if isinstance(module, InferenceLayer):
            module.precision = "fp32"
        for name, child in module.named_children():
            if isinstance(child, NORMS) and has_inference_form(child):
                before = getattr(module, _BEFORE_RELU.get(type(module), ""), None)
                setattr(module, name, _Affine(child, before))
    if precision in HALF:
        if not isinstance(network, SpeakerModel):
            raise InputError(
                f"precision {precision!r} needs a network of spkfast.models, whose parts it tells apart, got a "
                f"{type(model).__name__}"
            )
        for part in (network.encoder, network.pooling):
            part.to(HALF[precision])
        cast(InferenceLayer, network.pooling).precision = precision  # takes frames of half precision, and gives float32
    return network


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """While it lasts modules of spkfast trace into operators of torch alone, without gradients."""
    with backends.only_reference(), torch.no_grad():
        yield
