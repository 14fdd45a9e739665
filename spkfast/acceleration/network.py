"""Whole ECAPA-TDNN networks of other toolkits: what lies between their layers, in their own code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spkfast.errors import InputError
from spkfast.models import EcapaTdnn
from spkfast.models.checkpoints import import_state_dict
from spkfast.nn.se_res2net import Frames


class Network(nn.Module):
    """An ECAPA-TDNN called as a toolkit calls it.

    Args:
        family: Toolkit.
        config: Keywords of :class:`spkfast.models.EcapaTdnn`.
    """

    def __init__(self, family: str, config: dict[str, Any]) -> None:
        super().__init__()
        self.family = family
        self.net = EcapaTdnn(**config)
        if family == "taoruijie":
            self.torchfbank = self.specaug = nn.Identity()

    def forward(self, x: Tensor, frames: Frames | None = None, augment: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Embeddings of features (B, T, M), of waveforms for TaoRuijie; for wespeaker after the last block's frames."""
        encoder, projector = cast(Any, self.net.encoder), cast(Any, self.net.projector)
        x = encoder.stem(self._features(x, augment) if self.family == "taoruijie" else x.transpose(1, 2))
        outputs: list[Tensor] = []
        for i in range(1, encoder.num_blocks + 1):
            if outputs:
                x = x + outputs[-1] if encoder.sum_inputs else outputs[-1]
            outputs.append(encoder.get_submodule(f"blk{i}")(x, frames))
        pooled = self.net.pooling(encoder.mfa(outputs), None if frames is None else frames.lengths)
        # A convolution of one tap with speechbrain.
        embedding = F.linear(projector.bn(pooled), projector.fc.weight.flatten(1), projector.fc.bias)
        if projector.bn2 is not None:
            embedding = projector.bn2(embedding)
        return (outputs[-1], embedding) if self.family == "wespeaker" else embedding

    @torch.no_grad()
    def _features(self, waves: Tensor, augment: bool) -> Tensor:
        features = (self.torchfbank(waves) + 1e-6).log()
        features = features - features.mean(dim=-1, keepdim=True)
        return cast(Tensor, self.specaug(features)) if augment else features


def networks(module: nn.Module) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Keywords of :class:`Network`, and names of its torch layers in it and in the module; nothing for most modules."""
    with torch.random.fork_rng(devices=[]):
        try:
            found = import_state_dict(module.state_dict())
        except InputError:
            return
    leaves = {ours.rpartition(".")[0]: theirs.rpartition(".")[0] for theirs, ours in found.renamed}
    if len(leaves) != len(set(leaves.values())):
        return
    names = ["stem", *(f"blk{i}.res.0" for i in range(1, len(found.config["dilations"]))), "mfa"]
    convs = [module.get_submodule(leaves[f"encoder.{name}.conv"]) for name in names]
    dilations = [cast(nn.Conv1d, conv).dilation[0] for conv in convs]
    config = {**found.config, "dilations": dilations, "padding": "batch"}
    leaves = {f"net.{ours}": theirs for ours, theirs in leaves.items()}
    if found.family == "taoruijie":
        parts = dict(module.named_children())
        if not {"torchfbank", "specaug"} <= parts.keys():
            return
        leaves |= {name: name for name in ("torchfbank", "specaug")}
    yield {"family": found.family, "config": config}, leaves
