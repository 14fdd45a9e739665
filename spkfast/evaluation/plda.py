"""Probabilistic linear discriminant analysis: the two-covariance model, its scores, and Kaldi's files of it."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from spkfast import functional
from spkfast.errors import InputError

Array = TypeVar("Array", np.ndarray, Tensor)

FORMAT_VERSION = 1

_ROWS_AT_ONCE = 65536
_TRIALS_AT_ONCE = 1 << 18
_SCORES_AT_ONCE = 2**23
# Of the variances within speakers: what is left of a direction without any is rounding, of a difference of squares.
_LEAST_RATIO = 1e-12
_KALDI_TYPES = {b"FV": ("<f4", 1), b"DV": ("<f8", 1), b"FM": ("<f4", 2), b"DM": ("<f8", 2)}


class Enrolment(NamedTuple):
    """Speakers, each from all of its utterances.

    Attributes:
        names: Of the speakers, sorted, shape (N,).
        vectors: Averages in the space of the model, shape (N, D).
        num_utterances: Behind each average, int64, shape (N,).
    """

    names: np.ndarray
    vectors: Any
    num_utterances: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class Plda:
    """Two-covariance PLDA: an embedding is its speaker's mean, normal around ``mean``, plus normal noise.

    An embedding x becomes ``projection @ x + offset``, then, with ``length_norm``, a vector of length sqrt(D): that is
    what the model describes. ``diagonalizer`` takes it to a space where the covariance within speakers is the identity
    and that between them is diagonal, ``psi``. :meth:`fit` makes a model; the attributes are for those who have one
    from elsewhere. All arrays become float64.

    Attributes:
        mean: Shape (D,).
        diagonalizer: Shape (D, D).
        psi: Variance between speakers in units of that within them, shape (D,).
        projection: Shape (D, E).
        offset: Shape (D,).
        length_norm: Whether projected embeddings are scaled to length sqrt(D), Kaldi's ``ivector-normalize-length``.
        normalize_length: Whether vectors in the diagonal space are scaled too, Kaldi's option of that name: such that
            their squared length, each dimension divided by its variance, is D. Scores are then no longer those of the
            fitted model.
        simple_length_norm: With ``normalize_length``, leaves out that division, as Kaldi's option of that name does.
        model: :attr:`spkfast.SpeakerEncoder.fingerprint` of the network whose embeddings these are, or None.

    Raises:
        InputError: If shapes disagree, a value is not finite, or one of ``psi`` is negative.

    Reference: Ioffe, "Probabilistic Linear Discriminant Analysis", ECCV 2006; Bruemmer and de Villiers, "The Speaker
    Partitioning Problem", Odyssey 2010 (the name).
    """

    mean: np.ndarray
    diagonalizer: np.ndarray
    psi: np.ndarray
    projection: np.ndarray
    offset: np.ndarray
    length_norm: bool = False
    normalize_length: bool = False
    simple_length_norm: bool = False
    model: str | None = None

    def __post_init__(self) -> None:
        size = np.size(self.psi)
        columns = np.shape(self.projection)[-1] if np.ndim(self.projection) else 0
        shapes = {"mean": "D", "diagonalizer": "DD", "psi": "D", "projection": "DE", "offset": "D"}
        for name, letters in shapes.items():
            value = np.array(getattr(self, name), dtype=np.float64)
            expected = tuple({"D": size, "E": columns}[letter] for letter in letters)
            if value.shape != expected or 0 in expected:
                raise InputError(f"{name} must have shape ({', '.join(letters)}) = {expected}, got {value.shape}")
            if not np.isfinite(value).all():
                raise InputError(f"{name} must be finite")
            object.__setattr__(self, name, value)
        if (self.psi < 0).any():
            raise InputError(f"psi must not be negative, got {self.psi.min()}")

    def __repr__(self) -> str:
        return f"Plda({self.embedding_dim} to {self.dim} dimensions, model {self.model})"

    @property
    def dim(self) -> int:
        """Dimensions of the model, D."""
        return len(self.psi)

    @property
    def embedding_dim(self) -> int:
        """Dimensions of the embeddings, E."""
        return self.projection.shape[1]

    @property
    def within_covariance(self) -> np.ndarray:
        """Covariance within speakers of projected embeddings, shape (D, D)."""
        inverse = np.linalg.inv(self.diagonalizer)
        return inverse @ inverse.T

    @property
    def between_covariance(self) -> np.ndarray:
        """Covariance of speakers' means of projected embeddings, shape (D, D)."""
        inverse = np.linalg.inv(self.diagonalizer)
        return (inverse * self.psi) @ inverse.T

    @classmethod
    @torch.inference_mode()
    def fit(
        cls,
        embeddings: Any,
        speakers: Sequence[Any] | np.ndarray | Tensor,
        *,
        lda_dim: int | None = None,
        length_norm: bool = True,
        num_iterations: int = 10,
        model: str | None = None,
    ) -> Plda:
        """Maximum-likelihood model of labelled embeddings.

        The mean of all embeddings is subtracted, linear discriminant analysis takes them to ``lda_dim`` dimensions in
        which the covariance within speakers is the identity, and they are scaled to length sqrt(D). Expectation
        maximisation, with speakers' means as the hidden variables, starts from the analysis of variance, which is
        close where all speakers have as many utterances; it has the statistics and the optimum of Kaldi's
        ``ivector-compute-plda``, but for the mean, which is the most likely one here and the average of speakers there.

        Args:
            embeddings: One row per utterance, floating, shape (U, E); numpy or torch.
            speakers: Speaker of each utterance, any sortable names, shape (U,).
            lda_dim: D; None leaves discriminant analysis out.
            length_norm: Whether to scale to length sqrt(D).
            num_iterations: Of expectation maximisation; 0 gives the analysis of variance.
            model: Fingerprint of the network, to be kept with the model.

        Raises:
            InputError: If shapes disagree, a value is not finite, there is one speaker alone, no speaker has two
                utterances, ``lda_dim`` is not in [1, min(E, speakers - 1)], or the covariance within speakers is
                singular.

        Reference: Ioffe, "Probabilistic Linear Discriminant Analysis", ECCV 2006; Garcia-Romero and Espy-Wilson,
        "Analysis of I-vector Length Normalization in Speaker Recognition Systems", Interspeech 2011; Liu and Rubin,
        "The ECME Algorithm", Biometrika 1994 (the mean, from the likelihood itself).
        """
        matrix = _matrix("embeddings", embeddings)
        names, speaker = _grouped(speakers, matrix)
        if len(names) < 2:
            raise InputError(f"speakers must name at least two speakers, got {len(names)}")
        if len(matrix) == len(names):
            raise InputError("speakers must name one speaker at least twice: no speaker has two utterances")
        if num_iterations < 0:
            raise InputError(f"num_iterations must not be negative, got {num_iterations}")
        size = matrix.shape[1]
        everyone = torch.zeros_like(speaker)
        _, (centre,), _ = _statistics(matrix, everyone, 1, size, lambda block, _: block)
        projection = np.eye(size)
        if lda_dim is not None:
            most = min(size, len(names) - 1)
            if not 1 <= lda_dim <= most:
                raise InputError(
                    f"lda_dim must lie in [1, {most}], for {size} dimensions and {len(names)} speakers, got {lda_dim}"
                )
            shift = torch.from_numpy(centre).to(speaker.device)
            counts, means, scatter = _statistics(matrix, speaker, len(names), size, lambda block, _: block - shift)
            projection, _ = _diagonalized((means.T * counts) @ means, scatter / (len(matrix) - len(names)))
            projection = projection[:lda_dim]
        dim = len(projection)
        start = cls(
            np.zeros(dim), np.eye(dim), np.zeros(dim), projection, -projection @ centre, length_norm, model=model
        )
        statistics = _statistics(matrix, speaker, len(names), dim, start._projected)
        mean, diagonalizer, psi = _most_likely(*statistics, num_iterations)
        return replace(start, mean=mean, diagonalizer=diagonalizer, psi=psi)

    @torch.inference_mode()
    def adapt(
        self,
        embeddings: Any,
        *,
        mean_diff_scale: float = 1.0,
        within_covar_scale: float = 0.3,
        between_covar_scale: float = 0.7,
        recenter: bool = True,
    ) -> Plda:
        """The model for another domain, from unlabelled embeddings of it: Kaldi's ``ivector-adapt-plda``.

        Directions in which the embeddings vary more than the model says get that excess, a part of it within and a
        part of it between speakers.

        Args:
            embeddings: Shape (U, E).
            mean_diff_scale: How much of the square of the difference of the means counts as variance.
            within_covar_scale: Part of the excess that goes to the covariance within speakers.
            between_covar_scale: Part that goes to that between speakers.
            recenter: Whether projected embeddings, before they are scaled to one length, have the mean zero in the new
                domain, as in Kaldi's recipes; else ``offset`` stays.

        Raises:
            InputError: If there are fewer than two embeddings, their shape or a value is wrong, or a scale is negative.
        """
        matrix = _matrix("embeddings", embeddings, self.embedding_dim)
        if len(matrix) < 2:
            raise InputError(f"embeddings must hold at least two rows, got {len(matrix)}")
        scales = {
            "mean_diff_scale": mean_diff_scale,
            "within_covar_scale": within_covar_scale,
            "between_covar_scale": between_covar_scale,
        }
        for name, scale in scales.items():
            if not 0 <= scale < math.inf:
                raise InputError(f"{name} must be finite and not negative, got {scale}")
        everyone = torch.zeros(len(matrix), dtype=torch.int64, device=_device(matrix))
        adapted = self
        if recenter:
            unscaled = replace(self, length_norm=False)
            _, (mean,), _ = _statistics(matrix, everyone, 1, self.dim, unscaled._projected)
            adapted = replace(self, offset=self.offset - mean)
        _, (mean,), scatter = _statistics(matrix, everyone, 1, self.dim, adapted._projected)
        difference = mean - self.mean
        covariance = scatter / len(matrix) + mean_diff_scale * np.outer(difference, difference)
        # In a space where the model's total covariance is the identity, eigenvalues above one are the excess.
        whitening = self.diagonalizer / np.sqrt(1 + self.psi)[:, None]
        values, vectors = np.linalg.eigh(whitening @ covariance @ whitening.T)
        back = np.linalg.solve(whitening, vectors)
        excess = (back * np.maximum(values - 1, 0)) @ back.T
        diagonalizer, psi = _diagonalized(
            self.between_covariance + between_covar_scale * excess, self.within_covariance + within_covar_scale * excess
        )
        return replace(adapted, mean=mean, diagonalizer=diagonalizer, psi=psi)

    @torch.inference_mode()
    def transform(self, embeddings: Array, *, num_utterances: Any = None) -> Array:
        """Embeddings in the diagonal space of the model.

        Args:
            embeddings: Floating, shape (U, E).
            num_utterances: How many utterances each is the average of, an integer or shape (U,); None: one. Only
                ``normalize_length`` looks at it.

        Returns:
            Shape (U, D), float64 for float64, else float32; numpy for numpy, torch (on the same device) for torch.

        Raises:
            InputError: If a shape or a value is wrong.
        """
        matrix = _matrix("embeddings", embeddings, self.embedding_dim)
        counts = _counts("num_utterances", num_utterances, matrix)
        vectors = torch.empty(len(matrix), self.dim, dtype=_precision(matrix), device=counts.device)
        for rows, block in _blocks("embeddings", matrix):
            vectors[rows] = self._normalized(self._diagonal(block, rows), counts[rows], rows)
        return _alike(vectors, embeddings)

    @torch.inference_mode()
    def enrol(self, embeddings: Any, speakers: Sequence[Any] | np.ndarray | Tensor) -> Enrolment:
        """Speakers from several utterances each, averaged in the space of the model, where that is exact.

        Kaldi's recipes average raw embeddings instead; for that, give the averages to :meth:`scores` with
        ``num_enrol``. Without length normalisation both are the same.

        Args:
            embeddings: Shape (U, E).
            speakers: Speaker of each, any sortable names, shape (U,).

        Returns:
            What :meth:`scores` and :meth:`score_matrix` take with ``transformed=True``.

        Raises:
            InputError: If a shape or a value is wrong.
        """
        matrix = _matrix("embeddings", embeddings, self.embedding_dim)
        names, speaker = _grouped(speakers, matrix)
        sums = torch.zeros(len(names), self.dim, dtype=torch.float64, device=speaker.device)
        for rows, block in _blocks("embeddings", matrix):
            sums.index_add_(0, speaker[rows], self._diagonal(block, rows))
        counts = torch.bincount(speaker, minlength=len(names))
        vectors = self._normalized(sums / counts[:, None], counts, slice(0, len(names)))
        return Enrolment(names, _alike(vectors.to(_precision(matrix)), embeddings), counts.cpu().numpy())

    @torch.inference_mode()
    def scores(
        self,
        embeddings: Array,
        enrol_index: Any,
        test_index: Any,
        *,
        num_enrol: Any = None,
        transformed: bool = False,
    ) -> Array:
        """Log-likelihood ratio of each trial: the same speaker against different ones.

        Args:
            embeddings: Floating, shape (U, E).
            enrol_index: Row of the first side of each trial, integer, shape (trials,).
            test_index: Row of the second side.
            num_enrol: How many utterances each row is the average of where it is the first side, an integer or shape
                (U,); None: one. As a second side a row counts as one utterance. Memory grows with U times the number of
                different values.
            transformed: Whether the rows come from :meth:`transform` or :meth:`enrol`, shape (U, D).

        Returns:
            Natural logarithms, shape (trials,), float64 for float64, else float32; numpy for numpy, torch (on the same
            device) for torch.

        Raises:
            InputError: If shapes disagree, an index lies outside, or a value is wrong.

        Reference: Ioffe, "Probabilistic Linear Discriminant Analysis", ECCV 2006, between equations 4 and 5.
        """
        matrix = _matrix("embeddings", embeddings, self.dim if transformed else self.embedding_dim)
        counts = _counts("num_enrol", num_enrol, matrix)
        enrol = _index("enrol_index", enrol_index, matrix)
        test = _index("test_index", test_index, matrix, len(enrol))
        terms = _Terms(self.psi, counts)
        second = matrix if transformed else self.transform(matrix)
        # The number of utterances enters the vectors through this normalisation alone.
        averaged = self.normalize_length and not self.simple_length_norm and not transformed
        first = self.transform(matrix, num_utterances=counts) if averaged else second
        left, of_enrol = terms.enrolled("embeddings", first)
        right, of_test = terms.tested("embeddings", second)
        scores = torch.empty(len(enrol), dtype=right.dtype, device=right.device)
        for start in range(0, len(scores), _TRIALS_AT_ONCE):
            part = slice(start, start + _TRIALS_AT_ONCE)
            e, t = enrol[part], test[part]
            scores[part] = functional.paired_dot(left, right, e, t) + of_enrol[e] + of_test[t, terms.kind[e]]
        return _alike(scores, embeddings)

    @torch.inference_mode()
    def score_matrix(self, enrol: Array, test: Array, *, num_enrol: Any = None, transformed: bool = False) -> Array:
        """Log-likelihood ratio of every first side with every second side.

        Args:
            enrol: Floating, shape (N, E).
            test: Of the same kind, shape (U, E).
            num_enrol: How many utterances each row of ``enrol`` is the average of, an integer or shape (N,); None: one.
            transformed: Whether the rows come from :meth:`transform` or :meth:`enrol`, shapes (N, D) and (U, D).

        Returns:
            Natural logarithms, shape (N, U), float64 where both are, else float32; numpy for numpy, torch (on the same
            device) for torch.

        Raises:
            InputError: If shapes disagree, or a value is wrong.
        """
        size = self.dim if transformed else self.embedding_dim
        first, second = _matrix("enrol", enrol, size), _matrix("test", test, size)
        counts = _counts("num_enrol", num_enrol, first)
        terms = _Terms(self.psi, counts)
        if not transformed:
            first, second = self.transform(first, num_utterances=counts), self.transform(second)
        left, of_enrol = terms.enrolled("enrol", first)
        right, of_test = terms.tested("test", second)
        precision = left.dtype if left.dtype == right.dtype else torch.float32
        right = right.to(precision).T
        scores = torch.empty(len(left), right.shape[1], dtype=precision, device=right.device)
        step = max(1, _SCORES_AT_ONCE // max(1, right.shape[1]))
        for start in range(0, len(left), step):
            rows = slice(start, start + step)
            scores[rows] = left[rows].to(precision) @ right + of_enrol[rows, None] + of_test[:, terms.kind[rows]].T
        return _alike(scores, enrol)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file of safetensors, whole or not at all.

        Raises:
            InputError: If safetensors is not installed.
        """
        safetensors = _safetensors()
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        facts = {name: value for name, value in values.items() if name not in arrays}
        facts |= {"format_version": FORMAT_VERSION, "kind": "plda"}
        contents = safetensors.numpy.save(arrays, metadata={"spkfast": json.dumps(facts, sort_keys=True)})
        _write({Path(path): contents})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plda:
        """The model that :meth:`save` wrote.

        Raises:
            InputError: If the file is missing, damaged, or something else.
        """
        safetensors = _safetensors()
        try:
            with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
                facts = json.loads((file.metadata() or {}).get("spkfast", "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{os.fspath(path)}: not a PLDA model: {' '.join(str(error).split())}") from error
        if not isinstance(facts, dict) or facts.pop("kind", None) != "plda":
            raise InputError(f"{os.fspath(path)}: not a PLDA model: safetensors of something else")
        version = facts.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise InputError(
                f"{os.fspath(path)}: format version {version!r}, this spkfast reads version {FORMAT_VERSION}"
            )
        try:
            return cls(**arrays, **facts)
        except (InputError, TypeError) as error:
            raise InputError(f"{os.fspath(path)}: damaged: {error}") from error

    @classmethod
    def from_kaldi(
        cls,
        path: str | os.PathLike[str],
        *,
        mean: str | os.PathLike[str] | ArrayLike | None = None,
        transform: str | os.PathLike[str] | ArrayLike | None = None,
        length_norm: bool = True,
        normalize_length: bool = True,
        simple_length_norm: bool = False,
        model: str | None = None,
    ) -> Plda:
        """A model that Kaldi estimated, and what its recipes do to embeddings before; files binary or text.

        Args:
            path: File of ``ivector-compute-plda``, ``ivector-adapt-plda`` or ``ivector-copy-plda``.
            mean: File ``mean.vec`` or array of ``ivector-subtract-global-mean``, shape (E,).
            transform: File ``transform.mat`` or array of ``transform-vec``, shape (D, E), or (D, E + 1) with an offset
                as the last column, which without ``mean`` is taken to be there.
            length_norm: Whether the recipe runs ``ivector-normalize-length``.
            normalize_length: The option of ``ivector-plda-scoring``.
            simple_length_norm: The option ``simple-length-normalization`` of ``ivector-plda-scoring``.
            model: Fingerprint of the network, to be kept with the model.

        Raises:
            InputError: If a file is missing or damaged, or sizes disagree.
        """
        arrays = _read_kaldi(path, [b"<Plda>", 1, 2, 1, b"</Plda>"])
        centre = None if mean is None else _file_or_array("mean", mean, 1)
        projection = np.eye(len(arrays[2])) if transform is None else _file_or_array("transform", transform, 2)
        offset = np.zeros(len(projection))
        if transform is not None and (centre is None or projection.shape[1] == len(centre) + 1):
            projection, offset = projection[:, :-1], projection[:, -1]
        if centre is not None:
            if projection.shape[1] != len(centre):
                raise InputError(f"mean must have shape (E,) = ({projection.shape[1]},), got {centre.shape}")
            offset = offset - projection @ centre
        settings = (length_norm, normalize_length, simple_length_norm, model)
        try:
            return cls(arrays[0], arrays[1], arrays[2], projection, offset, *settings)
        except InputError as error:
            raise InputError(f"{os.fspath(path)}: {error}") from error

    def to_kaldi(
        self,
        path: str | os.PathLike[str],
        *,
        transform: str | os.PathLike[str] | None = None,
        binary: bool = True,
    ) -> None:
        """Writes Kaldi's files: the model, and projection and offset for ``transform-vec``; doubles, all digits.

        The files do not say whether ``ivector-normalize-length`` comes after the projection: ``length_norm`` does.

        Args:
            path: File of the model.
            transform: File of projection and offset, shape (D, E + 1).
            binary: Whether in Kaldi's binary form, else text.

        Raises:
            InputError: If there is a projection or an offset and ``transform`` is not given.
        """
        contents = [b"<Plda> ", *(_kaldi_bytes(a, binary) for a in (self.mean, self.diagonalizer, self.psi))]
        mark = b"\0B" if binary else b""
        files = {Path(path): mark + b"".join(contents) + b"</Plda> "}
        if transform is not None:
            matrix = np.column_stack([self.projection, self.offset])
            files[Path(transform)] = mark + _kaldi_bytes(matrix, binary)
        elif self.offset.any() or not np.array_equal(self.projection, np.eye(self.dim)):
            raise InputError("transform must name a file: this model has a projection or an offset")
        _write(files)

    def _projected(self, block: Tensor, rows: slice) -> Tensor:
        """What the model describes, of float64 embeddings."""
        projected = block @ _on(block, self.projection).T + _on(block, self.offset)
        return _scaled(projected, projected.square(), rows) if self.length_norm else projected

    def _diagonal(self, block: Tensor, rows: slice) -> Tensor:
        return (self._projected(block, rows) - _on(block, self.mean)) @ _on(block, self.diagonalizer).T

    def _normalized(self, vectors: Tensor, counts: Tensor, rows: slice) -> Tensor:
        if not self.normalize_length:
            return vectors
        squares = vectors.square()
        if not self.simple_length_norm:
            squares = squares / (_on(vectors, self.psi) + 1 / counts.double()[:, None])
        return _scaled(vectors, squares, rows)


class _Terms:
    """A ratio is a product of both sides plus a term of each; the factors follow from the utterances enrolled."""

    def __init__(self, psi: np.ndarray, counts: Tensor) -> None:
        values, self.kind = counts.unique(return_inverse=True)
        n, psi_ = values.double()[:, None], torch.from_numpy(psi).to(counts.device)  # (kinds, 1), (D,)
        known, more = n * psi_ + 1, (n + 1) * psi_ + 1
        self._product = n * psi_ / more
        self._enrol = -0.5 * (n * psi_) ** 2 / (known * more)
        self._test = -0.5 * n * psi_**2 / (more * (1 + psi_))
        self._constant = 0.5 * (torch.log1p(psi_) + known.log() - more.log()).sum(dim=1)

    def enrolled(self, name: str, vectors: Any) -> tuple[Tensor, Tensor]:
        """Factor (U, D) and term (U,) of the first side."""
        factor = torch.empty(vectors.shape, dtype=_precision(vectors), device=self.kind.device)
        term = torch.empty(len(vectors), dtype=torch.float64, device=self.kind.device)
        for rows, block in _blocks(name, vectors):
            kind = self.kind[rows]
            factor[rows] = block * self._product[kind]
            term[rows] = (block.square() * self._enrol[kind]).sum(dim=1) + self._constant[kind]
        return factor, term

    def tested(self, name: str, vectors: Any) -> tuple[Tensor, Tensor]:
        """Factor (U, D) of the second side, and its term with each kind of first side (U, kinds)."""
        factor = torch.empty(vectors.shape, dtype=_precision(vectors), device=self.kind.device)
        term = torch.empty(len(vectors), len(self._test), dtype=torch.float64, device=self.kind.device)
        for rows, block in _blocks(name, vectors):
            factor[rows] = block
            term[rows] = block.square() @ self._test.T
        return factor, term


def _most_likely(
    counts: np.ndarray, means: np.ndarray, scatter: np.ndarray, num_iterations: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, diagonalizer and psi from the statistics of the speakers, shapes (N,), (N, D) and (D, D)."""
    n = counts[:, None]
    num_utterances, num_speakers = counts.sum(), len(counts)
    around = means - means.mean(axis=0)
    diagonalizer, spread = _diagonalized(
        around.T @ around / (num_speakers - 1), scatter / (num_utterances - num_speakers)
    )
    # Means of n utterances vary by the n-th part of the variance within speakers as well. Not to zero, which
    # expectation maximisation would never leave.
    noise = (1 / counts).mean()
    psi = np.maximum(spread - noise, 0.01 * noise)
    mean = _grand_mean(n, means, diagonalizer, psi)
    for _ in range(num_iterations):
        # With diagonal covariances the posterior of each speaker is a scale and a variance per dimension, whatever n.
        observed = (means - mean) @ diagonalizer.T
        variance = psi / (n * psi + 1)
        expected = n * variance * observed
        rest = observed - expected
        between = expected.T @ expected + np.diag(variance.sum(axis=0))
        within = diagonalizer @ scatter @ diagonalizer.T + (rest * n).T @ rest + np.diag((n * variance).sum(axis=0))
        change, psi = _diagonalized(between / num_speakers, within / num_utterances)
        diagonalizer = change @ diagonalizer
        mean = _grand_mean(n, means, diagonalizer, psi)
    return mean, diagonalizer, psi


def _grand_mean(n: np.ndarray, means: np.ndarray, diagonalizer: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """The most likely mean: that of the speakers, weighted by the precision of each in each dimension."""
    weights = n / (n * psi + 1)
    return np.linalg.solve(diagonalizer, (weights * (means @ diagonalizer.T)).sum(axis=0) / weights.sum(axis=0))


def _diagonalized(between: np.ndarray, within: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matrix that makes ``within`` the identity and ``between`` diagonal, and that diagonal, descending."""
    values = np.linalg.eigvalsh(within)
    if not values[0] > _LEAST_RATIO * values[-1]:
        raise InputError(
            f"the covariance within speakers is singular in {len(within)} dimensions: "
            "give more utterances of each speaker, or embeddings of fewer dimensions"
        )
    whitening = np.linalg.inv(np.linalg.cholesky(within))
    psi, vectors = np.linalg.eigh(whitening @ between @ whitening.T)
    return vectors[:, ::-1].T @ whitening, np.maximum(psi[::-1], 0)


def _statistics(
    matrix: Any, speaker: Tensor, num_speakers: int, dim: int, prepare: Callable[[Tensor, slice], Tensor]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Utterances of each speaker (N,), their means (N, D), and the scatter around these (D, D), of what is prepared."""
    sums = torch.zeros(num_speakers, dim, dtype=torch.float64, device=speaker.device)
    scatter = torch.zeros(dim, dim, dtype=torch.float64, device=speaker.device)
    for rows, block in _blocks("embeddings", matrix):
        prepared = prepare(block, rows)
        sums.index_add_(0, speaker[rows], prepared)
        scatter += prepared.T @ prepared
    counts = torch.bincount(speaker, minlength=num_speakers).double()
    means = sums / counts[:, None]
    return counts.cpu().numpy(), means.cpu().numpy(), (scatter - sums.T @ means).cpu().numpy()


def _scaled(vectors: Tensor, squares: Tensor, rows: slice) -> Tensor:
    """The vectors times what makes the sums of their squares the number of dimensions."""
    lengths = squares.sum(dim=1, keepdim=True)
    if not (lengths > 0).all():
        row = rows.start + int((~(lengths > 0)).flatten().nonzero()[0])
        raise InputError(f"embeddings must differ from their mean to have a length, row {row} does not")
    return vectors * (vectors.shape[1] / lengths).sqrt()


def _matrix(name: str, value: Any, size: int | None = None) -> Any:
    matrix = value if isinstance(value, Tensor) else np.asarray(value)
    floating = matrix.is_floating_point() if isinstance(matrix, Tensor) else np.issubdtype(matrix.dtype, np.floating)
    if matrix.ndim != 2 or not floating:
        raise InputError(f"{name} must be floating with shape (U, E), got {matrix.dtype} {tuple(matrix.shape)}")
    if size is not None and matrix.shape[1] != size:
        raise InputError(f"{name} must have {size} dimensions, as this model, got {matrix.shape[1]}")
    return matrix


def _blocks(name: str, matrix: Any) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their values in float64, so that what lies in a file is never in memory as a whole."""
    for start in range(0, len(matrix), _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, len(matrix)))
        part = matrix[rows]
        block = part.double() if isinstance(part, Tensor) else torch.from_numpy(np.array(part, dtype=np.float64))
        wrong = ~torch.isfinite(block).all(dim=1)
        if wrong.any():
            raise InputError(f"{name} must be finite, row {start + int(wrong.nonzero()[0])} is not")
        yield rows, block


def _grouped(speakers: Any, matrix: Any) -> tuple[np.ndarray, Tensor]:
    """Names of the speakers, sorted, and the position of each row's speaker among them."""
    labels = speakers.detach().cpu().numpy() if isinstance(speakers, Tensor) else np.asarray(speakers)
    if labels.shape != (len(matrix),) or not len(matrix):
        raise InputError(f"speakers must have shape (U,) = ({len(matrix)},), not empty, got {labels.shape}")
    names, index = np.unique(labels, return_inverse=True)
    return names, torch.from_numpy(index).to(_device(matrix))


def _counts(name: str, value: Any, matrix: Any) -> Tensor:
    counts = _integers(name, 1 if value is None else value, matrix)
    if counts.ndim > 1 or (counts.ndim == 1 and len(counts) != len(matrix)):
        raise InputError(f"{name} must be an integer or have shape ({len(matrix)},), got {tuple(counts.shape)}")
    if counts.numel() and int(counts.min()) < 1:
        raise InputError(f"{name} must be at least 1, got {int(counts.min())}")
    return counts.expand(len(matrix))


def _index(name: str, value: Any, matrix: Any, num_trials: int | None = None) -> Tensor:
    index = _integers(name, value, matrix)
    if index.ndim != 1 or num_trials not in (None, len(index)):
        wanted = "" if num_trials is None else f" = ({num_trials},)"
        raise InputError(f"{name} must have shape (trials,){wanted}, got {tuple(index.shape)}")
    if len(index) and not (int(index.min()) >= 0 and int(index.max()) < len(matrix)):
        raise InputError(f"{name} must lie in [0, {len(matrix)}), got {int(index.min())} to {int(index.max())}")
    return index


def _integers(name: str, value: Any, matrix: Any) -> Tensor:
    if not isinstance(value, Tensor):
        value = np.asarray(value)
        if np.issubdtype(value.dtype, np.integer):
            value = torch.from_numpy(value.astype(np.int64))  # copied: torch warns of memory that cannot be written
    if not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype == torch.bool:
        raise InputError(f"{name} must hold integers, got {value.dtype}")
    return value.to(_device(matrix), torch.int64)


def _device(matrix: Any) -> torch.device:
    return matrix.device if isinstance(matrix, Tensor) else torch.device("cpu")


def _precision(matrix: Any) -> torch.dtype:
    return torch.float64 if matrix.dtype.itemsize >= 8 else torch.float32


def _on(like: Tensor, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(like.device)


def _alike(tensor: Tensor, given: Any) -> Any:
    return tensor if isinstance(given, Tensor) else tensor.numpy()


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise InputError("files of models need safetensors: pip install 'spkfast[eval]'") from error
    return safetensors


def _write(files: dict[Path, bytes]) -> None:
    partial = {path: path.with_name(f"{path.name}.partial") for path in files}
    try:
        for path, contents in files.items():
            partial[path].write_bytes(contents)
        for path in files:
            os.replace(partial[path], path)
    finally:
        for path in files:
            partial[path].unlink(missing_ok=True)


def _file_or_array(name: str, value: Any, ndim: int) -> np.ndarray:
    if isinstance(value, str | os.PathLike):
        return _read_kaldi(value, [ndim])[0]
    array = np.asarray(value, dtype=np.float64)
    if array.ndim != ndim:
        raise InputError(f"{name} must have {ndim} dimensions, got {array.shape}")
    return array


def _read_kaldi(path: str | os.PathLike[str], form: Sequence[bytes | int]) -> list[np.ndarray]:
    """The arrays of a file, whose form is a list of tokens and of numbers of dimensions."""
    name = os.fspath(path)
    try:
        contents = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    binary = contents[:2] == b"\0B"
    at, read = (2, _binary_array) if binary else (0, _text_array)
    arrays = []
    try:
        for part in form:
            if isinstance(part, int):
                array, at = read(contents, at)
                if array.ndim != part:
                    raise ValueError(f"{array.ndim} dimensions where {part} are expected")
                arrays.append(array)
                continue
            word, at = _token(contents, at)
            if word != part:
                raise ValueError(f"{word[:20]!r} where {part!r} is expected")
        if contents[at:].strip():
            raise ValueError("more than is expected")
    except (ValueError, struct.error) as error:
        raise InputError(f"{name}: not in Kaldi's form: {error}") from error
    return arrays


def _token(contents: bytes, at: int) -> tuple[bytes, int]:
    """The next word, and where the byte after its space is: that may be of an array, and look like a space."""
    while contents[at : at + 1].isspace():
        at += 1
    end = at
    while end < len(contents) and not contents[end : end + 1].isspace():
        end += 1
    return contents[at:end], end + 1


def _binary_array(contents: bytes, at: int) -> tuple[np.ndarray, int]:
    word, at = _token(contents, at)
    if word not in _KALDI_TYPES:
        raise ValueError(f"{word[:20]!r} where one of {', '.join(key.decode() for key in _KALDI_TYPES)} is expected")
    kind, ndim = _KALDI_TYPES[word]
    shape = []
    for _ in range(ndim):
        width, size = struct.unpack_from("<bi", contents, at)
        if width != 4 or size < 0:
            raise ValueError("a wrong size")
        shape.append(size)
        at += 5
    values = np.frombuffer(contents, dtype=kind, count=math.prod(shape), offset=at)
    return values.astype(np.float64).reshape(shape), at + values.nbytes


def _text_array(contents: bytes, at: int) -> tuple[np.ndarray, int]:
    word, at = _token(contents, at)
    end = contents.find(b"]", at)
    if word != b"[" or end < 0:
        raise ValueError("no array in brackets")
    # A row of a matrix is a line of its own, even of a matrix with one row, whose line begins after the bracket.
    inside = contents[at - 1 : end]
    rows = [[float(word) for word in line.split()] for line in inside.splitlines() if line.strip()]
    return np.array(rows if b"\n" in inside else rows[0] if rows else [], dtype=np.float64), end + 1


def _kaldi_bytes(array: np.ndarray, binary: bool) -> bytes:
    if binary:
        sizes = b"".join(struct.pack("<bi", 4, size) for size in array.shape)
        return (b"DV ", b"DM ")[array.ndim - 1] + sizes + array.astype("<f8").tobytes()
    rows = [" ".join(repr(float(value)) for value in row) for row in np.atleast_2d(array)]
    text = f" [ {rows[0]} ]\n" if array.ndim == 1 else " [\n  " + "\n  ".join(rows) + " ]\n"
    return text.encode()
