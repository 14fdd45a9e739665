"""The command ``prepare``: lists, shards and banks of noise from what was recorded or downloaded."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from spkfast.cli.common import Parser, add_json, meter, print_result
from spkfast.errors import InputError

HELP = "lists of a folder, shards of a corpus, banks of noise and impulse responses"

_MOST_LINES = 20
_ARCHIVE = "; an archive (tar, zip) is extracted first"


def main(argv: list[str]) -> None:
    """Runs ``spkfast prepare``."""
    if argv and argv[0] in _KINDS:
        return _KINDS[argv[0]](argv[1:])
    parser = Parser("prepare", HELP)
    parser.add_argument("kind", choices=tuple(_KINDS), help="'spkfast prepare KIND --help' lists its options")
    parser.add_argument("source", metavar="SOURCE", help="what is there")
    parser.add_argument("out", metavar="OUT", help="what is made")
    parser.parse_args(argv)


def _folder(argv: list[str]) -> None:
    parser = Parser("prepare folder", "training and trial lists of a folder <speaker>/<session>/<utterance>")
    parser.add_argument("source", metavar="SOURCE", help=f"the folder{_ARCHIVE} into OUT, and stays there")
    parser.add_argument("out", metavar="OUT", help="folder for train_list.txt and trials.txt")
    parser.add_argument("--test-speakers", type=int, metavar="N", help="speakers kept for trials [a fifth, 2 at least]")
    parser.add_argument(
        "--trials-per-speaker", type=int, default=60, metavar="N", help="most same-speaker trials of each [60]"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice [0]")
    add_json(parser)
    args = parser.parse_args(argv)
    _at_least(args, seed=0, trials_per_speaker=1)

    from spkfast.data import archives
    from spkfast.data.folder import scan, split, write_lists

    out = Path(args.out)
    for name in ("train_list.txt", "trials.txt"):
        if (out / name).exists():
            raise InputError(f"{out / name}: is there already; remove it or name another folder")
    root = Path(args.source)
    if archives.is_archive(root):
        with meter("extracting") as update:
            root = _inner(archives.extract(root, out / root.name.split(".")[0], progress=update))
    utterances = scan(root, warn=_say)
    speakers = len({utterance.speaker for utterance in utterances})
    test_speakers = max(2, speakers // 5) if args.test_speakers is None else args.test_speakers
    train, trials = split(utterances, test_speakers, trials_per_speaker=args.trials_per_speaker, seed=args.seed)
    train_list, trial_list = write_lists(out, train, trials)
    targets = sum(trial.target for trial in trials)
    result = {
        "root": str(root),
        "train_list": str(train_list),
        "trials": str(trial_list),
        "speakers": speakers,
        "test_speakers": test_speakers,
        "utterances": len(train),
        "targets": targets,
        "nontargets": len(trials) - targets,
    }
    print_result(result, args.json)


def _shards(argv: list[str]) -> None:
    from spkfast.data.shards import FORMATS, OPUS_KBITS

    parser = Parser("prepare shards", "tar files with an index, of any corpus; --verify checks those that are there")
    parser.add_argument("source", metavar="SOURCE", help=f"manifest or folder, as for 'spkfast describe'{_ARCHIVE}")
    parser.add_argument("out", metavar="OUT", nargs="?", help="folder for the shards; not with --verify")
    parser.add_argument("--verify", action="store_true", help="compare every utterance of SOURCE with its checksum")
    parser.add_argument("--root", metavar="FOLDER", help="where relative paths start from [the folder of SOURCE]")
    parser.add_argument("--speakers", metavar="FILE", help="lines 'utterance speaker' that go before what SOURCE says")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="flac",
        help=f"flac, opus at {OPUS_KBITS} kbit/s, or copy: the bytes of whole files as they are [flac]",
    )
    parser.add_argument("--sample-rate", type=int, default=16000, metavar="HZ", help="rate of flac and opus [16000]")
    parser.add_argument(
        "--shard-megabytes", type=float, default=256, metavar="MB", help="size at which the next shard begins [256]"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads [one per core, 8 at most]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order in the shards [0]")
    add_json(parser)
    args = parser.parse_args(argv)
    if bool(args.out) == args.verify:
        parser.error("give either OUT or --verify")

    from spkfast.data.manifests import read_corpus
    from spkfast.data.shards import verify_shards, write_shards

    if args.verify:
        with meter("verifying") as update:
            utterances, damaged = verify_shards(args.source, progress=update)
        for line in damaged[:_MOST_LINES]:
            _say(line)
        if len(damaged) > _MOST_LINES:
            _say(f"and {len(damaged) - _MOST_LINES} more")
        if damaged:
            raise InputError(f"{args.source}: {len(damaged)} of {utterances} utterances are damaged")
        print_result({"shards": args.source, "utterances": utterances, "damaged": 0}, args.json)
        return
    _check_free(args.out)
    with _extracted(args.source, args.out) as source:
        corpus = read_corpus(source, root=args.root, speakers=args.speakers, warn=_say)
        with meter("writing shards") as update:
            written = write_shards(
                corpus,
                args.out,
                format=args.format,
                shard_megabytes=args.shard_megabytes,
                sample_rate=args.sample_rate,
                workers=args.workers,
                seed=args.seed,
                progress=update,
                warn=_say,
            )
    result = {
        "folder": str(written.folder),
        "utterances": written.utterances,
        "speakers": len(corpus.speakers),
        "hours": written.seconds / 3600,
        "shards": written.shards,
        "bytes": written.bytes,
        "left_out": written.left_out,
    }
    print_result(result, args.json, shown=result | {"left_out": len(written.left_out)})


def _noise(argv: list[str]) -> None:
    parser = Parser("prepare noise", "a bank of noise or of impulse responses, held in memory while training")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help=f"folder of recordings; those in music/, noise/ and speech/ are of that category{_ARCHIVE}",
    )
    parser.add_argument("out", metavar="OUT", help="folder of the bank")
    parser.add_argument("--rir", action="store_true", help="the recordings are room impulse responses")
    parser.add_argument("--sample-rate", type=int, default=16000, metavar="HZ", help="rate of the bank [16000]")
    add_json(parser)
    args = parser.parse_args(argv)
    _at_least(args, sample_rate=1)

    from spkfast.data.banks import CATEGORIES, Bank, is_unfinished

    if not is_unfinished(args.out):
        _check_free(args.out)
    with _extracted(args.source, args.out, CATEGORIES) as source, meter("reading recordings") as update:
        bank = Bank.from_folder(source, args.sample_rate, _say, rir=args.rir, out=args.out, progress=update)
    counts = {name: bank.categories.count(name) for name in sorted(set(bank.categories))}
    result = {"folder": args.out, "sample_rate": bank.sample_rate, "hours": bank.seconds / 3600, "recordings": counts}
    print_result(result, args.json)


_KINDS = {"folder": _folder, "shards": _shards, "noise": _noise}


@contextlib.contextmanager
def _extracted(source: str, out: str, telling: Collection[str] = ()) -> Iterator[Path]:
    """The source, or the folder that an archive was extracted into: beside ``out``, and for as long as it is read."""
    from spkfast.data import archives

    if not archives.is_archive(source):
        yield Path(source)
        return
    beside = Path(out).absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{Path(out).name}.source-", dir=beside) as folder:
        with meter("extracting") as update:
            extracted = archives.extract(source, Path(folder) / "source", progress=update)
        yield _inner(extracted, telling)


def _inner(folder: Path, telling: Collection[str] = ()) -> Path:
    """The first folder, from this one down, that holds more than one folder: archives wrap what they hold.

    One of the ``telling`` names is where it ends, as the name says what is inside.
    """
    inside = list(folder.iterdir())
    wraps = len(inside) == 1 and inside[0].is_dir() and folder.name not in telling
    return _inner(inside[0], telling) if wraps else folder


def _check_free(out: str) -> None:
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise InputError(f"{out}: is there already; name another folder")


def _at_least(args: object, **least: int) -> None:
    for name, value in least.items():
        if getattr(args, name) < value:
            raise InputError(f"--{name.replace('_', '-')} must be at least {value}, got {getattr(args, name)}")


def _say(message: str) -> None:
    print(message, file=sys.stderr)
