"""The command ``score``: scores of a trial list from embeddings, normalised and calibrated where asked for."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spkfast.cli.common import Parser, add_json, print_result, speakers_of_keys
from spkfast.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from spkfast.data.embeddings import StoredEmbeddings
    from spkfast.data.lists import TrialList

HELP = "scores of a trial list: cosine or PLDA, AS-norm, S-norm, calibration, QMF"

_TOP_N = 300
_WAY = "; scores by "
_NOT_SCORES = (".safetensors", ".npz", ".parquet", ".ark", ".scp", ".json")
_EMBEDDINGS_HELP = "as 'spkfast embed' writes them: .safetensors, .npz, .npy, .parquet, .scp, .ark or a folder"


def main(argv: list[str]) -> None:
    """Runs ``spkfast score``."""
    parser = Parser("score", HELP)
    parser.add_argument(
        "trials",
        metavar="TRIALS",
        help="lines 'label enrol test' (1, 0), 'enrol test label' (target, nontarget), or 'enrol test'",
    )
    parser.add_argument("embeddings", metavar="EMBEDDINGS", help=_EMBEDDINGS_HELP)
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the lines with the score at their end; or X.npy, the scores alone"
    )
    parser.add_argument("--enrol", metavar="SPK2UTT", help="lines 'name utterance ...': averages for the first sides")
    parser.add_argument("--plda", metavar="FILE", help="score with this model of spkfast or of Kaldi, not by cosine")
    parser.add_argument("--plda-mean", metavar="FILE", help="Kaldi's mean.vec, which is subtracted before that model")
    parser.add_argument("--plda-transform", metavar="FILE", help="Kaldi's transform.mat, applied before that model")
    parser.add_argument("--norm", choices=("as", "s", "z", "t"), help="normalise with the cohort; 'as' is adaptive")
    parser.add_argument("--cohort", metavar="EMBEDDINGS", help="of the cohort, for --norm")
    parser.add_argument(
        "--cohort-means", action="store_true", help="one mean for each speaker of the cohort, the first folder of a key"
    )
    parser.add_argument(
        "--speakers", metavar="FILE", help="lines 'utterance speaker', for --cohort-means where keys do not tell"
    )
    parser.add_argument("--top-n", type=int, metavar="N", help=f"nearest of the cohort that count [{_TOP_N} with 'as']")
    parser.add_argument(
        "--unbiased", action="store_true", help="deviations as speechbrain and ESPnet divide, by one less"
    )
    parser.add_argument("--mean", metavar="EMBEDDINGS", help="whose mean is subtracted from all embeddings")
    parser.add_argument("--calibration", metavar="JSON", help="apply this calibration: log-likelihood ratios come out")
    parser.add_argument("--fit-calibration", metavar="JSON", help="learn a calibration on these trials, and apply it")
    parser.add_argument("--qmf", metavar="JSON", help="apply this calibration on quality measures")
    parser.add_argument("--fit-qmf", metavar="JSON", help="learn it on these trials, and apply it")
    parser.add_argument("--durations", metavar="FILE", help="lines 'utterance seconds', for quality measures")
    parser.add_argument("--allow-duplicates", action="store_true", help="trials may be there twice")
    add_json(parser)
    args = parser.parse_args(argv)
    _check(parser, args)

    from spkfast.data.embeddings import read_embeddings
    from spkfast.data.lists import read_trials

    started = time.monotonic()
    labelled = True if args.fit_calibration or args.fit_qmf else None
    trials = read_trials(args.trials, labelled=labelled, duplicates=args.allow_duplicates)
    stored = read_embeddings(args.embeddings)
    model = stored.model
    read = time.monotonic()
    mean = _mean(args, model)
    used = _used(args, trials, stored, mean)
    scores = _raw(args, model, used)
    cohort_means = None
    if args.norm:
        scores, cohort_means = _normalised(args, model, mean, used, scores)
    scores = _calibrated(args, model, trials, scores, used, cohort_means)
    scored = time.monotonic()
    _write(Path(args.out), trials, scores)
    result = {
        "out": args.out,
        "trials": len(trials),
        "embeddings": len(stored),
        "lowest": float(scores.min()),
        "highest": float(scores.max()),
        "seconds_reading": read - started,
        "seconds_scoring": scored - read,
        "seconds": time.monotonic() - started,
    }
    print_result(result, args.json)


def _check(parser: Parser, args: Any) -> None:
    """Refuses options that need others."""
    if bool(args.norm) != bool(args.cohort):
        parser.error("--norm and --cohort go together")
    for option in ("top_n", "unbiased", "cohort_means"):
        if getattr(args, option) not in (None, False) and not args.norm:
            parser.error(f"--{option.replace('_', '-')} needs --norm")
    out = Path(args.out)
    if out.suffix in _NOT_SCORES or out.is_dir():
        parser.error(f"--out must be a text file or end with .npy, got {args.out}")
    inputs = ("trials", "embeddings", "enrol", "plda", "plda_mean", "plda_transform", "cohort", "speakers", "mean")
    for name in (*inputs, "calibration", "qmf", "durations", "fit_calibration", "fit_qmf"):
        path = getattr(args, name)
        if path and (args.out == path or (out.is_file() and Path(path).exists() and out.samefile(path))):
            parser.error(f"--out {args.out} is what {path} is: name another file")
    if args.speakers and not args.cohort_means:
        parser.error("--speakers needs --cohort-means")
    if args.plda and (args.norm or args.mean):
        parser.error("--plda goes without --norm, which is for cosines, and without --mean: see --plda-mean")
    if (args.plda_mean or args.plda_transform) and (not args.plda or Path(args.plda).suffix == ".safetensors"):
        parser.error("--plda-mean and --plda-transform go with a file of Kaldi in --plda")
    given = [name for name in ("calibration", "fit_calibration", "qmf", "fit_qmf") if getattr(args, name)]
    if len(given) > 1:
        parser.error(f"--{given[0].replace('_', '-')} and --{given[1].replace('_', '-')} exclude each other")
    if (args.qmf or args.fit_qmf) and not args.norm:
        parser.error("quality measures need --norm and --cohort: the mean of the cohort is one of them")
    if (args.qmf or args.fit_qmf) and args.enrol:
        parser.error("quality measures are of single utterances: leave --enrol out")
    if args.durations and not (args.qmf or args.fit_qmf):
        parser.error("--durations needs --qmf or --fit-qmf")


def _same_model(name: str, other: str | None, model: str | None) -> None:
    """Refuses what another network made, where both tell theirs."""
    if model is not None and other is not None and model != other:
        raise InputError(f"{name}: is of model {other}, the embeddings of the trials of {model}")


def _mean(args: Any, model: str | None) -> Any:
    from spkfast.data.embeddings import read_embeddings

    if not args.mean:
        return None
    stored = read_embeddings(args.mean)
    _same_model(args.mean, stored.model, model)
    return stored.embeddings.mean(axis=0, dtype="float64").astype("float32")


def _less(embeddings: np.ndarray, mean: Any) -> np.ndarray:
    if mean is None:
        return embeddings
    if mean.shape != embeddings.shape[1:]:
        raise InputError(f"--mean has {len(mean)} dimensions, the embeddings have {embeddings.shape[1]}")
    return embeddings - mean


class _Trials(NamedTuple):
    """Embeddings that the trials use, and where both sides of each trial are among them.

    Attributes:
        embeddings: Shape (U, E): utterances, then averages where speakers were enrolled.
        enrol: Row of the first side of each trial.
        test: Row of the second side.
        num_utterances: How many utterances each row is the average of, shape (U,).
    """

    embeddings: np.ndarray
    enrol: np.ndarray
    test: np.ndarray
    num_utterances: np.ndarray


def _used(args: Any, trials: TrialList, stored: StoredEmbeddings, mean: Any) -> _Trials:
    """What the trials use of the stored embeddings, which may be many more."""
    import numpy as np

    from spkfast.evaluation import enrol

    (tests,) = trials.rows(stored.keys, "test")
    if not args.enrol:
        (enrolled,) = trials.rows(stored.keys, "enrol")
        used, place = np.unique(np.concatenate([enrolled, tests]), return_inverse=True)
        rows = _checked(args.embeddings, stored, used, mean)
        return _Trials(rows, place[: len(trials)], place[len(trials) :], np.ones(len(rows), dtype=np.int64))
    groups, sides = _enrolment(args, trials, stored)
    used, place = np.unique(np.concatenate([tests, *groups.values()]), return_inverse=True)
    rows = _checked(args.embeddings, stored, used, mean)
    placed = {name: np.searchsorted(used, group) for name, group in groups.items()}
    # PLDA knows how many utterances an average has, and that of raw embeddings, as Kaldi takes it.
    _, models = enrol(rows, placed, normalize=not args.plda)
    counts = [len(group) for group in groups.values()]
    return _Trials(
        np.concatenate([rows, models]),
        len(rows) + sides,
        place[: len(tests)],
        np.concatenate([np.ones(len(rows), dtype=np.int64), counts]),
    )


def _enrolment(args: Any, trials: TrialList, stored: StoredEmbeddings) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of each speaker that a trial enrols, and the place of each trial's among them."""
    import numpy as np

    from spkfast.evaluation import read_spk2utt

    utterances = read_spk2utt(args.enrol)
    place: dict[str, int] = {}
    of_name = np.full(len(trials.names), -1)
    for k in np.unique(trials.enrol).tolist():
        name = trials.names[k]
        if name not in utterances:
            at = int(np.argmax(trials.enrol == k))
            raise InputError(f"{name}: {trials.where(at)} enrols this name, but {args.enrol} does not have it")
        of_name[k] = place.setdefault(name, len(place))
    try:
        groups = {name: stored.rows(utterances[name]) for name in place}
    except InputError as error:
        raise InputError(f"{args.enrol}: {error}") from error
    return groups, of_name[trials.enrol]


def _checked(file: str, stored: StoredEmbeddings, rows: np.ndarray, mean: Any) -> np.ndarray:
    """Those rows, less the mean; refuses what has no direction, by its key."""
    from spkfast.evaluation.scoring import as_matrix, lengths

    found = _less(stored.embeddings[rows], mean)
    _, wrong = lengths(as_matrix(found, "embeddings"))
    if wrong is not None:
        raise InputError(f"{file}: the embedding of {stored.keys[rows[wrong]]} must be finite and not zero")
    return found


def _raw(args: Any, model: str | None, used: _Trials) -> np.ndarray:
    from spkfast.evaluation import Plda, cosine_scores

    if not args.plda:
        return cosine_scores(used.embeddings, used.enrol, used.test)
    if Path(args.plda).suffix == ".safetensors":
        plda = Plda.load(args.plda)
    else:
        plda = Plda.from_kaldi(args.plda, mean=args.plda_mean, transform=args.plda_transform)
    _same_model(args.plda, plda.model, model)
    return plda.scores(used.embeddings, used.enrol, used.test, num_enrol=used.num_utterances)


def _normalised(
    args: Any, model: str | None, mean: Any, used: _Trials, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Normalised scores, and the mean score of each embedding with the cohort."""
    from spkfast.data.embeddings import read_embeddings
    from spkfast.evaluation import cohort_statistics, normalized
    from spkfast.evaluation import enrol as averaged

    stored = read_embeddings(args.cohort)
    _same_model(args.cohort, stored.model, model)
    cohort = _less(stored.embeddings, mean)
    if args.cohort_means:
        speakers = speakers_of_keys(args.speakers, stored.keys)
        cohort = averaged(cohort, [speakers[key] for key in stored.keys], normalize=False)[1]
    if args.top_n is None and args.norm == "as" and len(cohort) < _TOP_N:
        raise InputError(f"{args.cohort}: the cohort has {len(cohort)}, of which {_TOP_N} would count: give --top-n")
    statistics = cohort_statistics(used.embeddings, cohort, top_n=_top_n(args), unbiased=args.unbiased)
    sides = {"z": "enrol", "t": "test"}.get(args.norm, "both")
    return normalized(scores, used.enrol, used.test, statistics, sides=sides), statistics.mean


def _top_n(args: Any) -> int | None:
    return _TOP_N if args.top_n is None and args.norm == "as" else args.top_n


def _calibrated(
    args: Any, model: str | None, trials: TrialList, scores: np.ndarray, used: _Trials, cohort_means: Any
) -> np.ndarray:
    import numpy as np

    from spkfast.evaluation import LogisticCalibration, Qmf, wespeaker_quality

    kind = Qmf if args.qmf or args.fit_qmf else LogisticCalibration
    inputs: Any = scores
    if kind is Qmf:
        inputs = wespeaker_quality(
            scores,
            used.enrol,
            used.test,
            magnitudes=np.linalg.norm(used.embeddings, axis=1),
            cohort_means=cohort_means,
            durations_s=_durations(args, trials, used) if args.durations else None,
        )
    # How the scores came about, so that what was learnt on others is not applied to them.
    way = f"{'PLDA' if args.plda else 'cosine'}, norm {args.norm}, top {_top_n(args)}, model {model}"
    if given := args.calibration or args.qmf:
        fitted = kind.load(given)
        if kind is Qmf and len(fitted.weights) != inputs.shape[1]:
            with_durations = "without --durations" if args.durations else "with --durations, or by another toolkit's"
            raise InputError(
                f"{given}: has {len(fitted.weights)} weights for {inputs.shape[1]} measures: learnt {with_durations}"
            )
        told = str((fitted.fitted_on or {}).get("description", "")).partition(_WAY)[2]
        if told and told != way:
            raise InputError(f"{given}: was learnt on scores by {told}; these are by {way}")
        return fitted.apply(inputs)
    if target := args.fit_calibration or args.fit_qmf:
        fitted = kind.fit(inputs, trials.labels, description=f"{args.trials}{_WAY}{way}")
        fitted.save(target)
        return fitted.apply(inputs)
    return scores


def _durations(args: Any, trials: TrialList, used: _Trials) -> np.ndarray:
    """Seconds of each embedding."""
    import numpy as np

    from spkfast.data.manifests import read_durations

    seconds = read_durations(args.durations)
    missing = next((name for name in trials.names if name not in seconds), None)
    if missing is not None:
        raise InputError(f"{args.durations}: has no duration of {missing}, which the trials name")
    of_name = np.array([seconds[name] for name in trials.names])
    of_row = np.ones(len(used.embeddings))
    of_row[used.enrol], of_row[used.test] = of_name[trials.enrol], of_name[trials.test]
    return of_row


def _write(path: Path, trials: TrialList, scores: np.ndarray) -> None:
    """The scores, in a file that is whole or not there; into a device or pipe straight."""
    import numpy as np

    lines = (f"{line}\n" for line in trials.text(scores))
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as text:
            text.writelines(lines)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".npy":
            with fresh.open("wb") as file:
                np.save(file, scores)
        else:
            with fresh.open("w", encoding="utf-8") as text:
                text.writelines(lines)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
