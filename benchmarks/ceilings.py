"""What a machine can do at most: reading and copying memory, and matrix products of each precision.

    python -m benchmarks.ceilings --out FILE [--threads N ...] [--mib N] [--size N] [--repeats N]

A benchmark that says how many GB/s or GFLOP/s it reaches is held against this; see :func:`share`.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import timing

_PRECISIONS = {"fp32": r"fp32|float32", "bf16": r"bf16|bfloat16", "int8": r"int8"}


def main() -> None:
    """Measures, prints and writes JSON: by the number of threads, rates by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--mib", type=int, default=1024, help="size of an array in memory, far above the caches")
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the matrices")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, the fastest of which counts")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    best: dict[str, float] = {}
    for threads in sorted(args.threads):
        # More threads can do what fewer can; that they were slower says that other work shares the cores.
        rates = measure(threads, args.mib, args.size, args.repeats)
        best = found[str(threads)] = {name: max(rate, best.get(name, 0.0)) for name, rate in rates.items()}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for threads, rates in found.items():
        print(f"ceilings, {threads} thread(s): " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))


def measure(threads: int, mib: int, size: int, repeats: int) -> dict[str, float]:
    """Highest rates that were seen.

    Args:
        threads: Threads of torch.
        mib: Size of an array in memory, in MiB.
        size: Rows and columns of the matrices.
        repeats: Rounds.

    Returns:
        ``read_gb_per_s``, ``copy_gb_per_s`` (what is read and what is written), and ``<precision>_gflop_per_s``.
    """
    import torch

    torch.set_num_threads(threads)
    source = torch.ones(mib * 2**18)
    target = torch.empty_like(source)
    work: dict[str, tuple[str, float, Callable[[], object]]] = {
        "read": ("read_gb_per_s", source.nbytes, source.amax),
        "copy": ("copy_gb_per_s", 2 * source.nbytes, functools.partial(target.copy_, source)),
    }
    for precision, forms in _products(size).items():
        for number, multiply in enumerate(forms):
            work[f"{precision}, {number}"] = (f"{precision}_gflop_per_s", 2 * size**3, multiply)
    with torch.inference_mode():
        timings, _ = timing.interleaved({key: call for key, (_, _, call) in work.items()}, repeats=repeats)
    rates: dict[str, float] = {}
    for key, (name, amount, _) in work.items():
        rates[name] = max(rates.get(name, 0.0), 1e-9 * amount / min(timings[key].seconds))
    return rates


def share(
    ceilings: Mapping[str, Mapping[str, float]], threads: int, case: str, name: str, row: Mapping[str, Any]
) -> float | None:
    """Part of the nearest ceiling that a contender reaches; None where the record does not tell which one applies.

    Args:
        ceilings: What :func:`main` writes.
        threads: Threads of the record, where neither contender nor case says otherwise.
        case: Case of the row.
        name: Contender.
        row: Its times and rates.
    """
    said = re.search(r"(\d+) thread", f"{name}, {case}")
    rates = ceilings.get(said[1] if said else str(threads), {})
    parts = []
    if "gb_per_s" in row and "read_gb_per_s" in rates:
        parts.append(row["gb_per_s"] / max(rates["read_gb_per_s"], rates["copy_gb_per_s"]))
    # The contender's own name first: a case may name several.
    told = (precision for text in (name, case) for precision, word in _PRECISIONS.items() if re.search(word, text))
    ceiling = rates.get(f"{next(told, None)}_gflop_per_s")
    if "gflop_per_s" in row and ceiling:
        parts.append(row["gflop_per_s"] / ceiling)
    return max(parts, default=None)


def _products(size: int) -> dict[str, list[Callable[[], object]]]:
    """Products of square matrices, in each precision by every library function that there is: the best one counts."""
    import torch

    x = torch.randn(size, size)
    products: dict[str, list[Callable[[], object]]] = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = x.to(dtype)
        products[precision] = [functools.partial(torch.mm, a, a, out=torch.empty_like(a))]
        if torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(a, size)
            linear = torch.ops.mkldnn._linear_pointwise
            products[precision].append(functools.partial(linear, a, packed, None, "none", [], ""))
    whole = (20 * x).to(torch.int8)
    products["int8"] = [functools.partial(torch._int_mm, whole, whole)]
    return products


if __name__ == "__main__":
    main()
