"""The same live model before and after ``spkfast.accelerate``: ``python examples/accelerate_live_model.py``.

The model stands for one of another toolkit: it is made of plain torch layers, and spkfast never heard of its classes.
"""

import copy
import logging
import time

import torch
from torch import nn

import spkfast


class Layer(nn.Module):
    """Convolution, ReLU, batch norm."""

    def __init__(self, inputs: int, outputs: int, taps: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, taps, dilation=dilation, padding=taps // 2 * dilation)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.relu(self.conv(x)))


class Block(nn.Module):
    """SE-Res2Net block."""

    def __init__(self, channels: int, dilation: int, scale: int = 8, bottleneck: int = 128) -> None:
        super().__init__()
        self.width = channels // scale
        self.before = Layer(channels, channels)
        self.chain = nn.ModuleList(Layer(self.width, self.width, 3, dilation) for _ in range(scale - 1))
        self.after = Layer(channels, channels)
        self.squeeze, self.excite = nn.Linear(channels, bottleneck), nn.Linear(bottleneck, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *groups, last = self.before(x).split(self.width, dim=1)
        outputs: list[torch.Tensor] = []
        for layer, group in zip(self.chain, groups, strict=True):
            outputs.append(layer(group + outputs[-1] if outputs else group))
        y = self.after(torch.cat([*outputs, last], dim=1))
        gates = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean(dim=2)))))
        return x + y * gates[..., None]


def main(channels: int = 512, batch: int = 4, frames: int = 300, repeats: int = 5) -> None:
    """Prints the time of a forward pass before and after, and the largest difference relative to the largest value."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("spkfast.accelerate").setLevel(logging.INFO)  # what is swapped, and what stays and why

    before = nn.Sequential(Layer(80, channels, 5), *(Block(channels, dilation) for dilation in (2, 3, 4))).eval()
    after = spkfast.accelerate(copy.deepcopy(before))
    assert list(after.state_dict()) == list(before.state_dict())

    x = torch.randn(batch, 80, frames)
    with torch.no_grad():
        for name, model in (("before", before), ("after", after)):
            model(x)
            start = time.perf_counter()
            for _ in range(repeats):
                model(x)
            print(f"{name}\t{1e3 * (time.perf_counter() - start) / repeats:.1f} ms")
        difference = (after(x) - before(x)).abs().max() / before(x).abs().max()
    print(f"difference\t{float(difference):.1e}")


if __name__ == "__main__":
    main()
