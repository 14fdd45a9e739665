"""The command ``bench``: starts the benchmarks of the checkout that the package is installed from."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import spkfast
from spkfast.cli.common import Parser, add_json
from spkfast.errors import InputError

HELP = "every benchmark of a checkout beside its peers: speed, error, memory, EER"

GROUPS = ("ops", "models", "pipeline", "accuracy")


def main(argv: list[str]) -> int:
    """Runs ``spkfast bench`` and returns its exit status, that of the benchmarks."""
    parse(argv)
    root = _checkout()
    # Not from within the checkout, since --out is relative to where the user stands; -P, since there may be benchmarks.
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen([sys.executable, "-P", "-m", "benchmarks", *argv], env=os.environ | {"PYTHONPATH": path})
    try:
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return status if status >= 0 else 128 - status


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments of the command, which are those of ``python -m benchmarks``; ``options`` are those after ``--``."""
    parser = Parser("bench", f"{HELP}; options after -- go to the benchmarks themselves")
    parser.add_argument("group", nargs="?", choices=(*GROUPS, "all"), default="all", help="which benchmarks [all]")
    parser.add_argument("--list", action="store_true", help="only name the benchmarks, and what they need")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only those of the group with these names")
    parser.add_argument("--quick", action="store_true", help="few repeats and small sizes, to see that all works")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder to write [benchmarks/results/MACHINE in the checkout; build/bench/MACHINE with --quick]",
    )
    add_json(parser)
    own = argv.index("--") if "--" in argv else len(argv)
    args: argparse.Namespace = parser.parse_args(argv[:own])
    args.options = argv[own + 1 :]
    return args


def _checkout() -> Path:
    """The checkout beside the package.

    Raises:
        InputError: If the package was installed without one.
    """
    root = Path(spkfast.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise InputError(
            f"{root} has no benchmarks, which are not installed with the package: "
            "get the source, run 'make setup' in it, and there '.venv/bin/spkfast bench'"
        )
    return root
