"""The command ``verify``: score and decision for two files."""

from __future__ import annotations

from spkfast.cli.common import MODEL_HELP, Parser, add_backend, add_json, add_precision, print_result

HELP = "score and decision for two files"


def main(argv: list[str]) -> None:
    """Runs ``spkfast verify``."""
    parser = Parser("verify", HELP)
    parser.add_argument("a", metavar="A", help="audio file")
    parser.add_argument("b", metavar="B", help="audio file")
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    add_precision(parser)
    add_backend(parser)
    add_json(parser)
    args = parser.parse_args(argv)

    from spkfast.inference import SpeakerEncoder

    encoder = SpeakerEncoder.load(args.model, precision=args.precision)
    score, same_speaker, threshold = encoder.verify(args.a, args.b, backend=args.backend)
    result = {
        "score": score,
        "same_speaker": same_speaker,
        "threshold": threshold,
        "threshold_list": encoder.threshold.list if encoder.threshold else None,
    }
    decision = {
        None: "none (the model has no threshold)",
        True: f"same speaker (threshold {threshold}, set on {result['threshold_list']})",
        False: f"different speakers (threshold {threshold}, set on {result['threshold_list']})",
    }[same_speaker]
    print_result(result, args.json, shown={"cosine": f"{score:.4f}", "decision": decision})
