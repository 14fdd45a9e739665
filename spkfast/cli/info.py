"""The command ``info``: what runs here, and why anything is missing."""

from __future__ import annotations

from typing import Any

from spkfast.cli.common import Parser, add_json, print_result

HELP = "what is installed, what runs where, and why anything is missing"


def main(argv: list[str]) -> None:
    """Runs ``spkfast info``."""
    parser = Parser("info", HELP)
    add_json(parser)
    args = parser.parse_args(argv)

    import spkfast

    info = spkfast.info()
    shown = {**info, "gpus": info["gpus"] or "none", "extras": _packages(info["extras"]), "ops": _rows(info["ops"])}
    print_result(info, args.json, shown=shown)


def _packages(extras: dict[str, dict[str, str | None]]) -> list[dict[str, str]]:
    return [
        {"extra": extra, "package": name, "state": version or f"missing: pip install 'spkfast[{extra}]'"}
        for extra, packages in extras.items()
        for name, version in packages.items()
    ]


def _rows(ops: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"op": op, "device": device, "backend": backend, "state": _state(facts, device, backend)}
        for op, facts in ops.items()
        for device in facts["available"]
        for backend in (*facts["available"][device], *facts["missing"][device])
    ]


def _state(facts: dict[str, Any], device: str, backend: str) -> str:
    if backend == facts["chosen"][device]:
        return "runs, chosen by auto"
    return f"missing: {facts['missing'][device][backend]}" if backend in facts["missing"][device] else "runs"
