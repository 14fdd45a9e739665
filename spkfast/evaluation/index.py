"""An index of speakers for identification, over the library usearch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spkfast.errors import InputError, check_name, nearest

DTYPES = ("f32", "f16", "i8")

_VERSION = 1
_GRAPH, _NAMES = "graph.usearch", "speakers.json"
# Up to here, comparing with every speaker takes no longer than a search of the graph.
_MOST_FOR_EXACT = 10_000
_BYTES_AT_ONCE = 1 << 24


class Matches(NamedTuple):
    """The nearest speakers of each query, best first; fewer than asked for where a threshold or the index has fewer.

    Attributes:
        names: Of each query, a list.
        scores: Cosines, of each query an array as long as its list.
    """

    names: list[list[str]]
    scores: list[np.ndarray]


class SpeakerIndex:
    """Speakers by name, each with one embedding, found by the cosine to another embedding.

    Up to 10,000 speakers are compared one by one; more are searched through a graph, which may miss a neighbour. One
    thread builds it: the same additions and removals make the same graph.

    Args:
        embedding_dim: Values of an embedding, E.
        dtype: In what the embeddings are kept: ``f32``; ``f16``, whose cosines differ by about 1e-4; or ``i8``, the
            smallest and fastest, whose cosines differ by about 1e-2 and so change the order of near neighbours.
        model: :attr:`spkfast.SpeakerEncoder.fingerprint` of the model that all embeddings come from.
        connectivity: Edges of a speaker in the graph.
        expansion_add: Candidates looked at when a speaker is added; more take longer and miss less.
        expansion_search: Candidates looked at by a query.
        threads: Of :meth:`search`; 0 takes one per core.

    Attributes:
        embedding_dim: E.
        dtype: As given.
        model: As given.

    Raises:
        InputError: If an argument is out of range, or usearch is missing.

    Reference: Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using hierarchical
    navigable small world graphs", TPAMI 2020.
    """

    def __init__(
        self,
        embedding_dim: int,
        *,
        dtype: str = "f16",
        model: str | None = None,
        connectivity: int = 16,
        expansion_add: int = 128,
        expansion_search: int = 128,
        threads: int = 0,
    ) -> None:
        check_name("dtype", dtype, list(DTYPES))
        sizes = {
            "embedding_dim": embedding_dim,
            "connectivity": connectivity,
            "expansion_add": expansion_add,
            "expansion_search": expansion_search,
        }
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name} must be positive, got {value}")
        if threads < 0:
            raise InputError(f"threads must be at least 0, got {threads}")
        self.embedding_dim, self.dtype, self.model = embedding_dim, dtype, model
        self._threads = threads
        self._graph: Any = _usearch().Index(
            ndim=embedding_dim,
            metric="cos",
            dtype=dtype,
            connectivity=connectivity,
            expansion_add=expansion_add,
            expansion_search=expansion_search,
        )
        self._number: dict[str, int] = {}
        # By number, which the graph knows them by; None where one was removed.
        self._names: list[str | None] = []

    def __len__(self) -> int:
        return len(self._number)

    def __contains__(self, name: object) -> bool:
        return name in self._number

    def __repr__(self) -> str:
        return f"SpeakerIndex({len(self)} speakers, {self.embedding_dim} values, {self.dtype}, model={self.model})"

    def add(self, names: Sequence[str], embeddings: Any, *, model: str | None = None, replace: bool = False) -> None:
        """Adds speakers; after an error none of them is there.

        Args:
            names: Different names, length G.
            embeddings: One row per name, finite and not zero, need not be normalised, shape (G, E); numpy or torch.
            model: Fingerprint of the model they come from, where it is known.
            replace: Take the place of speakers that are there, instead of refusing their names.

        Raises:
            InputError: If shapes disagree, a name comes twice or is there already, an embedding is zero or not finite,
                or they come from another model than those of the index.
        """
        vectors = self._checked(embeddings, model)
        names = names.tolist() if isinstance(names, np.ndarray) else list(names)
        if len(names) != len(vectors):
            raise InputError(f"names must have length G = {len(vectors)}, got {len(names)}")
        if len(set(names)) < len(names):
            again = next(name for name, times in Counter(names).items() if times > 1)
            raise InputError(f"names must differ, {again!r} comes twice")
        old = [name for name in names if name in self._number]
        if old and not replace:
            raise InputError(
                f"the speaker {old[0]!r} is in the index; replace=True puts the new embedding in its place"
            )
        self._remove(old)
        first = len(self._names)
        # Several threads lose speakers (usearch's issue 735): one that is linked on an upper level, but not yet below,
        # is where the search of another thread ends, and what that adds may be left without an edge to it.
        self._graph.add(np.arange(first, first + len(names), dtype=np.uint64), vectors, threads=1)
        self._names += names
        self._number |= zip(names, range(first, first + len(names)), strict=True)

    def remove(self, name: str) -> None:
        """Takes a speaker out.

        Raises:
            InputError: If it is not there.
        """
        if name not in self._number:
            hint = nearest(name, list(self._number)) if len(self) <= _MOST_FOR_EXACT else ""
            raise InputError(f"the speaker {name!r} is not in the index{hint}")
        self._remove([name])

    def search(
        self,
        embeddings: Any,
        count: int = 10,
        *,
        threshold: float | None = None,
        model: str | None = None,
        exact: bool | None = None,
    ) -> Matches:
        """The nearest speakers of each embedding.

        Args:
            embeddings: Finite and not zero, need not be normalised, shape (Q, E); numpy or torch.
            count: Most speakers of a query.
            threshold: Only speakers with a cosine above it; None for all.
            model: Fingerprint of the model they come from, where it is known.
            exact: Compare with every speaker; None does up to 10,000 speakers.

        Raises:
            InputError: If the shape is another, an embedding is zero or not finite, ``count`` is not positive, or they
                come from another model than those of the index.
        """
        vectors = self._checked(embeddings, model)
        if count < 1:
            raise InputError(f"count must be positive, got {count}")
        if not len(self) or not len(vectors):
            return Matches([[] for _ in vectors], [np.empty(0, np.float32) for _ in vectors])
        exact = len(self) <= _MOST_FOR_EXACT if exact is None else exact
        found = self._graph.search(vectors, min(count, len(self)), exact=exact, threads=self._threads)
        scores = np.clip(1 - np.atleast_2d(found.distances), -1, 1)
        numbers = np.atleast_2d(found.keys).tolist()
        there = np.arange(scores.shape[1]) < np.reshape(getattr(found, "counts", scores.shape[1]), (-1, 1))
        if threshold is not None:
            there &= scores > threshold
        kept = there.sum(axis=1).tolist()  # scores fall, so that those which stay come first
        return Matches(
            [[self._names[number] for number in row[:most]] for row, most in zip(numbers, kept, strict=True)],
            [row[:most] for row, most in zip(scores, kept, strict=True)],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the folder ``path``, whole or not at all, in place of an index that may be there.

        Raises:
            InputError: If ``path`` is there and is no index.
            OSError: If the disk is full or cannot be written.
        """
        target = Path(path)
        if target.exists() and not (target / _NAMES).is_file():
            raise InputError(f"{path}: is there already, and is no index of speakers; name another folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh, old = (target.with_name(f".{target.name}.{word}-{os.getpid()}") for word in ("new", "old"))
        try:
            fresh.mkdir()
            try:
                self._graph.save(fresh / _GRAPH)
            except RuntimeError as error:  # which usearch makes of any error of the disk
                raise OSError(f"{path}: cannot be written ({error})") from error
            facts = {
                "format_version": _VERSION,
                "embedding_dim": self.embedding_dim,
                "dtype": self.dtype,
                "model": self.model,
                "graph_crc32": _checksum(fresh / _GRAPH),
                "names": self._names,
            }
            (fresh / _NAMES).write_text(json.dumps(facts), encoding="utf-8")
            for name in (_GRAPH, _NAMES):
                with open(fresh / name, "rb") as file:
                    os.fsync(file.fileno())
            if target.exists():
                target.rename(old)
            fresh.rename(target)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            for folder in (fresh, old):
                shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: str | None = None,
        expansion_add: int = 128,
        expansion_search: int = 128,
        threads: int = 0,
    ) -> SpeakerIndex:
        """Reads what :meth:`save` wrote.

        Args:
            path: The folder.
            model: Fingerprint of the model that is going to be used; any other in the index is an error.
            expansion_add: See the class.
            expansion_search: See the class.
            threads: See the class.

        Raises:
            InputError: If it is missing or damaged, comes from another model, or usearch is missing.
        """
        folder = Path(path)
        if not (folder / _NAMES).is_file():
            raise InputError(f"{path}: no index of speakers: holds no {_NAMES}")
        try:
            facts = json.loads((folder / _NAMES).read_text(encoding="utf-8"))
            if facts["format_version"] != _VERSION:
                raise InputError(f"{path}: format version {facts['format_version']!r}, this spkfast reads {_VERSION}")
            names, crc32 = facts["names"], facts["graph_crc32"]
            index = cls(
                facts["embedding_dim"],
                dtype=facts["dtype"],
                model=facts["model"],
                expansion_add=expansion_add,
                expansion_search=expansion_search,
                threads=threads,
            )
        except InputError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / _NAMES}: damaged ({error})") from error
        # usearch follows the edges of a damaged graph out of its memory.
        if not (folder / _GRAPH).is_file() or _checksum(folder / _GRAPH) != crc32:
            raise InputError(f"{folder / _GRAPH}: missing or damaged, or not that of {_NAMES} beside it")
        index._graph.load(folder / _GRAPH)
        index._graph.expansion_add, index._graph.expansion_search = expansion_add, expansion_search
        index._names = names
        index._number = {name: number for number, name in enumerate(names) if name is not None}
        index._check_model(model)
        return index

    def _remove(self, names: list[str]) -> None:
        numbers = [self._number.pop(name) for name in names]
        for number in numbers:
            self._names[number] = None
        if numbers:
            self._graph.remove(np.array(numbers, dtype=np.uint64))

    def _check_model(self, model: str | None) -> None:
        if None not in (model, self.model) and model != self.model:
            raise InputError(f"embeddings must come from the model {self.model} of the index, these come from {model}")

    def _checked(self, embeddings: Any, model: str | None) -> np.ndarray:
        self._check_model(model)
        if hasattr(embeddings, "detach"):
            embeddings = embeddings.detach().cpu().float().numpy()
        given = np.asarray(embeddings)
        if given.ndim != 2 or given.shape[1] != self.embedding_dim or not np.issubdtype(given.dtype, np.floating):
            raise InputError(
                f"embeddings must be floating with shape (rows, {self.embedding_dim}), got {given.dtype} {given.shape}"
            )
        norms = np.linalg.norm(given, axis=1, keepdims=True)
        wrong = ~(np.isfinite(norms) & (norms > 0)).ravel()
        if wrong.any():
            raise InputError(f"embeddings must be finite and not zero, row {int(np.argmax(wrong))} is not")
        # Of length one: the range of f16 ends at 65504.
        return np.ascontiguousarray(given / norms, dtype=np.float32)


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BYTES_AT_ONCE):
            value = zlib.crc32(block, value)
    return value


def _usearch() -> Any:
    if importlib.util.find_spec("usearch") is None:
        raise InputError("an index of speakers needs the package 'usearch': pip install 'spkfast[index]'")
    import usearch.index

    return usearch.index
