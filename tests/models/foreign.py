"""State dicts as other toolkits write them, and as an attacker does."""

from __future__ import annotations

import json
import os

import torch

from spkfast import models
from spkfast.models.checkpoints import _TABLE, _Names
from tests.models.golden import golden_weight

SMALL = {"feature_dim": 20, "channels": 16, "embedding_dim": 12, "mfa_channels": 24, "scale": 4,
         "attention_channels": 6, "se_channels": 5}  # fmt: skip


class Evil:
    """What makes a file when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def small_model(dialect, seed=0, **config):
    """A network whose weights and statistics are all different."""
    torch.manual_seed(seed)
    net = models.create("ecapa_tdnn", dialect=dialect, **{**SMALL, **config}).eval()
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.1, 0.5)
    return net


def foreign_state(net, family):
    """The network's weights under a toolkit's names and in its shapes."""
    names = _Names(_TABLE[family])
    state = {names.theirs(key): value.clone() for key, value in net.state_dict().items()}
    if family in ("speechbrain", "3dspeaker", "taoruijie", "espnet"):  # 1x1 convolutions for linear layers
        for key, value in state.items():
            if value.ndim == 2 and ("se" in key.split(".") or "se_block" in key or key == "fc.conv.weight"):
                state[key] = value[..., None]
    return state


def golden_state(folder, name):
    """A golden's state dict under the toolkit's names, and its description."""
    entry = json.loads((folder / f"{name}.json").read_text())
    state = {
        key: torch.zeros(shape) if rule == "keep" else torch.from_numpy(golden_weight(key, shape, rule))
        for key, shape, rule in entry["state"]
    }
    return state, entry
