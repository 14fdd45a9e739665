"""The command ``embed``: embeddings of files, folders and lists, into one npz file."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from spkfast.cli.common import BadFiles, Parser, add_backend, add_batch_seconds, add_json, print_result, progress
from spkfast.errors import InputError

HELP = "embeddings of files, folders and lists"

LIST_SUFFIXES = (".txt", ".lst", ".list")

_SECONDS_BETWEEN_SAVES = 300.0


def main(argv: list[str]) -> None:
    """Runs ``spkfast embed``."""
    parser = Parser("embed", HELP)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="audio file; folder (all audio in it, keys relative to it); or .txt/.lst/.list file with lines 'path', "
        "'speaker path' or 'label path path', relative to the folder of the list",
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument(
        "--out",
        required=True,
        metavar="X.npz",
        help="arrays 'keys' and 'embeddings'; keys already in it are not redone",
    )
    parser.add_argument("--strict", action="store_true", help="end at the first file that cannot be used")
    add_batch_seconds(parser)
    add_backend(parser)
    add_json(parser)
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.suffix != ".npz":
        raise InputError(f"--out must end with .npz, got {args.out}")
    files = _collect(args.inputs)

    from spkfast.inference import SpeakerEncoder

    encoder = SpeakerEncoder.load(args.model)
    model = encoder.fingerprint
    known = _load_own(out, model) if out.exists() else {}
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
                _save(out, found, model)
                saved = time.monotonic()
    finally:
        if len(found) > len(known):
            _save(out, found, model)
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


def read_embeddings(path: str | os.PathLike[str]) -> tuple[list[str], Any, str | None]:
    """Keys, embeddings (U, E) and fingerprint of the model (None where the file holds none) of an npz file.

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
    except KeyError as error:
        raise InputError(f"{path}: holds no arrays 'keys' and 'embeddings'") from error
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an npz file, or a damaged one") from error
    if keys.ndim != 1 or embeddings.ndim != 2 or len(keys) != len(embeddings):
        raise InputError(
            f"{path}: keys have shape {keys.shape}, embeddings {embeddings.shape}; expected (U,) and (U, E)"
        )
    return [str(key) for key in keys], embeddings, model


def _load_own(path: Path, model: str) -> dict[str, Any]:
    keys, embeddings, written_by = read_embeddings(path)
    if written_by != model:
        raise InputError(f"{path}: holds embeddings of another model; name another --out or remove it")
    return dict(zip(keys, embeddings, strict=True))


def _save(path: Path, found: dict[str, Any], model: str) -> None:
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(fresh, "wb") as file:
            np.savez(file, keys=np.array(list(found)), embeddings=np.stack(list(found.values())), model=np.array(model))
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _collect(inputs: list[str]) -> dict[str, Path]:
    """Every file by its key."""
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
    from spkfast.data.audio import AUDIO_SUFFIXES

    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not paths:
        raise InputError(f"{folder}: the folder holds no audio files")
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _in_list(file: Path) -> list[str]:
    from spkfast.data import lists

    try:
        rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
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
        trials = lists.read_trials(file)
        return list(dict.fromkeys(path for trial in trials for path in (trial.enrol, trial.test)))
    if columns > 3:
        raise InputError(f"{file}:{first}: expected 'path', 'speaker path' or 'label path path', got {columns} columns")
    for number, row in enumerate(rows, start=1):
        if len(row) > 1:
            raise InputError(f"{file}:{number}: expected 1 column 'path', got {len(row)}")
    return [row[0] for row in rows if row]
