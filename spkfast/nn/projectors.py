"""Projectors: from the pooled vector to the embedding, by name."""

from __future__ import annotations

import builtins
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from spkfast.errors import InputError, check_name, check_options
from spkfast.nn.inference import KernelModule, affine_of, has_inference_form

__all__ = ["IdentityProjector", "LinearProjector", "XvectorProjector", "create", "list"]


class LinearProjector(KernelModule):
    """Batch norm, a linear layer, and batch norm again where asked for.

    Args:
        input_size: Size of the pooled vector.
        embedding_dim: Size E of the embedding.
        output_bn: Batch norm on the embedding.
    """

    def __init__(self, input_size: int, embedding_dim: int, *, output_bn: bool = False) -> None:
        super().__init__()
        self.output_size = embedding_dim
        self.bn = nn.BatchNorm1d(input_size)
        self.fc = nn.Linear(input_size, embedding_dim)
        self.bn2 = nn.BatchNorm1d(embedding_dim) if output_bn else None

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, input_size) to (B, E)."""
        embedding = self.fc(self.bn(pooled))
        return embedding if self.bn2 is None else self.bn2(embedding)

    def misfit(self) -> str | None:
        """Why it is no linear map in evaluation mode."""
        known = has_inference_form(self.bn) and has_inference_form(self.bn2)
        return None if known else "batch norm without running statistics"

    def bound(self) -> Callable[[Tensor], Tensor]:
        """The linear map that it is in evaluation mode, as batch norm is an affine one."""
        weight = self.fc.weight.double()
        bias = weight.new_zeros(len(weight)) if self.fc.bias is None else self.fc.bias.double()
        scale, shift = affine_of(self.bn)
        bias, weight = bias + weight @ shift, weight * scale
        if self.bn2 is not None:
            scale, shift = affine_of(self.bn2)
            weight, bias = weight * scale[:, None], bias * scale + shift
        return functools.partial(F.linear, weight=weight.detach().float(), bias=bias.detach().float())


class XvectorProjector(nn.Module):
    """Two linear layers with a ReLU between; the embedding is the output of the second.

    Args:
        input_size: Size of the pooled vector.
        embedding_dim: Size E of the embedding.

    Reference: Snyder et al., "X-vectors: Robust DNN Embeddings for Speaker Recognition", ICASSP 2018.
    """

    def __init__(self, input_size: int, embedding_dim: int) -> None:
        super().__init__()
        self.output_size = embedding_dim
        self.fc1 = nn.Linear(input_size, embedding_dim)
        self.fc2 = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, input_size) to (B, E)."""
        return self.fc2(F.relu(self.fc1(pooled)))


class IdentityProjector(nn.Module):
    """The pooled vector is the embedding.

    Args:
        input_size: Size of the pooled vector.
        embedding_dim: The same, or None.
    """

    def __init__(self, input_size: int, embedding_dim: int | None = None) -> None:
        super().__init__()
        if embedding_dim not in (None, input_size):
            raise InputError(f"embedding_dim must be that of the pooled vector, {input_size}, got {embedding_dim}")
        self.output_size = input_size

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, input_size), unchanged."""
        return pooled


def _ska_tdnn(input_size: int, embedding_dim: int) -> LinearProjector:
    return LinearProjector(input_size, embedding_dim, output_bn=True)


def _rawnet3(input_size: int, embedding_dim: int) -> LinearProjector:
    return LinearProjector(input_size, embedding_dim)


# The names are ESPnet's.
_PROJECTORS: dict[str, Callable[..., nn.Module]] = {
    "identity": IdentityProjector,
    "rawnet3": _rawnet3,
    "ska_tdnn": _ska_tdnn,
    "xvector": XvectorProjector,
}


def list() -> builtins.list[str]:
    """Names that :func:`create` knows."""
    return sorted(_PROJECTORS)


def create(name: str, input_size: int, **options: Any) -> nn.Module:
    """A projector with fresh weights; it announces the size of the embedding as ``output_size``.

    Args:
        name: ``rawnet3`` (batch norm, linear), ``ska_tdnn`` (the same and batch norm), ``xvector`` (linear, ReLU,
            linear) or ``identity``.
        input_size: Size of the pooled vector.
        **options: ``embedding_dim``, the size E of the embedding.

    Raises:
        InputError: If the name or an option is unknown.
    """
    check_name("projector", name, list())
    known = [key for key in inspect.signature(_PROJECTORS[name]).parameters if key not in ("self", "input_size")]
    check_options("projector", name, options, known)
    return _PROJECTORS[name](input_size, **options)
