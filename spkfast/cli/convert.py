"""The command ``convert``: another toolkit's checkpoint into spkfast's folder, with a report of every key."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spkfast.cli.common import Parser, add_json, print_result
from spkfast.errors import InputError

if TYPE_CHECKING:
    from spkfast.inference import SpeakerEncoder

HELP = "another toolkit's checkpoint into a model folder, with a report of every key"

_CHECK_SECONDS = 3


def main(argv: list[str]) -> None:
    """Runs ``spkfast convert``."""
    parser = Parser("convert", HELP)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="file of weights, or folder, of an ECAPA-TDNN of wespeaker, speechbrain, 3D-Speaker, TaoRuijie or ESPnet",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the model to write")
    parser.add_argument("--family", metavar="F", help="toolkit, where the keys do not tell: speechbrain or 3dspeaker")
    parser.add_argument(
        "--frontend", metavar="PRESET", help="front-end to take in place of the one that file or family tell"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="K=V",
        help="keyword of the network that the weights do not tell, such as 'dilations=[1, 2, 3, 4]'; repeatable",
    )
    parser.add_argument("--force", action="store_true", help="replace another model in the folder of --out")
    add_json(parser)
    args = parser.parse_args(argv)

    options = dict(_option(text) for text in args.option)
    for name in ("family", "frontend"):
        if name in options:
            raise InputError(f"--option {name}=...: use --{name}")

    from spkfast import frontends
    from spkfast.inference import SpeakerEncoder, find_model, is_own
    from spkfast.models.checkpoint_files import import_checkpoint

    if is_own(find_model(args.checkpoint)):
        raise InputError(f"{args.checkpoint}: already a spkfast model folder")
    found = import_checkpoint(args.checkpoint, family=args.family, frontend=args.frontend, **options)
    network = found.network
    if Path(args.out).resolve() in (found.file.parent.resolve(), found.file.resolve().parent):
        raise InputError(f"--out {args.out}: is the folder of the checkpoint; name another")
    encoder = SpeakerEncoder(network.model, found.frontend, device="cpu")
    signal = check_signal(found.frontend.sample_rate)
    try:
        embedding = encoder.embed(signal)
    except (RuntimeError, TypeError, OverflowError) as error:  # of torch, about sizes that no shape tells
        detail = str(error).split("\n", 1)[0]
        raise InputError(f"{found.file}: the network does not run with these options: {detail}") from error
    except InputError as error:  # its words are about the signal, which is not to blame
        state = network.model.state_dict()
        bad = next((theirs for theirs, ours in network.renamed if not state[ours].isfinite().all()), None)
        reason = str(error) if bad is None else f"gives no finite embedding: {bad} holds NaN or infinite values"
        raise InputError(f"{found.file}: {reason}") from error
    if not args.force:
        _keep_another(Path(args.out), encoder)
    encoder.save(args.out)
    again = SpeakerEncoder.load(args.out, device="cpu").embed(signal)
    if not bool((again == embedding).all()):
        raise InputError(f"{args.out}: self-check failed: the folder gives another embedding than the checkpoint")

    head = None if network.head is None else list(network.head.shape)
    dropped = [{"key": key, "reason": reason} for key, reason in network.dropped]
    check: dict[str, Any] = {
        "signal": f"{_CHECK_SECONDS} s at {found.frontend.sample_rate} Hz, sample n: "
        "((n * n // 500 + 137 * n) % 16001 - 8000) / 32768",
        "embedding": embedding.tolist(),
        "norm": float(embedding.norm()),
        "same_after_reload": True,
    }
    result: dict[str, Any] = {
        "checkpoint": str(found.file),
        "settings": None if found.settings is None else str(found.settings),
        "out": args.out,
        "family": network.family,
        "found_by": network.found_by,
        "parameters": sum(parameter.numel() for parameter in network.model.parameters()),
        "head": head,
        "model": {"name": encoder.model.name, "config": network.config},
        "assumed": network.assumed,
        "frontend": found.frontend.to_dict(),
        "frontend_from": found.frontend_from,
        "renamed": [{"theirs": theirs, "ours": ours} for theirs, ours in network.renamed],
        "dropped": dropped,
        "unused_files": [{"file": name, "reason": reason} for name, reason in found.unused],
        "self_check": check,
    }
    preset = frontends.frontend(network.family)
    shown = {
        "checkpoint": result["checkpoint"],
        "settings": result["settings"] or "none beside it",
        "family": f"{network.family} ({network.found_by})",
        "front-end": found.frontend_from,
        f"unlike preset {network.family}": found.frontend.difference(preset) or "nothing",
        "parameters": result["parameters"],
        "keys": f"{len(network.renamed)} taken, {len(dropped)} dropped",
        "training head": "none" if head is None else f"{head[0]} x {head[1]}, not written",
        "assumed": ", ".join(f"{name} {network.config[name]}" for name in network.assumed) or "nothing",
        "written to": args.out,
        "network": {key: str(value) for key, value in network.config.items()},
        "dropped keys": dropped,
        "files not needed": result["unused_files"],
        "self-check": {
            "signal": check["signal"],
            "first values": " ".join(f"{value:.6f}" for value in check["embedding"][:6]),
            "norm": f"{check['norm']:.6f}",
            "same after reload": "to the last bit",
        },
    }
    print_result(result, args.json, shown={key: value for key, value in shown.items() if value != []})


def _keep_another(out: Path, encoder: SpeakerEncoder) -> None:
    """Refuses a folder that holds another model, and takes over the threshold of the same one.

    Raises:
        InputError: If ``out`` holds a model of spkfast with another fingerprint, or a damaged one.
    """
    from spkfast.inference import SpeakerEncoder, is_own

    if not any((out / name).is_file() and is_own(out / name) for name in ("config.yaml", "model.safetensors")):
        return
    try:
        there = SpeakerEncoder.load(out, device="cpu")
    except InputError as error:
        raise InputError(
            f"--out {out}: holds a damaged model; name another folder, or --force to replace it"
        ) from error
    if there.fingerprint != encoder.fingerprint:
        raise InputError(f"--out {out}: holds another model; name another folder, or --force to replace it")
    encoder.threshold = there.threshold


def check_signal(sample_rate: int) -> Any:
    """A sawtooth that rises in pitch, int16, shape (S,): integers alone, so that any program makes the same.

    Sample n is ``(n * n // 500 + 137 * n) % 16001 - 8000``.
    """
    import numpy as np

    n = np.arange(_CHECK_SECONDS * sample_rate, dtype=np.int64)
    return ((n * n // 500 + 137 * n) % 16001 - 8000).astype(np.int16)


def _option(text: str) -> tuple[str, Any]:
    """Name and value of ``name=value``, the value as YAML writes it."""
    import yaml

    name, separator, value = text.partition("=")
    if not separator or not name:
        raise InputError(f"--option {text}: expected name=value")
    try:
        return name, yaml.safe_load(value)
    except Exception as error:  # what YAML's own types meet in a bad value is not always an error of YAML
        raise InputError(f"--option {text}: {' '.join(str(error).split())}") from error
