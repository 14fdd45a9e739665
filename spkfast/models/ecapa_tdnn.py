"""ECAPA-TDNN in the wespeaker dialect."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spkfast.errors import InputError
from spkfast.models.base import SpeakerModel
from spkfast.nn.pooling import AttentiveStatsPool
from spkfast.nn.se_res2net import SERes2NetBlock, TdnnLayer, frame_mask


class EcapaTdnn(SpeakerModel):
    """ECAPA-TDNN: a stem, three SE-Res2Net blocks, aggregation, attentive statistics pooling, a linear projection.

    An utterance in a padded batch gives the same embedding as alone. In training mode batch norm counts padded frames
    too, so train on crops of one length.

    Args:
        feature_dim: Values per frame M.
        channels: Channels C of the blocks; a multiple of ``scale``.
        embedding_dim: Size E of the embedding.
        mfa_channels: Channels of the aggregation layer.
        dialect: Toolkit whose details are followed: ``wespeaker``.
        scale: Channel groups of the Res2 convolutions.
        kernel_sizes: Taps of the stem and of each block.
        dilations: Dilation of the stem and of each block, in frames.
        attention_channels: Bottleneck of the attention.
        se_channels: Bottleneck of the squeeze-and-excitation.
        global_context: Give the attention the utterance's mean and standard deviation (``GLOB`` models).
        emb_bn: Batch norm on the embedding.

    Reference: Desplanques et al., "ECAPA-TDNN: Emphasized Channel Attention, Propagation and Aggregation in TDNN Based
    Speaker Verification", Interspeech 2020.
    """

    def __init__(
        self,
        feature_dim: int = 80,
        channels: int = 512,
        embedding_dim: int = 192,
        mfa_channels: int = 1536,
        dialect: str = "wespeaker",
        scale: int = 8,
        kernel_sizes: tuple[int, ...] = (5, 3, 3, 3),
        dilations: tuple[int, ...] = (1, 2, 3, 4),
        attention_channels: int = 128,
        se_channels: int = 128,
        global_context: bool = True,
        emb_bn: bool = False,
    ) -> None:
        super().__init__()
        if dialect != "wespeaker":
            raise InputError(f"dialect must be 'wespeaker', got {dialect!r}")
        for name, value in {
            "feature_dim": feature_dim, "channels": channels, "embedding_dim": embedding_dim, "scale": scale,
            "mfa_channels": mfa_channels, "attention_channels": attention_channels, "se_channels": se_channels,
        }.items():  # fmt: skip
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive integer, got {value!r}")
        if any(size < 1 or size % 2 == 0 for size in kernel_sizes):
            raise InputError(f"kernel_sizes must be odd, got {list(kernel_sizes)}")
        if channels % scale:
            raise InputError(f"channels must be a multiple of scale={scale}, got {channels}")
        if len(kernel_sizes) != len(dilations) or len(kernel_sizes) < 2:
            raise InputError(
                "kernel_sizes and dilations must name the stem and each block alike, "
                f"got {kernel_sizes} and {dilations}"
            )
        self.config = {
            "feature_dim": feature_dim, "channels": channels, "embedding_dim": embedding_dim,
            "mfa_channels": mfa_channels, "dialect": dialect, "scale": scale, "kernel_sizes": list(kernel_sizes),
            "dilations": list(dilations), "attention_channels": attention_channels, "se_channels": se_channels,
            "global_context": global_context, "emb_bn": emb_bn,
        }  # fmt: skip
        self.name = "ecapa_tdnn"
        self.embedding_dim = embedding_dim
        self.num_blocks = len(kernel_sizes) - 1
        self.stem = TdnnLayer(feature_dim, channels, kernel_sizes[0], dilations[0])
        for i in range(1, self.num_blocks + 1):
            block = SERes2NetBlock(channels, kernel_sizes[i], dilations[i], scale, se_channels)
            self.add_module(f"blk{i}", block)
        self.mfa = nn.ModuleDict({"conv": nn.Conv1d(self.num_blocks * channels, mfa_channels, 1)})
        self.asp = AttentiveStatsPool(mfa_channels, attention_channels, global_context)
        self.post = nn.ModuleDict({"bn": nn.BatchNorm1d(self.asp.output_size)})
        self.emb = nn.ModuleDict({"fc": nn.Linear(self.asp.output_size, embedding_dim)})
        if emb_bn:
            self.emb["bn"] = nn.BatchNorm1d(embedding_dim)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embeddings of a batch.

        Args:
            features: Shape (B, T, M).
            lengths: Frames per row, int64, shape (B,); None where all T are real.

        Returns:
            Embeddings, shape (B, E), not normalised.
        """
        x = features.transpose(1, 2)
        mask = frame_mask(lengths, x.shape[-1], x.dtype)
        x = self.stem(x, mask)
        outputs = []
        for i in range(1, self.num_blocks + 1):
            x = self.get_submodule(f"blk{i}")(x, mask)
            outputs.append(x)
        x = F.relu(self.mfa["conv"](torch.cat(outputs, dim=1)))
        embedding = self.emb["fc"](self.post["bn"](self.asp(x, mask)))
        return self.emb["bn"](embedding) if "bn" in self.emb else embedding
