"""The command ``embed``: embeddings of files, folders and lists, into one npz file."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from spkfast.cli.common import (
    MODEL_HELP,
    BadFiles,
    Parser,
    add_backend,
    add_batch_seconds,
    add_json,
    add_precision,
    load_encoder,
    print_result,
    progress,
)
from spkfast.errors import InputError

HELP = "embeddings of files, folders and lists"

LIST_SUFFIXES = (".txt", ".lst", ".list")
INPUTS_HELP = (
    "audio file; folder (all audio in it, keys relative to it); or .txt/.lst/.list file with lines 'path', "
    "'speaker path' or 'label path path', relative to the folder of the list"
)

_SECONDS_BETWEEN_SAVES = 300.0


def main(argv: list[str]) -> None:
    """Runs ``spkfast embed``."""
    parser = Parser("embed", HELP)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=INPUTS_HELP)
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument(
        "--out",
        required=True,
        metavar="X.npz",
        help="arrays 'keys' and 'embeddings'; keys already in it are not redone",
    )
    parser.add_argument("--strict", action="store_true", help="end at the first file that cannot be used")
    add_precision(parser)
    add_batch_seconds(parser)
    add_backend(parser)
    add_json(parser)
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.suffix != ".npz":
        raise InputError(f"--out must end with .npz, got {args.out}")
    files = collect(args.inputs)

    encoder = load_encoder(args.model, args.precision)
    model = encoder.fingerprint
    sources = {key: str(path.resolve()) for key, path in files.items()}
    known, known_sources = _load_own(out, model, sources) if out.exists() else ({}, {})
    sources = {**known_sources, **sources}
    waiting = {key: path for key, path in files.items() if key not in known}
    bad = BadFiles(args.strict or len(files) == 1)
    started = saved = time.monotonic()
    embeddings = encoder.embed_files(waiting.values(), backend=args.backend, batch_seconds=args.batch_seconds)
    found = dict(known)
    try:
        for key, embedding in zip(waiting, progress(embeddings, len(waiting), "embedding"), strict=True):
            if isinstance(embedding, InputError):
                bad.skip(embedding)
                continue
            found[key] = embedding.numpy()
            if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                _save(out, found, sources, model)
                saved = time.monotonic()
    finally:
        if len(found) > len(known):
            _save(out, found, sources, model)
    bad.close(len(files))
    result = {
        "out": str(out),
        "embedded": len(found) - len(known),
        "already_there": len(files) - len(waiting),
        "skipped": bad.count,
        "embedding_dim": encoder.model.embedding_dim,
        "seconds": time.monotonic() - started,
    }
    print_result(result, args.json)


class Stored(NamedTuple):
    """What an npz file of embeddings holds; ``model`` and ``sources`` are None where another program wrote it.

    Attributes:
        keys: Name of each embedding, length U.
        embeddings: Shape (U, E).
        model: Fingerprint of the model.
        sources: Audio file of each embedding, length U.
    """

    keys: list[str]
    embeddings: Any
    model: str | None
    sources: list[str] | None


def read_embeddings(path: str | os.PathLike[str]) -> Stored:
    """Contents of an npz file of embeddings.

    Raises:
        InputError: If the file is missing, damaged or holds something else.
    """
    import zipfile

    import numpy as np

    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        with np.load(path) as arrays:
            keys, embeddings = arrays["keys"], arrays["embeddings"]
            model = str(arrays["model"]) if "model" in arrays else None
            sources = [str(source) for source in arrays["sources"]] if "sources" in arrays else None
    except KeyError as error:
        raise InputError(f"{path}: holds no arrays 'keys' and 'embeddings'") from error
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an npz file, or a damaged one") from error
    if keys.ndim != 1 or embeddings.ndim != 2 or len(keys) != len(embeddings):
        raise InputError(
            f"{path}: keys have shape {keys.shape}, embeddings {embeddings.shape}; expected (U,) and (U, E)"
        )
    return Stored([str(key) for key in keys], embeddings, model, sources)


def _load_own(path: Path, model: str, sources: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Embeddings and audio files by key, of a file that this model wrote from the same audio."""
    stored = read_embeddings(path)
    if stored.model != model or stored.sources is None:
        raise InputError(f"{path}: holds embeddings of another model or precision; name another --out or remove it")
    known_sources = dict(zip(stored.keys, stored.sources, strict=True))
    for key, source in known_sources.items():
        if sources.get(key, source) != source:
            raise InputError(f"{path}: {key} in it came from {source}, not {sources[key]}; name another --out")
    return dict(zip(stored.keys, stored.embeddings, strict=True)), known_sources


def _save(path: Path, found: dict[str, Any], sources: dict[str, str], model: str) -> None:
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(fresh, "wb") as file:
            np.savez(
                file,
                keys=np.array(list(found)),
                embeddings=np.stack(list(found.values())),
                sources=np.array([sources[key] for key in found]),
                model=np.array(model),
            )
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def collect(inputs: list[str]) -> dict[str, Path]:
    """Every audio file of files, folders and lists, by its key.

    Raises:
        InputError: If a list or folder cannot be used, or two files have the same key.
    """
    files: dict[str, Path] = {}
    for text in inputs:
        source = Path(text)
        if source.is_dir():
            found = _in_folder(source)
        elif source.suffix in LIST_SUFFIXES:
            found = {path: source.parent / path for path in _in_list(source)}
        else:
            found = {text: source}
        for key, path in found.items():
            if files.setdefault(key, path) != path:
                raise InputError(f"{path}: has the key of {files[key]}; embed them into different files")
    return files


def _in_folder(folder: Path) -> dict[str, Path]:
    from spkfast.data.audio import audio_files

    return {path.relative_to(folder).as_posix(): path for path in audio_files(folder)}


def _in_list(file: Path) -> list[str]:
    from spkfast.data import lists

    try:
        rows = [line.split() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such list file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a text file") from error
    first, columns = next(((i, len(row)) for i, row in enumerate(rows, start=1) if row), (0, 0))
    if not columns:
        raise InputError(f"{file}: the list is empty")
    if columns == 2:
        return [utterance.path for utterance in lists.read_train_list(file)]
    if columns == 3:
        return lists.trial_paths(lists.read_trials(file))
    if columns > 3:
        raise InputError(f"{file}:{first}: expected 'path', 'speaker path' or 'label path path', got {columns} columns")
    for number, row in enumerate(rows, start=1):
        if len(row) > 1:
            raise InputError(f"{file}:{number}: expected 1 column 'path', got {len(row)}")
    return [row[0] for row in rows if row]
