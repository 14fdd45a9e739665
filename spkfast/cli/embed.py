"""The command ``embed``: embeddings of files, folders and lists, into one file."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from spkfast.cli.common import (
    FILE_HELP,
    BadFiles,
    Parser,
    add_backend,
    add_batch_seconds,
    add_json,
    add_precision,
    load_encoder,
    print_result,
    progress,
    speakers_of_keys,
)
from spkfast.data.embeddings import (
    StoredEmbeddings,
    embedding_files,
    keeps_origin,
    key_obstacle,
    read_embeddings,
    write_embeddings,
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
    parser.add_argument("--model", required=True, help=FILE_HELP)
    parser.add_argument(
        "--out",
        required=True,
        metavar="X",
        help="X.safetensors, .npz or .parquet, in which keys that are there are not redone; or new X.npy, .ark, .scp, "
        "or folder X with one npy file per utterance",
    )
    parser.add_argument(
        "--speaker-means", metavar="X", help="the mean embedding of each speaker, into another file of these kinds"
    )
    parser.add_argument(
        "--speakers", metavar="FILE", help="lines 'utterance speaker' for the means [first folder of each key]"
    )
    parser.add_argument("--strict", action="store_true", help="end at the first file that cannot be used")
    add_precision(parser)
    add_batch_seconds(parser)
    add_backend(parser)
    add_json(parser)
    args = parser.parse_args(argv)
    if args.speakers and not args.speaker_means:
        parser.error("--speakers goes with --speaker-means")
    out = Path(args.out)
    # No run can go on with a file that tells neither model nor audio: the work is kept in one that does.
    work = out if keeps_origin(out) else out.with_name(f"{out.name}.partial.safetensors")
    embedding_files(work)
    if work != out:
        _refuse_existing(out, "and its format does not tell which model and audio it came from")
    if args.speaker_means:
        means = Path(args.speaker_means)
        if set(embedding_files(means)) & {*embedding_files(out), work}:
            parser.error("--speaker-means and --out must be different files")
        _refuse_existing(means, "and the means would replace it")
    files = collect(args.inputs)
    bad = BadFiles(args.strict or len(files) == 1)
    total = len(files)
    sources = {key: str(path.resolve()) for key, path in files.items()}
    for key, path in list(files.items()):
        shown = os.fsencode(path).decode(errors="backslashreplace")
        if reason := key_obstacle(work, key) or key_obstacle(work, sources[key]):
            bad.skip(InputError(f"{shown}: its name {reason}"))
            del files[key], sources[key]
        elif reason := key_obstacle(out, key):
            raise InputError(f"{shown}: its name {reason}; name another --out, such as X.safetensors")

    encoder = load_encoder(args.model, args.precision)
    model, frontend = encoder.fingerprint, encoder.frontend.hash
    known, known_sources = _earlier(work, model, sources) if work.exists() else ({}, {})
    speakers = speakers_of_keys(args.speakers, {**files, **known}) if args.speaker_means else {}
    sources = {**known_sources, **sources}
    waiting = {key: path for key, path in files.items() if key not in known}
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
                _save(work, found, sources, model, frontend)
                saved = time.monotonic()
    finally:
        if len(found) > len(known):
            _save(work, found, sources, model, frontend)
    bad.close(total)
    result = {
        "out": str(out),
        "embedded": len(found) - len(known),
        "already_there": len(files) - len(waiting),
        "skipped": bad.count,
        "embedding_dim": encoder.model.embedding_dim,
    }
    if args.speaker_means:
        result["speakers"] = _save_means(means, read_embeddings(work), speakers)
    if work != out:
        write_embeddings(out, read_embeddings(work))
        work.unlink()
    print_result({**result, "seconds": time.monotonic() - started}, args.json)


def _earlier(path: Path, model: str, sources: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Embeddings and audio files by key, of a file that this model wrote from the same audio."""
    stored = read_embeddings(path)
    if stored.model != model or stored.sources is None:
        raise InputError(f"{path}: holds embeddings of another model or precision; name another --out or remove it")
    known_sources = dict(zip(stored.keys, stored.sources, strict=True))
    for key, source in known_sources.items():
        if sources.get(key, source) != source:
            raise InputError(f"{path}: {key} in it came from {source}, not {sources[key]}; name another --out")
    return dict(zip(stored.keys, stored.embeddings, strict=True)), known_sources


def _save(path: Path, found: dict[str, Any], sources: dict[str, str], model: str, frontend: str) -> None:
    import numpy as np

    rows = np.stack(list(found.values()))
    write_embeddings(path, StoredEmbeddings(list(found), rows, model, frontend, [sources[key] for key in found]))


def _refuse_existing(path: Path, reason: str) -> None:
    for file in embedding_files(path):
        if file.exists():
            raise InputError(f"{file}: is there already, {reason}; name another file or remove it")


def _save_means(path: Path, stored: StoredEmbeddings, speakers: dict[str, str]) -> int:
    from spkfast.evaluation.enrolment import enrol

    names, means = enrol(stored.embeddings, [speakers[key] for key in stored.keys], normalize=False)
    write_embeddings(path, StoredEmbeddings(names, means, stored.model, stored.frontend))
    return len(names)


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
