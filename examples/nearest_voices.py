"""Which recordings of a folder sound most alike? ``python examples/nearest_voices.py FOLDER [MODEL]``."""

import sys
from pathlib import Path

import spkfast


def main(folder: str, model: str = "ecapa-mini") -> None:
    """Prints, for every recording, the one whose voice is nearest and the cosine between them."""
    encoder = spkfast.SpeakerEncoder.load(model)
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".wav", ".flac"))

    # Any lengths mixed: a padded batch gives each recording the embedding that it gives alone.
    embeddings = encoder.embed_batch(paths, normalize=True)

    # Of unit vectors, the cosine is the inner product; a recording is not its own neighbour.
    cosines = embeddings @ embeddings.T
    cosines.fill_diagonal_(-1)
    for path, row in zip(paths, cosines, strict=True):
        print(f"{path}\t{paths[int(row.argmax())]}\t{float(row.max()):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
