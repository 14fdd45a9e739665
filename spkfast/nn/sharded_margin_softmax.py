"""A margin softmax head whose classes are shared out between processes."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from spkfast.backends import Backend
from spkfast.errors import InputError, check_options
from spkfast.nn.margin_softmax import MarginHead, bias_size
from spkfast.ops._registration import no_autocast
from spkfast.ops.margin_softmax_loss import (
    ClassSums,
    HeadPrecision,
    MarginStats,
    check_row_weights,
    check_target,
    check_tensors,
    class_sums,
    counted,
    losses_of,
    reduced,
    stats_of,
)
from spkfast.reference.margin_softmax_loss import MarginForm

# Rows of initial weights that are drawn at a time.
_DRAWN = 1 << 16


class ShardedMarginSoftmaxLoss(MarginHead):
    """Margin softmax with its classes split between the processes of a group, each of which has a batch of its own.

    Every process has the embeddings of all batches multiplied by the weights of its classes. Of each row a few numbers
    travel back, not its logits. The loss of a process is that of its own batch, exactly as
    :class:`~spkfast.nn.MarginSoftmaxLoss` with all classes gives it; the gradients of the weights are those of the mean
    loss of all processes, as ``DistributedDataParallel`` and ``FSDP`` make it for the network: wrap the network in
    them, and not this head. Batches may be of different sizes.

    With ``sample_rate`` below 1 a step in training mode sees, of the classes of a process, those of its targets and
    random others; the gradient of ``weight`` is then sparse, and an optimiser that takes such gradients
    (``torch.optim.SparseAdam``, ``torch.optim.SGD`` without momentum) leaves the rows of other classes alone; that of
    the bias is dense. The loss is then that of fewer classes.

    Args:
        embedding_dim: Size E of the embeddings.
        num_speakers: Classes N of all processes together, at least one for each.
        process_group: The processes; None for all.
        sample_rate: Share of the classes in a step, above 0 and at most 1.
        bias: As of :class:`~spkfast.nn.MarginSoftmaxLoss`.
        precision: As of :class:`~spkfast.nn.MarginSoftmaxLoss`.
        backend: As of :class:`~spkfast.nn.MarginSoftmaxLoss`.
        settings: The other settings of :class:`~spkfast.nn.MarginSoftmaxLoss`.

    Attributes:
        weight: Rows of the classes of this process.
        bias: Of ``softmax``, of the classes of this process; of ``sphereface2`` the same value everywhere; or None.
        first: The first of these classes.
        classes: How many these are.

    Raises:
        InputError: If there is no process group, or a setting is wrong.

    Reference: An et al., "Partial FC: Training 10 Million Identities on a Single Machine", ICCV Workshops 2021.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_speakers: int,
        *,
        process_group: distributed.ProcessGroup | None = None,
        sample_rate: float = 1.0,
        bias: bool = True,
        precision: HeadPrecision = "fp32",
        backend: Backend = "auto",
        **settings: Any,
    ) -> None:
        check_options("head", type(self).__name__, settings, list(MarginForm._fields))
        form = MarginForm(**settings)
        super().__init__(embedding_dim, num_speakers, form, precision, backend)
        if not (distributed.is_available() and distributed.is_initialized()):
            raise InputError("a sharded head needs processes: call torch.distributed.init_process_group first")
        if not 0 < sample_rate <= 1:
            raise InputError(f"sample_rate must lie above 0 and at most at 1, got {sample_rate!r}")
        if sample_rate < 1 and form.label_smoothing:
            raise InputError("label_smoothing is for all classes: it does not go with a sample_rate below 1")
        self.process_group, self.sample_rate = process_group, sample_rate
        self.rank = distributed.get_rank(process_group)
        self.num_processes = distributed.get_world_size(process_group)
        if num_speakers < self.num_processes:
            raise InputError(f"num_speakers must be at least {self.num_processes}, one a process, got {num_speakers}")
        starts = [num_speakers * rank // self.num_processes for rank in range(self.num_processes + 1)]
        self._shares = [end - start for start, end in itertools.pairwise(starts)]
        self.first, self.classes = starts[self.rank], self._shares[self.rank]
        self.weight = nn.Parameter(self._initial_weight())
        size = bias_size(form, self.classes) if bias else 0
        self.bias = nn.Parameter(torch.zeros(size)) if size else None

    def forward(
        self,
        embeddings: Tensor,
        target: Tensor,
        *,
        row_weights: Tensor | None = None,
        return_stats: bool = False,
        validate: bool = True,
    ) -> Tensor | tuple[Tensor, MarginStats]:
        """Mean loss over the batch of this process; all processes must call it, and go backward, together.

        Args:
            embeddings: Shape (B, E), any scale; B may differ between processes.
            target: Speaker index per row, of all speakers, int64, shape (B,).
            row_weights: Shape (B,), or None; the mean is over the batch of this process.
            return_stats: Give accuracy and mean target cosine of the batch of this process too.
            validate: Check ``target`` on a GPU as well, which waits for it.

        Returns:
            As :class:`~spkfast.nn.MarginSoftmaxLoss`; of a batch without rows NaN, with gradients that are right.

        Raises:
            InputError: As :func:`spkfast.functional.margin_softmax_loss`; the other processes then wait in vain.
        """
        form = self.form
        check_tensors(embeddings, self.weight, self.bias, form)
        check_target(target, embeddings, self.num_speakers, validate)
        check_row_weights(row_weights, embeddings)
        embeddings = counted(embeddings, row_weights)
        with no_autocast(embeddings.device.type):
            found = self._sums(embeddings, target, form)
            bias = self._replicated(1 / self.num_processes) if form.kind == "sphereface2" else self.bias
            losses = losses_of(found, bias, target, self.num_speakers, form)
            loss = reduced(losses, row_weights, "mean").to(found.sums.dtype)
        return (loss, stats_of(found)) if return_stats else loss

    def _sums(self, embeddings: Tensor, target: Tensor, form: MarginForm) -> ClassSums:
        """Sums over all classes, for the rows of this process."""
        ranks, batch = self.num_processes, embeddings.shape[0]
        here = [batch] * ranks
        sizes = _Exchange.apply(target.new_full((ranks,), batch), [1] * ranks, [1] * ranks, self.process_group, 1.0)
        batches = [int(size) for size in sizes.tolist()]
        # The loss of a process counts once for its embeddings, and for the weights by its share in the mean.
        rows = _Exchange.apply(embeddings.repeat(ranks, 1), here, batches, self.process_group, float(ranks))
        targets = _Exchange.apply(target.repeat(ranks), here, batches, self.process_group, 1.0) - self.first
        weight: Tensor = self.weight
        bias = self._replicated(1.0) if form.kind == "sphereface2" else self.bias
        if self.sample_rate < 1 and self.training:
            weight, bias, targets = self._sampled(bias, targets)
        part = class_sums(rows, weight, bias, targets, form, precision=self.precision, backend=self.backend)
        missing = 1 + form.topk - part.cosines.shape[1]
        columns = [part.sums, part.total, part.best, part.own]
        packed = torch.cat(
            [
                torch.stack([column.double() for column in columns], dim=1),
                F.pad(part.cosines, (0, missing)),
                F.pad(part.present, (0, missing)).double(),
            ],
            dim=1,
        )
        packed = _Exchange.apply(packed, batches, here, self.process_group, 1 / ranks).unflatten(0, (ranks, batch))
        (sums, total, best, own), rest = packed[..., :4].unbind(dim=2), packed[..., 4:]
        cosines, present = rest[..., : 1 + form.topk], rest[..., 1 + form.topk :] != 0
        return self._together(ClassSums(sums, total, cosines, present, best, own), form, part.sums.dtype)

    def _together(self, parts: ClassSums, form: MarginForm, dtype: torch.dtype) -> ClassSums:
        """Sums over all classes from those of each process, which come first in the shape."""
        candidates, there = (value[..., 1:].transpose(0, 1).flatten(1) for value in (parts.cosines, parts.present))
        values = candidates.detach().masked_fill(~there, -torch.inf)
        hardest = values.topk(min(form.topk, self.num_speakers, values.shape[1]), dim=1).indices
        # The hardest of one process that are not the hardest of all count as ordinary ones.
        ordinary = there.scatter(1, hardest, False)
        total = parts.total.sum(dim=0) + candidates.masked_fill(~ordinary, 0).sum(dim=1)
        if form.kind == "sphereface2":
            sums = parts.sums.sum(dim=0)
        else:
            scale = 1.0 if form.kind == "softmax" else form.scale
            sums = torch.cat([parts.sums.T, (scale * candidates).masked_fill(~ordinary, -torch.inf)], dim=1)
            none = (sums == -torch.inf).all(dim=1, keepdim=True)
            sums = sums.masked_fill(none, 0).logsumexp(dim=1).masked_fill(none[:, 0], -torch.inf)
        return ClassSums(
            sums.to(dtype),
            total,
            torch.cat([parts.cosines[..., 0].sum(dim=0)[:, None], candidates.gather(1, hardest)], dim=1),
            torch.cat([parts.present[..., 0].any(dim=0)[:, None], there.gather(1, hardest)], dim=1),
            parts.best.amax(dim=0).detach(),
            parts.own.amax(dim=0).detach(),
        )

    def _sampled(self, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weight, bias and targets of the classes of this process that this step sees."""
        targets = torch.where((targets >= 0) & (targets < self.classes), targets, -1)
        wanted = torch.zeros(self.classes, device=targets.device).index_fill_(0, targets[targets >= 0].unique(), 2.0)
        wanted += torch.rand(self.classes, device=targets.device)
        count = max(math.ceil(self.sample_rate * self.classes), int((wanted >= 2).sum()))
        classes = wanted.topk(count).indices.sort().values
        centers = self.form.num_subcenters
        rows = (classes[:, None] * centers + torch.arange(centers, device=targets.device)).flatten()
        weight = F.embedding(rows, self.weight, sparse=True)
        found = torch.searchsorted(classes, targets.clamp_min(0))
        return (
            weight,
            bias[classes] if bias is not None and self.form.kind == "softmax" else bias,
            torch.where(targets >= 0, found, -1),
        )

    def _replicated(self, share: float) -> Tensor | None:
        """The bias that all processes have: each gets the gradients of all, times ``share``."""
        return None if self.bias is None else _Replicated.apply(self.bias, self.process_group, share)

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """The state of a :class:`~spkfast.nn.MarginSoftmaxLoss` with all classes, on the CPU.

        All processes must call it. It fits any number of processes, see :meth:`load_full_state_dict`.

        Returns:
            On the first process of the group, else None.
        """
        state = {"weight": self.gather_rows(self.weight.detach())}
        if self.bias is not None:
            by_class = self._form.kind == "softmax"
            state["bias"] = self.gather_rows(self.bias.detach()) if by_class else self.bias.detach().cpu()
        return {name: value for name, value in state.items() if value is not None} if self.rank == 0 else None

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the classes of this process from the state of all.

        Raises:
            InputError: If a tensor is missing, or has another shape.
        """
        rows = self.num_speakers * self._form.num_subcenters
        expected: dict[str, tuple[int, ...]] = {"weight": (rows, self.embedding_dim)}
        if self.bias is not None:
            expected["bias"] = (bias_size(self._form, self.num_speakers),)
        for name, shape in expected.items():
            found = tuple(state[name].shape) if name in state else None
            if found != shape:
                raise InputError(f"the state must have {name!r} of shape {shape}, got {found}")
        with torch.no_grad():
            self.weight.copy_(self.own_rows(state["weight"]))
            if self.bias is not None:
                self.bias.copy_(self.own_rows(state["bias"]) if self._form.kind == "softmax" else state["bias"])

    def gather_rows(self, share: Tensor) -> Tensor | None:
        """The rows of all processes of a tensor that has some for each class, as the optimiser's state has.

        All processes must call it.

        Returns:
            On the first process of the group, on the CPU; else None.
        """
        per_class = _rows_per_class(share, self.classes)
        sizes = [count * per_class for count in self._shares]
        send = [share.shape[0] if rank == 0 else 0 for rank in range(self.num_processes)]
        receive = sizes if self.rank == 0 else [0] * self.num_processes
        rows = _Exchange.apply(share, send, receive, self.process_group, 1.0)
        return rows.cpu() if self.rank == 0 else None

    def own_rows(self, full: Tensor) -> Tensor:
        """The rows of the classes of this process, of a tensor that has some for each class of all processes."""
        per_class = _rows_per_class(full, self.num_speakers)
        return full[self.first * per_class : (self.first + self.classes) * per_class]

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedMarginSoftmaxLoss:
        memo[id(self.process_group)] = self.process_group  # which cannot be copied
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def get_extra_state(self) -> dict[str, int]:
        """Which share this is."""
        return {"rank": self.rank, "num_processes": self.num_processes, "num_speakers": self.num_speakers}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Refuses the share of another process.

        Raises:
            InputError: If it is one.
        """
        if state != self.get_extra_state():
            raise InputError(
                f"this is the share {self.get_extra_state()}, the state that of {state}: keep full_state_dict, which "
                "fits any number of processes"
            )

    def _initial_weight(self) -> Tensor:
        """As a head with all classes begins, where the processes have one seed; drawn in pieces."""
        centers = self._form.num_subcenters
        rows, first, last = (count * centers for count in (self.num_speakers, self.first, self.first + self.classes))
        bound = math.sqrt(6 / (rows + self.embedding_dim))
        weight = torch.empty(last - first, self.embedding_dim)
        for start in range(0, rows, _DRAWN):
            piece = torch.empty(min(_DRAWN, rows - start), self.embedding_dim).uniform_(-bound, bound)
            begin, end = max(first, start), min(last, start + _DRAWN)
            if begin < end:
                weight[begin - first : end - first] = piece[begin - start : end - start]
        return weight


def _rows_per_class(tensor: Tensor, classes: int) -> int:
    if tensor.ndim == 0 or not tensor.shape[0] or tensor.shape[0] % classes:
        raise InputError(f"the tensor must have rows for each of {classes} classes, got shape {tuple(tensor.shape)}")
    return tensor.shape[0] // classes


class _Exchange(torch.autograd.Function):
    """Rows to each process and from each, ``send`` and ``receive`` of them; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: Sequence[int], receive: Sequence[int], group: Any, factor: float) -> Tensor:
        ctx.sizes, ctx.group, ctx.factor = (list(send), list(receive)), group, factor
        return _exchanged(x, list(send), list(receive), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        send, receive = ctx.sizes
        return ctx.factor * _exchanged(grads[0], receive, send, ctx.group), None, None, None, None


def _exchanged(x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    distributed.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


class _Replicated(torch.autograd.Function):
    """A parameter that all processes have alike, whose gradient is a share of the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, share: float) -> Tensor:
        ctx.group, ctx.share = group, share
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        total = ctx.share * grads[0]
        distributed.all_reduce(total, group=ctx.group)
        return total, None, None
