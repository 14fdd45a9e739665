"""What a run reads: rows that parts of a step and processes need, and who tells what there is to say of the data."""

from __future__ import annotations

import re

import pytest
import torch

from spkfast.errors import InputError
from spkfast.frontends import frontend
from spkfast.training.config import DataConfig, TrainConfig
from spkfast.training.inputs import Inputs
from tests.training.corpus import make_tones


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Of 12 utterances, with their lengths."""
    folder = make_tones(tmp_path_factory.mktemp("tones"))
    lines = [line.split() for line in (folder / "train_list.txt").read_text().splitlines()]
    rows = [f"{folder / path},{speaker},1.5\n" for speaker, path in lines]
    (folder / "corpus.csv").write_text("path,speaker,seconds\n" + "".join(rows))
    return folder


def inputs(config: TrainConfig, rank: int = 0, world_size: int = 1, warn=lambda message: None) -> Inputs:
    return Inputs(
        config, frontend("wespeaker"), device=torch.device("cpu"), rank=rank, world_size=world_size, warn=warn
    )


def buckets(corpus, accumulate: int, batch_size: int = 4, **options) -> TrainConfig:
    """Batches by seconds, of few rows, so that parts of a step may be left without."""
    data = DataConfig(
        str(corpus / "corpus.csv"), crop_seconds=0.5, sampler="length_buckets", workers=0,
        sampler_options={"batch_seconds": 7.0, "num_buckets": 2, **options},
    )  # fmt: skip
    return TrainConfig(data=data, steps=4, batch_size=batch_size, accumulate=accumulate)


@pytest.mark.parametrize(
    ("accumulate", "world_size", "row_multiple", "least"), [(2, 1, 1, 4), (2, 1, 3, 4), (1, 2, 2, 4), (1, 1, 1, 2)]
)
def test_a_multiple_that_leaves_a_part_of_a_step_without_rows_is_refused(
    corpus, accumulate, world_size, row_multiple, least
):
    message = (
        f"data.sampler_options: row_multiple must be at least {least}, so that each of accumulate={accumulate} parts "
        f"of a step has 2 rows in each of {world_size} processes, got {row_multiple}"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        inputs(buckets(corpus, accumulate, row_multiple=row_multiple), world_size=world_size)


@pytest.mark.parametrize("options", [{}, {"row_multiple": 4}], ids=str)
def test_each_part_of_a_step_has_its_rows(corpus, options):
    made = inputs(buckets(corpus, 2, **options))
    batches = list(made.batches())
    assert len(batches) == 4
    for batch in batches:
        sizes = [len(part.labels) for part in made.parts(batch)]
        assert len(sizes) == 2 and min(sizes) >= 2 and sum(sizes) == len(batch.labels)


def test_one_of_several_processes_tells_of_the_data(corpus):
    data = DataConfig(str(corpus / "train_list.txt"), crop_seconds=0.5, workers=0, rir=str(corpus / "spk1"))
    data.augment.recipe = "room_or_noise"
    data.augment.options = {"stages": [{"choices": [{"effects": [{"kind": "reverb"}]}]}]}
    told: dict[int, list[str]] = {0: [], 1: []}
    for rank, lines in told.items():
        inputs(TrainConfig(data=data, steps=4, batch_size=4), rank, 2, lines.append)
    assert len(told[0]) == 1 and "impulse responses are longer" in told[0][0] and not told[1]
