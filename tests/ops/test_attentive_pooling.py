"""attentive_pooling, the internal op of the attentive module: registration. Values: tests/nn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spkfast
from spkfast.ops.tdnn_layer import pack_tdnn_layer
from tests.ops.pooling import channels_last
from tests.ops.products import dense_layer, noise


def op_arguments(dtype: torch.dtype, *, ragged: bool) -> tuple[Any, ...]:
    hidden = pack_tdnn_layer(dense_layer(4, 6, 1), precision="bf16" if dtype == torch.bfloat16 else "fp32")
    context = pack_tdnn_layer(dense_layer(4, 12, 2), [6, 6])
    given = [context.weight, context.vectors] if ragged else [None, None]
    x, lengths = channels_last(noise(2, 6, 9)).to(dtype), torch.tensor([9, 4]) if ragged else None
    weight, bias = noise(6, 4).to(dtype), noise(6).to(dtype)
    return x, hidden.weight, hidden.vectors, *given, weight, bias, lengths, [1, 0, 1, 0], [0.0, 1e-7, 1e30, 0.0]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, ragged: bool) -> None:
    torch.library.opcheck(torch.ops.spkfast.attentive_pooling, op_arguments(dtype, ragged=ragged))


def test_no_gradient() -> None:
    x, *others = op_arguments(torch.float32, ragged=True)
    mean, _ = torch.ops.spkfast.attentive_pooling(x.requires_grad_(), *others)
    with pytest.raises(spkfast.InputError, match="attentive_pooling is an inference form without a gradient"):
        mean.sum().backward()
