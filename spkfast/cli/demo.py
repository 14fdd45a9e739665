"""``spkfast demo``: data, training, embeddings, evaluation, fast against reference and a report, in minutes."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spkfast.backends import Backend, info
from spkfast.cli.common import Parser, add_json, embed_all, meter, print_result, progress, rates, shown_rates
from spkfast.cli.train import follow
from spkfast.errors import InputError
from spkfast.training.config import DataConfig, ModelConfig, TrainConfig

if TYPE_CHECKING:
    from spkfast.data.lists import Trial
    from spkfast.evaluation import TrialResult
    from spkfast.inference import SpeakerEncoder

HELP = "data, training, embeddings and evaluation in minutes, with a report; synthetic voices by default"

_MODEL = {"channels": 64, "mfa_channels": 192, "embedding_dim": 128, "attention_channels": 32, "se_channels": 32}
_BUNDLED = "ecapa-mini"
_PATHS: dict[Backend, str] = {"reference": "reference path", "auto": "fast path"}
_BATCH = 32
_REPEATS = 5
_TIMED = 40  # utterances: enough for a rate, few enough for a demo


def main(argv: list[str]) -> None:
    """Runs ``spkfast demo``."""
    parser = Parser("demo", HELP)
    parser.add_argument(
        "--data",
        help="folder with train_list.txt and trials.txt, or with <speaker>/<session>/<utterance>; without it a "
        "synthetic corpus is made",
    )
    parser.add_argument("--out", default="demo", help="folder for everything that is made [demo]")
    parser.add_argument("--steps", type=int, default=400, help="training steps, about a minute on two cores [400]")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random [0]")
    add_json(parser)
    args = parser.parse_args(argv)
    if args.steps < 1 or args.seed < 0:
        raise InputError(f"--steps must be at least 1 and --seed at least 0, got {args.steps} and {args.seed}")
    out = _folder(Path(args.out))

    _say("1/4 data")
    root, train_list, trial_list, origin = _data(args.data, out, args.seed)
    _say("2/4 training")
    from spkfast.data.audio import audio_info
    from spkfast.data.folder import check_disjoint
    from spkfast.data.lists import read_train_list, read_trials, trial_paths

    trials = read_trials(trial_list)
    utterances = read_train_list(train_list)
    check_disjoint(utterances, trials)
    paths = trial_paths(trials)
    for path in paths:  # before a minute of training rather than after
        audio_info(root / path)
    config = TrainConfig(
        out=str(out / "training"),
        model=ModelConfig(options=dict(_MODEL)),
        data=DataConfig(train_list=str(train_list), root=str(root), crop_seconds=1.5),
        steps=args.steps,
        batch_size=min(_BATCH, len(utterances)),
        seed=args.seed,
    )
    started = time.monotonic()
    trained, untrained, bad = _train(config)
    training_seconds = time.monotonic() - started

    if bad:
        _say(f"{len(bad)} files skipped in training")
    _say("3/4 embedding and evaluation")
    rows, systems = _evaluate(trained, untrained, trials, paths, root)
    result = {
        "data": origin,
        "trials": {"targets": sum(t.target for t in trials), "nontargets": sum(not t.target for t in trials)},
        "training_seconds": training_seconds,
        "systems": rows,
        "report": str(out / "report.html"),
    }
    _say("4/4 report")
    _report(out, result, systems)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print_result(result, args.json)


def _folder(path: Path) -> Path:
    """The output folder, which must be new, empty or an earlier demo's, as parts of it are replaced."""
    marker = path / ".spkfast-demo"
    if path.exists() and not marker.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: holds something else than a demo; name another --out")
    path.mkdir(parents=True, exist_ok=True)
    marker.touch()
    return path


def _data(data: str | None, out: Path, seed: int) -> tuple[Path, Path, Path, str]:
    """Root of the audio, training list, trial list, and where the data comes from in words."""
    from spkfast.data import folder

    if data is None:
        from spkfast.data.synthetic import make_corpus

        with meter("synthesising speech") as update:
            root = make_corpus(out / "data", seed=seed, progress=update)
        return root, root / "train_list.txt", root / "trials.txt", "synthetic voices, made by this command"
    root = Path(data)
    lists = root / "train_list.txt", root / "trials.txt"
    if all(path.is_file() for path in lists):
        return root, *lists, f"{root}, with its own lists"
    utterances = folder.scan(root, warn=_say)
    speakers = len({utterance.speaker for utterance in utterances})
    train, trials = folder.split(utterances, max(2, speakers // 5), seed=seed)
    return (
        root,
        *folder.write_lists(out / "lists", train, trials),
        f"{root}, a fifth of {speakers} speakers kept for trials",
    )


def _train(config: TrainConfig) -> tuple[SpeakerEncoder, SpeakerEncoder, list[str]]:
    """The trained encoder, one of the same network before training, and what was wrong with files passed over."""
    import shutil

    import torch

    from spkfast import models
    from spkfast.inference import SpeakerEncoder
    from spkfast.training.loop import Trainer

    shutil.rmtree(config.out, ignore_errors=True)  # an earlier demo
    trainer = Trainer(config, warn=_say)
    follow(trainer)
    torch.manual_seed(config.seed)
    spec = trainer.encoder.frontend
    untrained = models.create(config.model.name, feature_dim=spec.output_size, **config.model.options)
    return trainer.encoder, SpeakerEncoder(untrained, spec), trainer.bad_files


def _evaluate(
    trained: SpeakerEncoder, untrained: SpeakerEncoder, trials: Sequence[Trial], paths: list[str], root: Path
) -> tuple[list[dict[str, Any]], dict[str, TrialResult]]:
    """A row of figures for each system, and its scores."""
    import numpy as np
    import torch

    from spkfast import models
    from spkfast.evaluation import evaluate_trials
    from spkfast.functional import log_mel_fbank
    from spkfast.inference import SpeakerEncoder

    contenders: dict[str, tuple[SpeakerEncoder, Backend]] = {"untrained network": (untrained, "auto")}
    contenders |= {name: (trained, backend) for backend, name in _PATHS.items()}
    contenders[_BUNDLED] = SpeakerEncoder.load(models.bundled.folder(_BUNDLED)), "auto"
    embeddings = {
        name: embed_all(encoder, root, paths, backend=backend, description=f"embedding, {name}")
        for name, (encoder, backend) in contenders.items()
    }

    some = [trained.load_audio(root / path) for path in paths[:_TIMED]]
    seconds = sum(len(w) for w in some) / trained.frontend.sample_rate
    lengths = torch.tensor([len(w) for w in some])
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(w) for w in some], batch_first=True)

    def fbank(backend: Backend) -> Callable[[], object]:
        return lambda: log_mel_fbank(padded, lengths, spec=trained.frontend, backend=backend)

    def embed(backend: Backend) -> Callable[[], object]:
        # One batch, as the features above: the embedding is then the features and the network on the same tensor.
        return lambda: trained.embed_batch(some, backend=backend, batch_seconds=padded.numel())

    fbank_times = _interleaved({name: fbank(backend) for backend, name in _PATHS.items()})
    embed_times = _interleaved({name: embed(backend) for backend, name in _PATHS.items()})
    baseline = embeddings[_PATHS["reference"]]
    rows, systems = [], {}
    for name, values in embeddings.items():
        systems[name] = evaluate_trials(trials, paths, values)
        row: dict[str, Any] = {"system": name, **rates(systems[name])}
        if name in fbank_times:
            row |= {
                "fbank_x_real_time": seconds / statistics.median(fbank_times[name]),
                "embed_x_real_time": seconds / statistics.median(embed_times[name]),
                "fbank_spread": max(fbank_times[name]) / min(fbank_times[name]) - 1,
                "embed_spread": max(embed_times[name]) / min(embed_times[name]) - 1,
                "max_relative_difference": float(np.abs(values - baseline).max() / np.abs(baseline).max()),
            }
        rows.append(row)
    return rows, systems


def _interleaved(runs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each run, the contenders taking turns after one unmeasured round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in progress(range(_REPEATS + 1), description="timing"):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - started)
    return times


def _report(out: Path, result: dict[str, Any], systems: dict[str, TrialResult]) -> None:
    from spkfast.evaluation.plots import det_plot, loss_curve, score_histogram
    from spkfast.evaluation.report import write_report
    from spkfast.training.loop import read_log

    log = read_log(out / "training")
    fast, bundled = systems[_PATHS["auto"]], systems[_BUNDLED]
    table = [
        {
            "system": row["system"],
            **shown_rates(row),
            **_shown_speed(row),
        }
        for row in result["systems"]
    ]  # fmt: skip
    write_report(
        out / "report.html",
        title="spkfast demo",
        notes=[
            f"Data: {result['data']}.",
            "Test speakers do not occur in training. The interval is over speakers (bootstrap).",
            "The fast path computes the features with the native kernel where it is built, the reference path in plain "
            "torch; the network is the same, so their error rates should agree and their DET curves coincide. The "
            "largest difference is that between their embeddings, relative to the largest value.",
            f"Speeds are medians of {_REPEATS} runs that took turns on {_TIMED} recordings, with the spread from "
            "fastest to slowest: a ratio below it means nothing.",
            f"{_BUNDLED} comes with the package and was not trained on this data, unless that is of the corpora that "
            "its card names.",
            "EER: the rate at which as many same-speaker trials are refused as different-speaker trials are accepted; "
            "50 % is chance. minDCF: the least cost of a threshold where one trial in a hundred is a target.",
        ],
        summary={
            "error rate of the trained network": f"{fast.eer.value * 100:.1f} %",
            "of an untrained one": f"{systems['untrained network'].eer.value * 100:.1f} %",
            f"of {_BUNDLED}": f"{bundled.eer.value * 100:.1f} %",
            "machine": f"{info()['cpu']['threads']} threads, {info()['cpu']['level']}",
            "training": f"{result['training_seconds']:.0f} s",
            "trials": f"{result['trials']['targets']} target, {result['trials']['nontargets']} non-target",
        },
        table=table,
        figures={
            "Detection error trade-off": det_plot({name: (r.scores, r.labels) for name, r in systems.items()}),
            "Scores, fast path": score_histogram(fast.scores, fast.labels, threshold=fast.eer.threshold),
            f"Scores, {_BUNDLED}": score_histogram(bundled.scores, bundled.labels, threshold=bundled.eer.threshold),
            "Training loss": loss_curve(
                [entry["step"] for entry in log],
                [entry["loss"] for entry in log],
                accuracies=[entry["accuracy"] for entry in log],
            ),
        },
    )


def _shown_speed(row: dict[str, Any]) -> dict[str, str]:
    if "fbank_x_real_time" not in row:
        return {}
    return {
        "features, x real time": f"{row['fbank_x_real_time']:.0f} (spread {100 * row['fbank_spread']:.0f} %)",
        "audio to embedding, x real time": f"{row['embed_x_real_time']:.0f} (spread {100 * row['embed_spread']:.0f} %)",
        "largest difference": f"{row['max_relative_difference']:.1e}",
    }


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
