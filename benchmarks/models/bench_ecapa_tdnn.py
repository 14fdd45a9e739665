"""What unlike lengths in a batch cost an ECAPA-TDNN: ``python -m benchmarks.models.bench_ecapa_tdnn --out FILE``."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import comparison, timing
from benchmarks.machine import describe_machine
from spkfast import models
from spkfast.memory import keep_freed_memory
from spkfast.models import SpeakerModel

_THREADS = 2
_BATCH, _FRAMES, _BINS = 16, 300, 80
_DIALECTS = ("wespeaker", "speechbrain", "taoruijie", "espnet")


def main() -> None:
    """Prints times and goals; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="rounds, each contender once a round")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    torch.set_num_threads(_THREADS)
    keep_freed_memory()
    machine = describe_machine()
    results = [_row(dialect, args.repeats) for dialect in _DIALECTS]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"op": "ecapa_tdnn", "machine": machine, "threads": _THREADS, "remark": comparison.REMARK}
        args.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


def _row(dialect: str, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = models.create("ecapa_tdnn", dialect=dialect, feature_dim=_BINS).eval()
    features = torch.randn(_BATCH, _FRAMES, _BINS)
    lengths = torch.randint(_FRAMES // 2, _FRAMES + 1, (_BATCH,))
    lengths[0] = _FRAMES
    rows = [_embed(model, features[b : b + 1, :n]) for b, n in enumerate(lengths.tolist())]
    result = comparison.compare(
        f"{dialect}, 512 channels, forward",
        f"{_BATCH} x {_FRAMES} frames",
        {"lengths from half to full": lambda: [_embed(model, features, lengths)]},
        exact=[_embed(copy.deepcopy(model).double(), features.double(), lengths)],
        definition=[torch.cat(rows)],  # each utterance alone
        repeats=repeats,
        parts={"all frames real": lambda: [_embed(model, features)]},
    )
    times = {name: row["median_ms"] for name, row in result["contenders"].items()}
    cost = times["lengths from half to full"] / times["all frames real"]
    return comparison.finish(result, [timing.Figure("lengths / none", cost, at_most=1.1)])


@torch.inference_mode()
def _embed(model: SpeakerModel, features: Tensor, lengths: Tensor | None = None) -> Tensor:
    return model(features, lengths)


if __name__ == "__main__":
    main()
