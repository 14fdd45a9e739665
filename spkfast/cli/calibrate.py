"""The command ``calibrate``: ranges that int8 needs, from audio into a model folder, and what int8 costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spkfast.cli.common import MODEL_HELP, BadFiles, Parser, add_json, print_result, progress
from spkfast.cli.embed import INPUTS_HELP, collect
from spkfast.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from spkfast.inference import SpeakerEncoder

HELP = "ranges for int8 from a folder of audio, into a model folder"

_CHECKED = ("int8", "bf16")


def main(argv: list[str]) -> None:
    """Runs ``spkfast calibrate``."""
    parser = Parser("calibrate", HELP)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("audio", nargs="+", metavar="AUDIO", help=INPUTS_HELP)
    parser.add_argument("--out", metavar="FOLDER", help="folder of the model to write [that of MODEL]")
    parser.add_argument(
        "--max-utterances", type=int, default=200, metavar="N", help="most utterances to calibrate on [200]"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice among more utterances [0]")
    add_json(parser)
    args = parser.parse_args(argv)
    if args.max_utterances < 1 or args.seed < 0:
        raise InputError(
            f"--max-utterances must be at least 1 and --seed at least 0, got {args.max_utterances} and {args.seed}"
        )
    # One by one: two folders may hold files of the same name.
    files = sorted({path for text in args.audio for path in collect([text]).values()})

    from spkfast.inference import SpeakerEncoder

    out = _target(args.model, args.out)
    encoder = SpeakerEncoder.load(args.model, device="cpu")  # int8 runs there
    encoder.precision = "bf16"  # as int8 needs kernels: to learn of their lack before hours of audio are read
    encoder.precision = "fp32"
    utterances, skipped = _choose(encoder, files, args.max_utterances, args.seed)
    held_out = utterances[: max(1, len(utterances) // 5)]
    used = utterances[len(held_out) :]
    ranges = encoder.calibrate(used)
    check = _check(encoder, held_out)
    encoder.save(out)
    result = {
        "out": str(out),
        "calibrated_on": len(used),
        "held_out": len(held_out),
        "skipped": skipped,
        "check": check,
        "input_ranges": ranges,
    }
    layers = [
        {
            "layer": name,
            "inputs": len(of_layer),
            "lowest": min(low for low, _ in of_layer.values()),
            "highest": max(high for _, high in of_layer.values()),
        }
        for name, of_layer in ranges.items()
    ]
    shown = {
        "written to": str(out),
        "calibrated on": f"{len(used)} utterances",
        "ranges": layers,
        f"cosine with fp32, {len(held_out)} other utterances": [
            {
                "precision": row["precision"],
                "mean": f"{row['mean_cosine']:.6f}",
                "lowest": f"{row['lowest_cosine']:.6f}",
            }
            for row in check
        ],
    }
    print_result(result, args.json, shown=shown)


def _target(model: str, out: str | None) -> Path:
    """The folder to write, of which saving may replace everything.

    Raises:
        InputError: If it is not such a folder, or MODEL is no folder of spkfast and there is no other.
    """
    from spkfast.inference import check_target, find_model, is_own, model_folder

    source = find_model(model)
    own = is_own(source)
    if out is None and not own:
        raise InputError(f"{model}: is another toolkit's checkpoint; name the folder to write with --out")
    target = model_folder(source) if out is None else Path(out)
    if out is not None and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"--out {out}: is there already; name another, or leave it out to write into MODEL")
    check_target(target)
    return target


def _choose(encoder: SpeakerEncoder, files: list[Path], most: int, seed: int) -> tuple[list[np.ndarray], int]:
    """Audio of at most a quarter more files than ``most``, in random order, and how many could not be used.

    Raises:
        InputError: If there are not two.
    """
    import numpy as np

    bad = BadFiles(strict=False)
    order = [files[i] for i in np.random.default_rng(seed).permutation(len(files))]
    wanted = min(most + max(1, most // 4), len(order))
    utterances: list[np.ndarray] = []
    for path in progress(order, wanted, "reading"):
        try:
            utterances.append(encoder.load_audio(path))
        except InputError as error:
            bad.skip(error)
        if len(utterances) == wanted:
            break
    bad.close(len(files))
    if len(utterances) < 2:
        raise InputError("calibration needs at least 2 utterances, one of them for the check; got 1")
    return utterances, bad.count


def _check(encoder: SpeakerEncoder, utterances: list[np.ndarray]) -> list[dict[str, Any]]:
    """How near embeddings of each precision are to those of fp32."""
    from torch.nn.functional import cosine_similarity

    encoder.precision = "fp32"
    exact = encoder.embed_batch(utterances).double()
    rows: list[dict[str, Any]] = []
    for precision in _CHECKED:
        encoder.precision = precision
        cosines = cosine_similarity(encoder.embed_batch(utterances).double(), exact)
        rows.append(
            {
                "precision": precision,
                "mean_cosine": float(cosines.mean()),
                "lowest_cosine": float(cosines.min()),
            }
        )
    encoder.precision = "fp32"
    return rows
