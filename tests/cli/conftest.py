"""A small model, a little speech-like noise, and a way to run a command and see what it said."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from spkfast import SpeakerEncoder, frontend, models
from spkfast.cli.main import main


class Outcome(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def error(self):
        """The one line on standard error of a run that must have failed for bad input."""
        assert self.status == 2, self
        lines = self.err.splitlines()
        assert len(lines) == 1 and "Traceback" not in self.err, self
        return lines[0]


@pytest.fixture
def spkfast(capsys):
    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    torch.manual_seed(0)
    net = models.create(
        "ecapa_tdnn", channels=16, mfa_channels=32, embedding_dim=24, attention_channels=8, se_channels=8, scale=4
    )
    folder = tmp_path_factory.mktemp("models") / "small"
    SpeakerEncoder(net, frontend("wespeaker")).save(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    """Three speakers with three files each, and all their trials in trials.txt."""
    import soundfile

    keys = []
    for speaker in range(3):
        for utterance in range(3):
            rng = np.random.default_rng([speaker, utterance])
            keys.append(f"s{speaker}/r{utterance}/u.wav")
            path = tmp_path / "data" / keys[-1]
            path.parent.mkdir(parents=True)
            soundfile.write(path, np.cumsum(rng.normal(size=4000 + 500 * utterance)) / 1000, 16000)
    lines = [f"{int(a[:2] == b[:2])} {a} {b}\n" for i, a in enumerate(keys) for b in keys[:i]]
    (tmp_path / "data/trials.txt").write_text("".join(lines))
    return tmp_path / "data"
