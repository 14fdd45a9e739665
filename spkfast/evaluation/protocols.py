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
    equal parts.

    Attributes:
        whole: Whether the whole utterance is embedded.
        count: Number of crops, equally spaced; 0 for none.
        seconds: Length of a crop. A shorter utterance is repeated until it is as long.
    """

    whole: bool = True
    count: int = 0
    seconds: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Crops:
        """From ``whole``, ``10x4`` (ten crops of 4 s), or ``whole+5x3`` (TaoRuijie).

        voxceleb_trainer and ESPnet cut crops likewise, but score by distances instead of cosines: their error rates
        differ in the last digits.

        Raises:
            InputError: If the text has another form.
        """
        match = re.fullmatch(r"(whole)?(?:(?:(?<=whole)\+|(?<!whole))(\d+)x(\d+(?:\.\d+)?))?", text)
        empty = match is not None and match[2] is not None and not (int(match[2]) and float(match[3]))
        if not text or match is None or empty:
            raise InputError(f"crops must be 'whole', '10x4' for ten of 4 seconds, or 'whole+5x3', got {text!r}")
        return cls(match[1] is not None, int(match[2] or 0), float(match[3] or 0))

    def __str__(self) -> str:
        return "+".join(["whole"] * self.whole + [f"{self.count}x{self.seconds:g}"] * (self.count > 0))

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
    its length, or both, over the root of two, one after the other.

    Args:
        encoder: The model.
        paths: Audio files.
        crops: What is compared.
        backend: Implementation of the front-end.
        batch_seconds: Most audio in one batch.

    Yields:
        Shape (E,), or (2 E,) for both, float32.

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
            parts.append(embedded.view(len(audios), crops.count, -1).mean(dim=1))
        yield from torch.cat(parts, dim=1) / len(parts) ** 0.5
