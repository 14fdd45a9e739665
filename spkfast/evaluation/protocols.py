"""What an error rate was measured on: public trial lists by name, and the parts of an utterance that are compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from spkfast.errors import InputError, check_name

if TYPE_CHECKING:
    from spkfast.backends import Backend
    from spkfast.inference import SpeakerEncoder

_FILES_AT_ONCE = 16
_TRIALS_AT_ONCE = 2048


@dataclass(frozen=True)
class Protocol:
    """A trial list that the field knows by name.

    Attributes:
        name: As ``spkfast evaluate --protocol`` takes it.
        trials: Usual name of the file.
        num_trials: How many trials it has; None for any.
        metrics: What is reported on it, for :func:`spkfast.evaluation.estimates`.
    """

    name: str
    trials: str
    num_trials: int | None
    metrics: tuple[str, ...] = ("eer", "min_dcf:0.01", "min_dcf:0.05")


# Of the lists that the makers of VoxCeleb publish, as they are and cleaned of errors.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("vox1-o", "veri_test.txt", 37_720),
        Protocol("vox1-o-cleaned", "veri_test2.txt", 37_611),
        Protocol("vox1-e", "list_test_all.txt", 581_480),
        Protocol("vox1-e-cleaned", "list_test_all2.txt", 579_818),
        Protocol("vox1-h", "list_test_hard.txt", 552_536),
        Protocol("vox1-h-cleaned", "list_test_hard2.txt", 550_894),
        Protocol("voxsrc", "trials.txt", None, ("min_dcf:0.05", "eer")),
    )
}


def find_protocol(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        InputError: If there is none.
    """
    check_name("protocol", name, list(PROTOCOLS))
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Crops:
    """Parts of an utterance that are embedded one by one.

    The score of a trial is the mean of the cosines of all pairs of crops, or that and the cosine of whole utterances in
    equal parts; or minus the mean of the distances of embeddings of length one.

    Attributes:
        whole: Whether the whole utterance is embedded.
        count: Number of crops, equally spaced; 0 for none.
        seconds: Length of a crop. A shorter utterance is repeated until it is as long.
        distance: Whether distances are taken in place of cosines.
    """

    whole: bool = True
    count: int = 0
    seconds: float = 0.0
    distance: bool = False

    @classmethod
    def parse(cls, text: str) -> Crops:
        """From ``whole``, ``10x4`` (ten crops of 4 s), ``whole+5x3`` (TaoRuijie), or ``10x4:distance``
        (voxceleb_trainer, ESPnet).

        Raises:
            InputError: If the text has another form.
        """
        parts, _, measure = text.partition(":")
        match = re.fullmatch(r"(whole)?(?:(?:(?<=whole)\+|(?<!whole))(\d+)x(\d+(?:\.\d+)?))?", parts)
        empty = match is not None and match[2] is not None and not (int(match[2]) and float(match[3]))
        wrong = measure and (measure != "distance" or (match is not None and match[1]))
        if not parts or match is None or empty or wrong:
            raise InputError(
                f"crops must be 'whole', '10x4' for ten of 4 seconds, 'whole+5x3', or '10x4:distance', got {text!r}"
            )
        return cls(match[1] is not None, int(match[2] or 0), float(match[3] or 0), bool(measure))

    def __str__(self) -> str:
        parts = "+".join(["whole"] * self.whole + [f"{self.count}x{self.seconds:g}"] * (self.count > 0))
        return f"{parts}:distance" if self.distance else parts

    def cut(self, samples: np.ndarray, sample_rate: int) -> list[np.ndarray]:
        """The crops of an utterance (S,), without the whole."""
        size = round(self.seconds * sample_rate)
        if len(samples) < size:
            samples = np.resize(samples, size)
        starts = np.linspace(0, len(samples) - size, self.count).astype(int)
        return [samples[start : start + size] for start in starts]


def embed_for_scoring(
    encoder: SpeakerEncoder,
    paths: Sequence[str | Path],
    crops: Crops,
    *,
    backend: Backend = "auto",
    batch_seconds: float = 60.0,
) -> Iterator[torch.Tensor]:
    """Vectors whose dot products are the scores of :class:`Crops`, one for each file.

    That is the embedding of the whole divided by its length, the mean of the embeddings of the crops, each divided by
    its length, or both, over the root of two, one after the other. For distances, of which no products are the scores,
    it is the embeddings of the crops, one after the other, for :func:`distance_scores`.

    Args:
        encoder: The model.
        paths: Audio files.
        crops: What is compared.
        backend: Implementation of the front-end.
        batch_seconds: Most audio in one batch.

    Yields:
        Shape (E,), (2 E,) for both, or (count E,) for distances, float32.

    Raises:
        InputError: If a file cannot be used.
    """
    options = {"normalize": True, "backend": backend, "batch_seconds": batch_seconds}
    for start in range(0, len(paths), _FILES_AT_ONCE):
        audios = [encoder.load_audio(path) for path in paths[start : start + _FILES_AT_ONCE]]
        parts = []
        if crops.whole:
            parts.append(encoder.embed_batch(audios, **options))  # type: ignore[arg-type]
        if crops.count:
            cut = [crop for audio in audios for crop in crops.cut(audio, encoder.frontend.sample_rate)]
            embedded = encoder.embed_batch(cut, **options)  # type: ignore[arg-type]
            embedded = embedded.view(len(audios), crops.count, -1)
            parts.append(embedded.flatten(1) if crops.distance else embedded.mean(dim=1))
        yield from torch.cat(parts, dim=1) / len(parts) ** 0.5


@torch.inference_mode()
def distance_scores(crops: torch.Tensor, enrol: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """Minus the mean of the distances between the crops of both sides of each trial.

    Args:
        crops: Embeddings of length one, floating, shape (U, count, E).
        enrol: Row of the first side of each trial, int64, shape (trials,).
        test: Row of the second side.

    Returns:
        Shape (trials,).
    """
    scores = crops.new_empty(len(enrol))
    for start in range(0, len(enrol), _TRIALS_AT_ONCE):
        part = slice(start, start + _TRIALS_AT_ONCE)
        cosines = crops[enrol[part]] @ crops[test[part]].transpose(1, 2)
        scores[part] = -(2 - 2 * cosines).clamp_min(0).sqrt().mean(dim=(1, 2))
    return scores
