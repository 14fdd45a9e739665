"""Augmentation and features of a batch on a GPU, from int16 crops.

    python -m benchmarks.data.bench_augmentation_gpu [--out FILE] [--repeats N] [--device cpu]

``make gpu-check`` runs it too. It needs torch and numpy, from a checkout. Crops, noise and responses are random; every
crop changes its speed or not, gets a room and then a noise. ``--device cpu`` tries the plumbing at a tiny size.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import checkout, comparison, timing
from benchmarks.models.bench_ecapa_gpu import figures_of, turn

PARTS = {"augmentation and features": 512}
# Of the features, against the same on the CPU: what float32 transforms of other sizes leave in quiet frames.
_MOST_ERROR = 1e-2


def main() -> None:
    """Prints times and goals; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="rounds, each contender once a round")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("nothing measured: torch finds no CUDA device")
        return
    results = [measure(name, args.device, args.repeats) for name in PARTS]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"device": args.device, "models": results}, indent=1) + "\n")


def measure(name: str, device_name: str, repeats: int = 20) -> dict[str, Any]:
    """Checks and times a part, for the record; on a CPU at a tiny size."""
    checkout.map_kernels()
    device = torch.device(device_name)
    batch, samples = (PARTS[name], 32000) if device.type == "cuda" else (4, 4000)
    if device.type == "cpu":
        repeats = 1
    made, arguments = _module(batch, samples), _arguments(batch, samples)
    keys = arguments[-1]
    # A few rows on the CPU: rows do not depend on one another.
    some = [value[:4] for value in arguments]
    expected = made(*some, made.augment.draw(some[-1]))
    made = made.to(device)
    for bank in (made.augment.noise, made.augment.rir):
        bank.to(device)
    plan = made.augment.draw(keys)
    moved = [value.to(device) for value in arguments[:-1]]
    error = float((made(*moved, keys, plan)[:4].cpu() - expected).abs().max())
    waveforms = made.augment(*moved, plan=plan)
    calls = {
        "spkfast, int16 to features": lambda: made(*moved, keys, plan),
        "spkfast, draws included": lambda: made(*moved, keys),
        "spkfast, int16 to waveforms": lambda: made.augment(*moved, plan=plan),
        "spkfast, waveforms to features": lambda: made.fbank(waveforms),
    }
    timings, spread = timing.in_turns({key: functools.partial(turn, call, device) for key, call in calls.items()},
                                      repeats=repeats)  # fmt: skip
    rows = {
        key: time.to_dict()
        | {"utterances_per_s": batch / time.median, "max_error": error, "counts": error <= _MOST_ERROR}
        for key, time in timings.items()
    }
    result = {
        "case": name,
        "workload": f"{batch} crops of {samples / 16000:g} s",
        "aa_spread": spread,
        "contenders": rows,
        "absent": {},
    }
    return comparison.finish(result, figures_of(name, rows))


def _module(batch: int, samples: int) -> Any:
    from spkfast.data.augmentation import Augment, AugmentedFbank
    from spkfast.data.banks import Bank
    from spkfast.data.recipes import Choice, Noise, Recipe, Reverb, Stage
    from spkfast.frontends import frontend
    from spkfast.nn import Fbank
    from spkfast.reference.change_speed import half_width

    generator = torch.Generator().manual_seed(0)
    noise = _samples((60 * samples,), generator)
    rooms = _samples((40 * 8000,), generator)
    speeds = (1.0, 0.9, 1.1)
    recipe = Recipe((Stage((Choice((Reverb(),)),)), Stage((Choice((Noise(),)),))), speeds)
    augment = Augment(
        recipe,
        Bank(noise, [2 * samples] * 30, [""] * 30, ["noise"] * 30, 16000),
        Bank(rooms, [8000] * 40, [""] * 40, ["rir"] * 40, 16000),
        num_samples=samples,
        context=max(half_width(speed) for speed in speeds),
    )
    return AugmentedFbank(augment, Fbank(frontend("wespeaker"), validate=False)).eval()


def _arguments(batch: int, samples: int) -> list[Tensor]:
    """Crops, lengths, speeds and keys."""
    from spkfast.reference.change_speed import half_width, source_samples

    generator = torch.Generator().manual_seed(1)
    context, longest = half_width(1.1), source_samples(samples, 1.1)
    return [
        _samples((batch, 2 * context + longest), generator),
        torch.full((batch,), longest + context),
        torch.arange(batch) % 3,
        torch.randint(2**62, (batch,), generator=generator),
    ]


def _samples(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return (3000 * torch.randn(shape, generator=generator)).round().clamp(-32768, 32767).to(torch.int16)


if __name__ == "__main__":
    main()
