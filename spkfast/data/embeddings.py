"""Embeddings with their names on disk: one matrix and one list of keys, in the formats that other programs read."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spkfast.errors import InputError, nearest

_VERSION = 1
_METADATA = "spkfast"
_SCRIPT = "npy.scp"
_ROWS_AT_ONCE = 65536
# Comparing a name with more of them takes seconds.
_MOST_TO_COMPARE = 10_000


@dataclasses.dataclass(frozen=True, eq=False)
class StoredEmbeddings:
    """Embeddings by name, and where they come from as far as the file tells.

    Attributes:
        keys: Name of each embedding, all different, length U.
        embeddings: One row per key, shape (U, E); other floating types are converted to float32. From a safetensors or
            npy file it is a memory-mapped copy-on-write view: rows are read when they are used, and what is written to
            them never reaches the file.
        model: :attr:`spkfast.SpeakerEncoder.fingerprint` of the model.
        frontend: :attr:`spkfast.FrontendSpec.hash` of its front-end.
        sources: Audio file of each embedding, length U.

    Raises:
        InputError: If there are no embeddings, shapes disagree, the values are not floating, or a key comes twice.
    """

    keys: list[str]
    embeddings: np.ndarray
    model: str | None = None
    frontend: str | None = None
    sources: list[str] | None = None
    _row: dict[str, int] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        shape, count = np.shape(self.embeddings), len(self.keys)
        if len(shape) != 2 or shape[0] != count:
            raise InputError(f"keys have shape ({count},), embeddings {shape}; expected (U,) and (U, E)")
        if not count or not shape[1]:
            raise InputError(f"holds no embeddings: their shape is {shape}")
        if self.sources is not None and len(self.sources) != count:
            raise InputError(f"there are {len(self.sources)} sources of {count} embeddings")
        if not np.issubdtype(self.embeddings.dtype, np.floating):
            raise InputError(f"embeddings must be floating, got {self.embeddings.dtype}")
        row = dict(zip(self.keys, range(count), strict=True))
        if len(row) < count:
            again = next(key for i, key in enumerate(self.keys) if row[key] != i)
            raise InputError(f"the key {again!r} comes twice")
        with np.errstate(over="ignore"):  # infinite then, which is told with its key
            matrix = np.ascontiguousarray(self.embeddings, dtype=np.float32)
        object.__setattr__(self, "embeddings", matrix)
        object.__setattr__(self, "_row", row)

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: object) -> bool:
        return key in self._row

    def rows(self, keys: Sequence[str] | np.ndarray) -> np.ndarray:
        """Row of each name, int64, shape (len(keys),).

        Raises:
            InputError: If a name has no embedding; the first of them is named.
        """
        names = keys.tolist() if isinstance(keys, np.ndarray) else keys
        try:
            return np.fromiter(map(self._row.__getitem__, names), np.int64, count=len(names))
        except KeyError as error:
            missing = error.args[0]
        hint = nearest(missing, self.keys) if len(self) <= _MOST_TO_COMPARE else ""
        raise InputError(f"{missing!r} has no embedding{hint or f'; the first key is {self.keys[0]!r}'}")

    def check_finite(self) -> None:
        """Reads the whole matrix.

        Raises:
            InputError: If a value is NaN or infinite; its key is named.
        """
        for start in range(0, len(self), _ROWS_AT_ONCE):
            finite = np.isfinite(self.embeddings[start : start + _ROWS_AT_ONCE]).all(axis=1)
            if not finite.all():
                raise InputError(f"the embedding of {self.keys[start + int(np.argmin(finite))]!r} is not finite")


def read_embeddings(path: str | os.PathLike[str]) -> StoredEmbeddings:
    """Reads embeddings in any of the formats of :func:`write_embeddings`.

    ``.safetensors`` and ``.npy`` are mapped into memory: the matrix is not looked at, :meth:`~StoredEmbeddings.
    check_finite` does that. The values of the other formats are read and checked. Nothing in a file is run: Kaldi's
    commands in script files, its pickled and its text archives are refused.

    Args:
        path: A file, or the folder that holds one npy file per utterance.

    Raises:
        InputError: If it is missing, damaged, holds something else, a key twice, vectors of different sizes, or, in the
            formats that are not mapped, a value that is not finite; or a package that reads it is missing.
    """
    source = Path(path)
    form = _format(source)
    if not source.exists():
        raise InputError(f"{path}: no such file")
    try:
        stored = form.read(source)
        if not form.is_mapped:
            stored.check_finite()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # each library has its own errors, and damaged bytes meet all of them
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):  # of the machine
            raise
        raise InputError(f"{path}: not {form.title}, or a damaged one ({' '.join(str(error).split())})") from error
    return stored


def write_embeddings(path: str | os.PathLike[str], stored: StoredEmbeddings) -> None:
    """Writes embeddings whole or not at all, in place of a file that may be there.

    ====================  ==========================================================================================
    ``X.safetensors``     the native format: tensors ``embeddings`` (U, E) and ``keys``, ``sources`` as UTF-8 separated
                          by NUL; model and front-end in the header
    ``X.npz``             arrays ``keys``, ``embeddings`` and, where known, ``sources``, ``model``, ``frontend``
    ``X.npy``             the matrix; one key per line in ``X.keys.txt``. No model, no sources
    ``X.parquet``         columns ``key``, ``embedding`` (a list of fixed size) and ``source``; model and front-end in
                          the schema
    ``X.ark``, ``X.scp``  both Kaldi files, with float vectors; keys hold no white space. No model, no sources
    ``X`` (no suffix)     a new folder: ``<key>.npy`` for each utterance, and ``npy.scp`` with lines ``key path``
    ====================  ==========================================================================================

    Args:
        path: Where; its suffix tells the format.
        stored: What.

    Raises:
        InputError: If the suffix is unknown, a key cannot stand in this format, a value is not finite, or a package
            that writes it is missing.
        OSError: If the disk is full or cannot be written; what was there before is still there.
    """
    target = Path(path)
    form = _format(target)
    for names in (stored.keys, stored.sources or [] if form.keeps_origin else []):
        for name in names:
            reason = _obstacle(form, name)
            if reason:
                raise InputError(f"{path}: {name!r} {reason}")
    try:
        stored.check_finite()
    except InputError as error:
        raise InputError(f"{path}: {error}; nothing was written") from error
    files = form.files(target)
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{path}: is a folder that holds something; name another")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = [file.with_name(f".{file.name}.{os.getpid()}") for file in files]
    try:
        form.write(fresh, files, stored)
        for file in fresh:
            _flush(file)
        # A new file beside an old one would give embeddings the names of others.
        for file in files[1:]:
            file.unlink(missing_ok=True)
        for new, file in zip(fresh, files, strict=True):
            new.replace(file)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error
    finally:
        for file in fresh:
            if file.is_dir():
                shutil.rmtree(file)
            file.unlink(missing_ok=True)


def embedding_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files, or the folder, that :func:`write_embeddings` makes for a path.

    Raises:
        InputError: If the suffix is unknown, or a package that writes it is missing.
    """
    return _format(Path(path)).files(Path(path))


def keeps_origin(path: str | os.PathLike[str]) -> bool:
    """Whether the format stores model and sources, so that embeddings can be added later to those that are there.

    Raises:
        InputError: As :func:`embedding_files`.
    """
    return _format(Path(path)).keeps_origin


def key_obstacle(path: str | os.PathLike[str], key: str) -> str | None:
    """Why a key cannot stand in the format of a path, in words that follow the key; None where it can.

    Raises:
        InputError: As :func:`embedding_files`.
    """
    return _obstacle(_format(Path(path)), key)


class _Format(NamedTuple):
    """One way of keeping embeddings.

    Attributes:
        title: What such a file is called, in messages.
        read: Reads; its errors do not name the file.
        write: Writes into new files, which will have the names that come second.
        suffixes: Those of its files.
        refused: What no key may hold, and what that is called.
        package: Name of the package that it needs, and of the extra that brings it.
        keeps_origin: Whether model and sources are stored.
        is_mapped: Whether reading leaves the matrix on disk.
    """

    title: str
    read: Callable[[Path], StoredEmbeddings]
    write: Callable[[Sequence[Path], Sequence[Path], StoredEmbeddings], None]
    suffixes: tuple[str, ...]
    refused: tuple[re.Pattern[str], str]
    package: tuple[str, str] | None = None
    keeps_origin: bool = False
    is_mapped: bool = False

    def files(self, path: Path) -> list[Path]:
        return [path.with_suffix(suffix) for suffix in self.suffixes]


def _format(path: Path) -> _Format:
    form = _FORMATS.get(path.suffix)
    if form is None:
        known = ", ".join(suffix for suffix in _FORMATS if suffix)
        raise InputError(f"{path}: embeddings are kept in files that end with {known}, or in a folder without a suffix")
    if form.package and importlib.util.find_spec(form.package[0]) is None:
        package, extra = form.package
        raise InputError(f"{path}: needs the package {package!r}: pip install 'spkfast[{extra}]'")
    return form


def _obstacle(form: _Format, key: str) -> str | None:
    if not key:
        return "is an empty key"
    pattern, what = form.refused
    if pattern.search(key):
        return f"holds {what}, which {form.title} cannot keep in a key"
    try:
        key.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return None


def _flush(file: Path) -> None:
    if file.is_file():
        with open(file, "rb") as written:
            os.fsync(written.fileno())


def _facts(stored: StoredEmbeddings) -> str:
    return json.dumps({"format_version": _VERSION, "model": stored.model, "frontend": stored.frontend})


def _origin(text: str | bytes) -> dict[str, Any]:
    """Model and front-end, from what :func:`_facts` wrote."""
    facts = json.loads(text)
    if facts["format_version"] != _VERSION:
        raise InputError(f"format version {facts['format_version']!r}, this spkfast reads version {_VERSION}")
    return {name: facts[name] for name in ("model", "frontend")}


def _read_safetensors(path: Path) -> StoredEmbeddings:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:  # with numpy, a tensor is copied rather than mapped
        tensors = set(file.keys())
        facts = (file.metadata() or {}).get(_METADATA)
        if facts is None or not {"embeddings", "keys"} <= tensors:
            raise InputError("holds no tensors 'embeddings' and 'keys' written by spkfast")
        lists = {
            name: file.get_tensor(name).numpy().tobytes().decode().split("\0")
            for name in ("keys", "sources")
            if name in tensors
        }
        return StoredEmbeddings(embeddings=file.get_tensor("embeddings").numpy(), **lists, **_origin(facts))


def _write_safetensors(fresh: Sequence[Path], _: Sequence[Path], stored: StoredEmbeddings) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    lists = {"keys": stored.keys} | ({} if stored.sources is None else {"sources": stored.sources})
    tensors = {name: np.frombuffer("\0".join(texts).encode(), np.uint8) for name, texts in lists.items()}
    fresh[0].touch()
    mode = fresh[0].stat().st_mode
    try:
        save_file(tensors | {"embeddings": stored.embeddings}, fresh[0], metadata={_METADATA: _facts(stored)})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    fresh[0].chmod(mode)  # the writer shuts others out


def _read_npz(path: Path) -> StoredEmbeddings:
    with np.load(path) as arrays:
        if not {"keys", "embeddings"} <= set(arrays):
            raise InputError("holds no arrays 'keys' and 'embeddings'")
        lists = {name: arrays[name].astype(str) for name in ("keys", "sources") if name in arrays}
        for name, values in lists.items():
            if values.ndim != 1:
                raise InputError(f"{name} must have shape (U,), got {values.shape}")
        known: dict[str, Any] = {name: values.tolist() for name, values in lists.items()}
        known |= {name: str(arrays[name]) for name in ("model", "frontend") if name in arrays}
        return StoredEmbeddings(embeddings=arrays["embeddings"], **known)


def _write_npz(fresh: Sequence[Path], _: Sequence[Path], stored: StoredEmbeddings) -> None:
    known = {name: getattr(stored, name) for name in ("sources", "model", "frontend")}
    arrays: dict[str, Any] = {name: np.array(value) for name, value in known.items() if value is not None}
    with open(fresh[0], "wb") as file:
        np.savez(file, keys=np.array(stored.keys), embeddings=stored.embeddings, **arrays)


def _read_npy(path: Path) -> StoredEmbeddings:
    names = path.with_suffix(".keys.txt")
    if not names.is_file():
        raise InputError(f"{names} is missing, which has the key of each row in a line")
    # Copy-on-write: torch warns of arrays that cannot be written to.
    return StoredEmbeddings(_lines(names), np.load(path, mmap_mode="c"))


def _write_npy(fresh: Sequence[Path], _: Sequence[Path], stored: StoredEmbeddings) -> None:
    with open(fresh[0], "wb") as file:
        np.save(file, stored.embeddings)
    _write_lines(fresh[1], stored.keys)


def _read_parquet(path: Path) -> StoredEmbeddings:
    import pyarrow
    from pyarrow import compute, parquet

    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if not {"key", "embedding"} <= set(names):
            raise InputError(f"holds no columns 'key' and 'embedding', but {', '.join(names)}")
        facts = (file.schema_arrow.metadata or {}).get(_METADATA.encode())
        table = file.read([name for name in ("key", "embedding", "source") if name in names])
    for name in table.column_names:
        if table[name].null_count:
            raise InputError(f"the column {name!r} has {table[name].null_count} rows without a value")
    keys = [str(key) for key in table["key"].to_pylist()]
    column = table["embedding"].combine_chunks()
    sizes = compute.list_value_length(column).to_numpy(zero_copy_only=False)
    values = column.flatten()
    if values.null_count:
        raise InputError(f"the embeddings have {values.null_count} missing values")
    if not pyarrow.types.is_floating(values.type):
        raise InputError(f"embeddings must be floating, got {values.type}")
    _check_sizes(keys, sizes)
    matrix = values.to_numpy(zero_copy_only=False).reshape(len(keys), -1)
    sources = table["source"].to_pylist() if "source" in table.column_names else None
    return StoredEmbeddings(keys, matrix, sources=sources, **(_origin(facts) if facts else {}))


def _write_parquet(fresh: Sequence[Path], _: Sequence[Path], stored: StoredEmbeddings) -> None:
    import pyarrow
    from pyarrow import parquet

    values = pyarrow.array(stored.embeddings.reshape(-1))
    columns = {
        "key": pyarrow.array(stored.keys, pyarrow.string()),
        "embedding": pyarrow.FixedSizeListArray.from_arrays(values, stored.embeddings.shape[1]),
    }
    if stored.sources is not None:
        columns["source"] = pyarrow.array(stored.sources, pyarrow.string())
    table = pyarrow.table(columns).replace_schema_metadata({_METADATA: _facts(stored)})
    # Mantissas do not compress, and neither dictionaries nor bounds of them help a reader.
    parquet.write_table(table, fresh[0], use_dictionary=False, write_statistics=False)


def _read_ark(path: Path) -> StoredEmbeddings:
    from kaldiio.matio import read_token

    keys, vectors = [], []
    with open(path, "rb") as file:
        while (key := read_token(file)) is not None:
            keys.append(key)
            vectors.append(_kaldi_vector(file, key))
    return _stacked(keys, vectors)


def _read_scp(path: Path) -> StoredEmbeddings:
    keys, vectors = [], []
    with contextlib.ExitStack() as stack:
        opened, file = "", None
        for key, place in _script(path):
            found = re.fullmatch(r"([^|]*?)(?::(\d+))?", place)
            if found is None or place.endswith("]"):
                raise InputError(f"{key}: {place!r} is a command or a range, not FILE or FILE:OFFSET")
            archive, offset = found.groups()
            if archive != opened:
                stack.close()
                opened, file = archive, stack.enter_context(open(_archive(path, key, archive), "rb"))
            assert file is not None
            file.seek(int(offset or 0))
            keys.append(key)
            vectors.append(_kaldi_vector(file, key))
    return _stacked(keys, vectors)


def _archive(script: Path, key: str, archive: str) -> Path:
    """Where it was written, or beside the script file, with which it may have moved."""
    places = [Path(archive), script.parent / Path(archive).name]
    for place in places:
        if place.is_file():
            return place
    raise InputError(f"{key}: there is neither {places[0]} nor {places[1]}")


def _kaldi_vector(file: Any, key: str) -> np.ndarray:
    from kaldiio.matio import read_matrix_or_vector

    start = file.tell()
    # Other openings have kaldiio run pickles, or guess the type of a text from its first number.
    if file.read(2) != b"\0B":
        raise InputError(f"{key}: no binary vector at byte {start} (text archives are not read), or a damaged one")
    file.seek(start)
    vector, size = read_matrix_or_vector(file, return_size=True)
    if file.tell() != start + size:
        raise InputError(f"{key}: the file is cut off in its vector")
    if vector.ndim != 1:
        raise InputError(f"{key}: expected a vector, got a matrix of shape {vector.shape}")
    return vector


def _write_kaldi(fresh: Sequence[Path], files: Sequence[Path], stored: StoredEmbeddings) -> None:
    from kaldiio.matio import write_array

    lines = []
    with open(fresh[0], "wb") as file:
        for key, row in zip(stored.keys, stored.embeddings, strict=True):
            file.write(key.encode() + b" ")
            lines.append(f"{key} {files[0].absolute()}:{file.tell()}")
            write_array(file, row)
    _write_lines(fresh[1], lines)


def _read_folder(path: Path) -> StoredEmbeddings:
    script = path / _SCRIPT
    if not script.is_file():
        raise InputError(f"holds no {_SCRIPT}, which names the embedding of each utterance")
    keys = [key for key, _ in _script(script)]
    return _stacked(keys, [np.load(path / f"{key}.npy") for key in keys])


def _write_folder(fresh: Sequence[Path], files: Sequence[Path], stored: StoredEmbeddings) -> None:
    for key, row in zip(stored.keys, stored.embeddings, strict=True):
        file = fresh[0] / f"{key}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, row)
    folder = files[0].absolute()
    _write_lines(fresh[0] / _SCRIPT, (f"{key} {folder / key}.npy" for key in stored.keys))


def _script(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(path), start=1):
        fields = line.split(None, 1)
        if len(fields) != 2:
            raise InputError(f"line {number}: expected 2 columns 'key path', got {len(fields)}")
        yield fields[0], fields[1].strip()


def _stacked(keys: list[str], vectors: list[np.ndarray]) -> StoredEmbeddings:
    _check_sizes(keys, np.array([vector.size for vector in vectors]))
    return StoredEmbeddings(keys, np.stack(vectors) if vectors else np.empty((0, 0)))


def _check_sizes(keys: list[str], sizes: np.ndarray) -> None:
    wrong = np.flatnonzero(sizes != sizes[0]) if len(sizes) else sizes
    if len(wrong):
        raise InputError(f"{keys[wrong[0]]}: has {sizes[wrong[0]]} values, {keys[0]} has {sizes[0]}")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


_NUL = re.compile("\0"), "NUL"
_LINE_ENDS = re.compile("[\0\n\r]"), "an end of a line"
_WHITE = re.compile(r"[\0\s]"), "white space"
_OUTSIDE = re.compile(r"[\0\s]|^/|(^|/)\.\.(/|$)"), "white space, or leads out of the folder"
_KALDI: dict[str, Any] = {
    "write": _write_kaldi,
    "suffixes": (".ark", ".scp"),
    "refused": _WHITE,
    "package": ("kaldiio", "kaldi"),
}
_FORMATS = {
    ".safetensors": _Format(
        "a safetensors file",
        _read_safetensors,
        _write_safetensors,
        (".safetensors",),
        _NUL,
        ("safetensors", "train"),
        keeps_origin=True,
        is_mapped=True,
    ),
    ".npz": _Format("an npz file", _read_npz, _write_npz, (".npz",), _NUL, keeps_origin=True),
    ".npy": _Format("an npy file", _read_npy, _write_npy, (".npy", ".keys.txt"), _LINE_ENDS, is_mapped=True),
    ".parquet": _Format(
        "a Parquet file",
        _read_parquet,
        _write_parquet,
        (".parquet",),
        _NUL,
        ("pyarrow", "parquet"),
        keeps_origin=True,
    ),
    ".ark": _Format("a Kaldi archive", _read_ark, **_KALDI),
    ".scp": _Format("a Kaldi script file", _read_scp, **_KALDI),
    "": _Format("a folder of npy files", _read_folder, _write_folder, ("",), _OUTSIDE),
}
