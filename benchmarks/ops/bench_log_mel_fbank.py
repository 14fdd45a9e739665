"""Speed of log_mel_fbank on the CPU beside its peers: ``python -m benchmarks.ops.bench_log_mel_fbank --out FILE``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import spkfast
from benchmarks import baselines, shapes, timing
from benchmarks.machine import describe_machine
from spkfast import functional

# The kernel may err this many times as much as the float32 definition: the bound of its parity test.
_BOUND = 4.0


def main() -> None:
    """Prints a table; with ``--out`` writes JSON too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads of every contender that can use them")
    parser.add_argument("--repeats", type=int, default=10, help="rounds, each contender once a round")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    results = [_measure(workload, args.repeats) for workload in shapes.FBANK]
    record = {"op": "log_mel_fbank", "machine": describe_machine(), "threads": args.threads, "results": results}
    for result in results:
        noisy = "  NOISY: repeat on an idle machine" if result["aa_spread"] > timing.NOISY else ""
        print(f"{result['workload']}, {args.threads} thread(s), A/A spread {100 * result['aa_spread']:.1f} %{noisy}")
        for name, row in result["contenders"].items():
            print(
                f"  {name:22} {row['median_ms']:9.3f} ms ({row['min_ms']:.3f} to {row['max_ms']:.3f}), "
                f"{row['x_real_time']:8.0f} x real time, max error {row['max_error']:.1e}"
            )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def _measure(workload: shapes.Waveforms, repeats: int) -> dict[str, Any]:
    spec = spkfast.frontend("wespeaker", mean_norm=False)  # what the peer computes; the mean costs next to nothing
    waveforms, lengths = workload.inputs()

    def ours(backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
        with torch.inference_mode():
            return functional.log_mel_fbank(waveforms.to(dtype), lengths, spec=spec, backend=backend)[0]

    contenders: dict[str, Callable[[], Any]] = {
        "native": lambda: ours("native"),
        "reference (batched)": lambda: ours("reference"),
    }
    peer = baselines.kaldi_native_fbank(spec, waveforms)
    if peer:
        contenders["kaldi-native-fbank"] = peer

    exact = ours("reference", torch.float64).numpy()
    errors = {name: float(np.abs(np.asarray(call()) - exact).max()) for name, call in contenders.items()}
    if errors["native"] > _BOUND * errors["reference (batched)"]:
        raise SystemExit(f"not timed: the native kernel errs by {errors['native']:.1e} on {workload}")
    timings, spread = timing.interleaved(contenders, repeats=repeats)
    rows = {
        name: {
            **time.to_dict(),
            "x_real_time": workload.batch * workload.seconds / time.median,
            "max_error": errors[name],
        }
        for name, time in timings.items()
    }
    return {"workload": str(workload), "aa_spread": spread, "contenders": rows}


if __name__ == "__main__":
    main()
