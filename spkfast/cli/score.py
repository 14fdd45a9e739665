"""The command ``score``: scores of a trial list from embeddings, normalised and calibrated where asked for."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spkfast.cli.common import Parser, add_json, print_result
from spkfast.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from spkfast.data.embeddings import StoredEmbeddings
    from spkfast.data.lists import TrialList

HELP = "scores of a trial list: cosine or PLDA, AS-norm, S-norm, calibration, QMF"

_TOP_N = 300
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
    matrix, enrol, test = _sides(args, trials, stored, mean)
    scores = _raw(args, model, matrix, enrol, test)
    cohort_means = None
    if args.norm:
        scores, cohort_means = _normalised(args, model, mean, matrix, enrol, test, scores)
    scores = _calibrated(args, trials, scores, enrol, test, matrix, cohort_means)
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
        if getattr(args, option) and not args.norm:
            parser.error(f"--{option.replace('_', '-')} needs --norm")
    if args.speakers and not args.cohort_means:
        parser.error("--speakers needs --cohort-means")
    if args.plda and (args.norm or args.mean):
        parser.error("--plda has its own mean and no cohort: leave --mean and --norm out")
    given = [name for name in ("calibration", "fit_calibration", "qmf", "fit_qmf") if getattr(args, name)]
    if len(given) > 1:
        parser.error(f"--{given[0].replace('_', '-')} and --{given[1].replace('_', '-')} exclude each other")
    if (args.qmf or args.fit_qmf) and not args.norm:
        parser.error("quality measures need --norm and --cohort: the mean of the cohort is one of them")
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


def _sides(
    args: Any, trials: TrialList, stored: StoredEmbeddings, mean: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings, and the row of each side of each trial; averages stand after the utterances."""
    import numpy as np

    from spkfast.evaluation import enrol, read_spk2utt

    matrix = _less(stored.embeddings, mean)
    if not args.enrol:
        first, tests = trials.rows(stored.keys)
        return matrix, first, tests
    utterances = read_spk2utt(args.enrol)
    names, models = enrol(matrix, {name: stored.rows(those) for name, those in utterances.items()})
    place = {name: len(matrix) + k for k, name in enumerate(names)}
    of_name = [place.get(name, -1) for name in trials.names]
    first = np.array(of_name)[trials.enrol]
    if (first < 0).any():
        at = int(np.argmax(first < 0))
        raise InputError(
            f"{trials.names[trials.enrol[at]]}: {trials.where(at)} enrols this name, but {args.enrol} does not have it"
        )
    (tests,) = trials.rows(stored.keys, "test")
    return np.concatenate([matrix, models]), first, tests


def _raw(args: Any, model: str | None, matrix: np.ndarray, enrol: np.ndarray, test: np.ndarray) -> np.ndarray:
    from spkfast.evaluation import Plda, cosine_scores

    if not args.plda:
        return cosine_scores(matrix, enrol, test)
    plda = Plda.load(args.plda) if Path(args.plda).suffix == ".safetensors" else Plda.from_kaldi(args.plda)
    _same_model(args.plda, plda.model, model)
    return plda.scores(matrix, enrol, test)


def _normalised(
    args: Any, model: str | None, mean: Any, matrix: np.ndarray, enrol: np.ndarray, test: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Normalised scores, and the mean score of each embedding with the cohort."""
    import numpy as np

    from spkfast.data.embeddings import read_embeddings
    from spkfast.evaluation import cohort_statistics, normalized
    from spkfast.evaluation import enrol as averaged

    stored = read_embeddings(args.cohort)
    _same_model(args.cohort, stored.model, model)
    cohort = _less(stored.embeddings, mean)
    if args.cohort_means:
        from spkfast.data.lists import speaker_of
        from spkfast.data.manifests import read_speakers

        told = read_speakers(args.speakers) if args.speakers else {}
        cohort = averaged(cohort, [told.get(key) or speaker_of(key) for key in stored.keys], normalize=False)[1]
    top_n = args.top_n or (_TOP_N if args.norm == "as" else None)
    used = np.concatenate([enrol, test])
    statistics = cohort_statistics(matrix, cohort, top_n=top_n, unbiased=args.unbiased, index=used)
    sides = {"z": "enrol", "t": "test"}.get(args.norm, "both")
    return normalized(scores, enrol, test, statistics, sides=sides), statistics.mean


def _calibrated(
    args: Any,
    trials: TrialList,
    scores: np.ndarray,
    enrol: np.ndarray,
    test: np.ndarray,
    matrix: np.ndarray,
    cohort_means: Any,
) -> np.ndarray:
    from spkfast.evaluation import LogisticCalibration, Qmf, wespeaker_quality

    if args.calibration:
        return LogisticCalibration.load(args.calibration).apply(scores)
    if args.fit_calibration:
        calibration = LogisticCalibration.fit(scores, trials.labels, description=args.trials)
        calibration.save(args.fit_calibration)
        return calibration.apply(scores)
    if not (args.qmf or args.fit_qmf):
        return scores
    import numpy as np

    used = np.unique(np.concatenate([enrol, test]))  # others have no cohort mean
    place = np.zeros(len(matrix), dtype=np.int64)
    place[used] = np.arange(len(used))
    durations = _durations(args, trials, enrol, test, len(matrix)) if args.durations else None
    features = wespeaker_quality(
        scores,
        place[enrol],
        place[test],
        magnitudes=np.linalg.norm(matrix[used], axis=1),
        cohort_means=cohort_means[used],
        durations_s=None if durations is None else durations[used],
    )
    if args.qmf:
        return Qmf.load(args.qmf).apply(features)
    qmf = Qmf.fit(features, trials.labels, description=args.trials)
    qmf.save(args.fit_qmf)
    return qmf.apply(features)


def _durations(args: Any, trials: TrialList, enrol: np.ndarray, test: np.ndarray, rows: int) -> np.ndarray:
    """Seconds of each embedding that a trial uses."""
    import numpy as np

    from spkfast.data.manifests import read_speakers as read_pairs

    seconds = read_pairs(args.durations)
    of_name = np.ones(len(trials.names))
    for k, name in enumerate(trials.names):
        try:
            of_name[k] = float(seconds[name])
        except KeyError:
            raise InputError(f"{args.durations}: has no duration of {name}, which the trials name") from None
        except ValueError:
            raise InputError(f"{args.durations}: the duration of {name} is no number: {seconds[name]!r}") from None
    of_row = np.ones(rows)
    of_row[enrol], of_row[test] = of_name[trials.enrol], of_name[trials.test]
    return of_row


def _write(path: Path, trials: TrialList, scores: np.ndarray) -> None:
    """The scores, in a file that is whole or not there."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".npy":
            with fresh.open("wb") as file:
                np.save(file, scores)
        else:
            with fresh.open("w", encoding="utf-8") as text:
                text.writelines(f"{line}\n" for line in trials.text(scores))
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
