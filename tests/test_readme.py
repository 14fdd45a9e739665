"""The README's example runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tests.models.foreign import foreign_state, small_model
from tests.training.corpus import make_tones

README = Path(__file__).parents[1] / "README.md"


def test_python_example(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    make_tones(tmp_path, speakers=2, utterances=2)
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.flac", "b.flac")):
        (tmp_path / f"spk{number}" / "s" / "0.wav").rename(tmp_path / name)
    (tmp_path / "exp" / "models").mkdir(parents=True)
    state = foreign_state(small_model("wespeaker", feature_dim=80), "wespeaker")
    torch.save(state, tmp_path / "exp" / "models" / "avg_model.pt")
    waveforms = 0.1 * torch.randn(2, 16000)
    pieces = waveforms[0].numpy().reshape(100, 160)
    names = {"waveforms": waveforms, "lengths": torch.tensor([16000, 9000]), "pieces": pieces}
    exec(code, names)
    assert names["one"].shape == (192,) and names["many"].shape == (2, 192)
    torch.testing.assert_close(names["many"][0], names["one"], rtol=1e-4, atol=1e-5)
    assert names["features"].shape == (2, 98, 80) and names["frames"].tolist() == [98, 54]
    assert names["embeddings"].shape == (2, 192) and names["theirs"].model.embedding_dim == 12
    assert names["new"].shape == (1, 80) and names["rest"].shape == (0, 80)
