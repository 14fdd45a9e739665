"""Large-margin softmax heads: the classifier that a speaker network is trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spkfast.backends import Backend
from spkfast.errors import InputError, check_name
from spkfast.ops.margin_softmax_loss import HeadPrecision, MarginStats, check_form, margin_softmax_loss
from spkfast.reference.margin_softmax_loss import Fallback, MarginForm, MarginKind, MarginType, unit


class MarginHead(nn.Module):
    """What heads with all classes and with a share of them have in common.

    Args:
        embedding_dim: Size E of the embeddings.
        num_speakers: Classes N.
        form: The settings, at the full margin.
        precision: What the products multiply: ``fp32`` or ``bf16``; whatever autocast says.
        backend: Implementation.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, embedding_dim: int, num_speakers: int, form: MarginForm, precision: HeadPrecision, backend: Backend
    ) -> None:
        super().__init__()
        check_form(form)
        check_name("precision", precision, list(get_args(HeadPrecision)))
        for name, value in (("embedding_dim", embedding_dim), ("num_speakers", num_speakers)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive integer, got {value!r}")
        self._form = form
        self.margin = form.margin
        self.embedding_dim, self.num_speakers = embedding_dim, num_speakers
        self.precision, self.backend = precision, backend

    @property
    def output_size(self) -> int:
        """Classes N."""
        return self.num_speakers

    @property
    def form(self) -> MarginForm:
        """The settings at the present margin."""
        full = self._form
        ramp = float(self.margin) / full.margin if full.margin else 1.0
        return full._replace(margin=float(self.margin), topk_margin=full.topk_margin * ramp)

    def extra_repr(self) -> str:
        """Sizes, and the settings that are not the usual ones."""
        usual = MarginForm()
        given = {name: value for name, value in self.form._asdict().items() if value != getattr(usual, name)}
        shown = "".join(f", {name}={value!r}" for name, value in given.items())
        return f"{self.embedding_dim}, {self.num_speakers}{shown}"


class MarginSoftmaxLoss(MarginHead):
    """Margin softmax with its class weights; memory is that of the weights and their gradient.

    Args:
        embedding_dim: Size E of the embeddings.
        num_speakers: Classes N.
        kind: ``aam`` (ArcFace), ``am`` (CosFace), ``softmax`` or ``sphereface2``; see
            :func:`spkfast.functional.margin_softmax_loss`, of which the other arguments are too.
        margin: May be changed during training by setting the attribute.
        scale: Multiplier of the cosines.
        num_subcenters: Sub-centers K of each class.
        topk: How many of the hardest other classes are penalised.
        topk_margin: Their penalty at ``margin``; below it, as while the margin grows, in proportion.
        easy_margin: Apply the margin only where the target cosine is positive.
        fallback: Penalty past ``pi - margin``: ``linear`` or ``continuous``.
        label_smoothing: Share of the loss that goes to all classes alike.
        balance: Of ``sphereface2``.
        power: Of ``sphereface2``.
        margin_type: Of ``sphereface2``.
        bias: Whether ``softmax`` and ``sphereface2`` have one.
        precision: What the products multiply: ``fp32`` or ``bf16``; whatever autocast says.
        backend: Implementation.

    Attributes:
        weight: Shape (N * K, E), of one class after the other.
        bias: Shape (N,), of ``sphereface2`` (1,); or None.
        num_speakers: N.

    References: see :func:`spkfast.functional.margin_softmax_loss`.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_speakers: int,
        *,
        kind: MarginKind = "aam",
        margin: float = 0.2,
        scale: float = 32.0,
        num_subcenters: int = 1,
        topk: int = 0,
        topk_margin: float = 0.0,
        easy_margin: bool = False,
        fallback: Fallback = "continuous",
        label_smoothing: float = 0.0,
        balance: float = 0.7,
        power: int = 3,
        margin_type: MarginType = "C",
        bias: bool = True,
        precision: HeadPrecision = "fp32",
        backend: Backend = "auto",
    ) -> None:
        form = MarginForm(
            kind, margin, scale, num_subcenters, topk, topk_margin, easy_margin, fallback, label_smoothing, balance,
            power, margin_type,
        )  # fmt: skip
        super().__init__(embedding_dim, num_speakers, form, precision, backend)
        self.weight = nn.Parameter(self._initial_rows(num_speakers))
        size = bias_size(form, num_speakers) if bias else 0
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
        """Mean loss over the batch.

        Args:
            embeddings: Shape (B, E), any scale.
            target: Speaker index per row, int64, shape (B,).
            row_weights: Shape (B,), or None.
            return_stats: Give the accuracy on the plain cosines and the mean target cosine too.
            validate: Check ``target`` on a GPU as well, which waits for it.

        Returns:
            Scalar loss, float32 or wider; with ``return_stats`` the loss and
            :class:`~spkfast.ops.margin_softmax_loss.MarginStats`.

        Raises:
            InputError: As :func:`spkfast.functional.margin_softmax_loss`.
        """
        return margin_softmax_loss(
            embeddings,
            self.weight,
            target,
            bias=self.bias,
            row_weights=row_weights,
            return_stats=return_stats,
            validate=validate,
            precision=self.precision,
            backend=self.backend,
            **self.form._asdict(),
        )

    @torch.no_grad()
    def keep_speakers(self, speakers: Sequence[int] | Tensor) -> None:
        """Keeps some classes, which are numbered anew in the order given.

        As before fine-tuning, where classes that are copies of a speaker at another speed are dropped. ``weight`` is
        then another parameter: make the optimiser afterwards.

        Raises:
            InputError: If an index is out of range or comes twice, or there is none.
        """
        index = torch.as_tensor(speakers, dtype=torch.int64, device=self.weight.device)
        if not index.numel() or index.ndim != 1:
            raise InputError(f"speakers must be a list of at least one index, got shape {tuple(index.shape)}")
        if int(index.min()) < 0 or int(index.max()) >= self.num_speakers:
            raise InputError(
                f"speakers must lie in 0..{self.num_speakers - 1}, got {int(index.min())} to {int(index.max())}"
            )
        if index.unique().numel() != index.numel():
            raise InputError("speakers must differ, got one twice")
        self._replace(self._by_class(self.weight)[index], None if self._class_bias is None else self._class_bias[index])

    @torch.no_grad()
    def add_speakers(self, count: int, means: Tensor | None = None) -> None:
        """Adds classes after the others. ``weight`` is then another parameter: make the optimiser afterwards.

        Args:
            count: How many.
            means: Where to begin, see :meth:`set_speakers`; None for random rows.

        Raises:
            InputError: If there is none to add, or ``means`` has a wrong shape.
        """
        if not isinstance(count, int) or count < 1:
            raise InputError(f"count must be a positive integer, got {count!r}")
        # As long as the others: their length decides how fast they turn.
        rows = self._by_class(self._length * unit(self._initial_rows(count).to(self.weight)))
        before = self.num_speakers
        bias = None if self._class_bias is None else F.pad(self._class_bias, (0, count))
        self._replace(torch.cat([self._by_class(self.weight), rows]), bias)
        if means is not None:
            self.set_speakers(range(before, before + count), means)

    @torch.no_grad()
    def set_speakers(self, speakers: Sequence[int], means: Tensor) -> None:
        """Sets the rows of some classes to the mean embeddings of their speakers, in place.

        Rows are made as long as those of the head are in the mean; sub-centers but for the first differ from it by a
        little noise, without which they would stay equal.

        Args:
            speakers: Indices.
            means: Shape (len(speakers), E), as :func:`mean_embeddings` makes them.

        Raises:
            InputError: If the shape is another one, an index is out of range, or a mean is 0.
        """
        index = torch.as_tensor(speakers, dtype=torch.int64, device=self.weight.device)
        if means.shape != (index.numel(), self.embedding_dim):
            raise InputError(f"means must have shape ({index.numel()}, {self.embedding_dim}), got {tuple(means.shape)}")
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.num_speakers):
            raise InputError(f"speakers must lie in 0..{self.num_speakers - 1}")
        short = torch.linalg.vector_norm(means.double(), dim=1) < 1e-12
        if short.any():  # such a class would never get a gradient
            raise InputError(f"means must have a direction, row {int(short.nonzero()[0])} has none")
        directions = unit(means.to(self.weight))[:, None].repeat(1, self._form.num_subcenters, 1)
        noise = torch.randn_like(directions[:, 1:])
        directions[:, 1:] = unit(directions[:, 1:] + 0.1 * unit(noise))
        self._by_class(self.weight)[index] = self._length * directions

    @property
    def _class_bias(self) -> nn.Parameter | None:
        """The bias, where each class has one."""
        return self.bias if self._form.kind == "softmax" else None

    @property
    def _length(self) -> Tensor:
        """Of a row, in the mean."""
        return torch.linalg.vector_norm(self.weight.detach(), dim=1).mean()

    def _by_class(self, weight: Tensor) -> Tensor:
        return weight.view(-1, self._form.num_subcenters, self.embedding_dim)

    def _replace(self, rows: Tensor, bias: Tensor | None) -> None:
        self.num_speakers = rows.shape[0]
        self.weight = nn.Parameter(rows.flatten(0, 1), self.weight.requires_grad)
        if bias is not None:
            self.bias = nn.Parameter(bias, self.weight.requires_grad)

    def _initial_rows(self, classes: int) -> Tensor:
        rows = torch.empty(classes * self._form.num_subcenters, self.embedding_dim)
        return nn.init.xavier_uniform_(rows)


def bias_size(form: MarginForm, classes: int) -> int:
    """Values of the bias that a head of so many classes may have."""
    return {"softmax": classes, "sphereface2": 1}.get(form.kind, 0)


def mean_embeddings(embeddings: Tensor, target: Tensor, num_speakers: int) -> Tensor:
    """The mean direction of each speaker's embeddings.

    Args:
        embeddings: Shape (B, E), any scale.
        target: Speaker of each, int64, shape (B,).
        num_speakers: N.

    Returns:
        Shape (N, E), of length 1; 0 for a speaker without an embedding.

    Raises:
        InputError: If shapes do not fit, or a speaker is out of range.
    """
    if embeddings.ndim != 2 or target.shape != embeddings.shape[:1]:
        raise InputError(
            "embeddings must have shape (B, E) and target (B,), got "
            f"{tuple(embeddings.shape)} and {tuple(target.shape)}"
        )
    if target.numel() and (int(target.min()) < 0 or int(target.max()) >= num_speakers):
        raise InputError(f"target must lie in 0..{num_speakers - 1}, got {int(target.min())} to {int(target.max())}")
    sums = torch.zeros(num_speakers, embeddings.shape[1], dtype=torch.float64, device=embeddings.device)
    return unit(sums.index_add_(0, target, unit(embeddings.double()))).to(embeddings.dtype)
