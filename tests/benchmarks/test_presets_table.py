"""The table of presets on the page of log_mel_fbank is that of spkfast.frontend, and the benchmark times them all."""

from __future__ import annotations

import re
from pathlib import Path

import spkfast
from benchmarks import shapes
from spkfast import frontends

PAGE = Path(__file__).resolve().parents[2] / "docs/ops/log_mel_fbank.md"

# Of the defaults, those that tell the front-end; for other presets whatever differs from them.
_TELLING = (
    "sample_rate", "sample_scale", "preemphasis", "preemphasis_mode", "remove_dc", "frame_length_ms", "frame_shift_ms",
    "round_to_power_of_two", "window", "snip_edges", "power", "n_mels", "mel_scale", "f_min", "f_max", "log",
    "log_floor",
)  # fmt: skip


def _settings(preset: str) -> str:
    fields, defaults = spkfast.frontend(preset).to_dict(), spkfast.FrontendSpec().to_dict()
    shown = {k: v for k, v in fields.items() if (k in _TELLING if preset == "kaldi" else v != defaults[k])}
    return ", ".join(f"`{name}={value!r}`" for name, value in shown.items())


def test_every_preset_with_its_settings():
    rows = dict(re.findall(r"^\| `(\w+)`(?: \(`espnet`\))? \| [^|]+ \| (.+) \|$", PAGE.read_text(), re.M))
    assert {preset: rows.get(preset) for preset in shapes.PRESETS} == {
        preset: _settings(preset) for preset in shapes.PRESETS
    }


def test_no_preset_is_left_out():
    specs = {spkfast.frontend(preset).hash for preset in frontends._PRESETS}
    assert {spkfast.frontend(preset).hash for preset in shapes.PRESETS} == specs
    assert len(shapes.PRESETS) == len(specs)
