"""The command ``verify``: score and decision for two files."""

from __future__ import annotations

from spkfast.cli.common import FILE_HELP, Parser, add_backend, add_json, add_precision, load_encoder, print_result

HELP = "score and decision for two files"
# What spkfast.training.validation calls the trials of such speakers; it would load all that training needs.
_HELD_OUT = "held_out"


def main(argv: list[str]) -> None:
    """Runs ``spkfast verify``."""
    parser = Parser("verify", HELP)
    parser.add_argument("a", metavar="A", help="audio file")
    parser.add_argument("b", metavar="B", help="audio file")
    parser.add_argument("--model", required=True, help=FILE_HELP)
    add_precision(parser)
    add_backend(parser)
    add_json(parser)
    args = parser.parse_args(argv)

    encoder = load_encoder(args.model, args.precision)
    score, same_speaker, threshold = encoder.verify(args.a, args.b, backend=args.backend)
    result = {
        "score": score,
        "same_speaker": same_speaker,
        "threshold": threshold,
        "threshold_list": encoder.threshold.list if encoder.threshold else None,
    }
    if threshold is None:
        decision = "none (the model has no threshold)"
    else:
        origin = result["threshold_list"]
        origin = "speakers held out of its training" if origin == _HELD_OUT else origin
        words = "same speaker" if same_speaker else "different speakers"
        decision = f"{words} (threshold {threshold:.4f}, set on {origin})"
    print_result(result, args.json, shown={"cosine": f"{score:.4f}", "decision": decision})
