"""Projectors by name: what each computes, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from spkfast.errors import InputError
from spkfast.nn import projectors


def test_each_by_hand() -> None:
    torch.manual_seed(0)
    pooled = torch.randn(5, 12)
    for name in ("rawnet3", "ska_tdnn"):
        projector = projectors.create(name, 12, embedding_dim=7).eval()
        projector.bn.running_mean.normal_()
        want = projector.fc((pooled - projector.bn.running_mean) / (1 + projector.bn.eps) ** 0.5)
        if name == "ska_tdnn":
            projector.bn2.running_mean.normal_()
            want = (want - projector.bn2.running_mean) / (1 + projector.bn2.eps) ** 0.5
        torch.testing.assert_close(projector(pooled), want)
        assert projector.output_size == 7 and hasattr(projector.bn2, "weight") == (name == "ska_tdnn")
    projector = projectors.create("xvector", 12, embedding_dim=7)
    torch.testing.assert_close(projector(pooled), projector.fc2(projector.fc1(pooled).clamp_min(0)))
    projector = projectors.create("identity", 12)
    assert projector(pooled) is pooled and projector.output_size == 12


def test_errors() -> None:
    assert projectors.list() == ["identity", "rawnet3", "ska_tdnn", "xvector"]
    with pytest.raises(InputError, match="unknown projector 'rawnet' \\(did you mean 'rawnet3'\\?\\)"):
        projectors.create("rawnet", 12, embedding_dim=7)
    with pytest.raises(InputError, match="unknown option 'embeding_dim' of projector rawnet3 \\(did you mean"):
        projectors.create("rawnet3", 12, embeding_dim=7)
    with pytest.raises(InputError, match="embedding_dim must be that of the pooled vector, 12, got 7"):
        projectors.create("identity", 12, embedding_dim=7)
