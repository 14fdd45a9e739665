"""One workload of an op, as gpu_check runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload with what is needed to judge a run of it.

    ``benchmarks/gpu/<op>.py`` offers ``cases(device) -> list[Case]``.

    Attributes:
        name: Size in words, for tables.
        run: Computes the op with the given backend, through the public function, and returns its main output.
        definition: The same output from the definition, computed in the given dtype.
        bytes_moved: Least traffic: every input read once, every output written once.
        flops: Operations of a good algorithm, the same figure for every backend.
        peers: Other ways to the same output by name, timed beside it in the same process.
    """

    name: str
    run: Callable[[str], Tensor]
    definition: Callable[[torch.dtype], Tensor]
    bytes_moved: int
    flops: float
    peers: Mapping[str, Callable[[], Tensor]] = dataclasses.field(default_factory=dict)
