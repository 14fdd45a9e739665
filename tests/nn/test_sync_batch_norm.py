"""Synchronised batch norm: two processes with a part of the batch each are one process with all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

from spkfast.nn import SERes2NetBlock
from spkfast.nn.se_res2net import TdnnLayer
from tests import processes

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch has no Gloo"
)
CHANNELS, OUTPUTS, FRAMES = 12, 16, 17
FORWARD = {"spkfast::conv_relu", "spkfast::conv_batch_norm"}
# Rows of either process.
SHARES = [(3, 3), (1, 5)]
NETS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: TdnnLayer(CHANNELS, OUTPUTS, 3, dilation=2),
    "layer, no momentum": lambda: with_norms(TdnnLayer(CHANNELS, OUTPUTS, 3), momentum=None),
    "block": lambda: SERes2NetBlock(OUTPUTS, scale=4, se_channels=6, in_channels=CHANNELS),
    "block, first": lambda: SERes2NetBlock(
        OUTPUTS, scale=2, in_channels=CHANNELS, identity="first", padding_mode="reflect"
    ),
    "half frozen": lambda: half_frozen(SERes2NetBlock(OUTPUTS, scale=2, in_channels=CHANNELS)),
    "network": lambda: nn.Sequential(TdnnLayer(CHANNELS, OUTPUTS, 3), SERes2NetBlock(OUTPUTS, scale=4)),
}
Found = dict[str, Tensor]


def with_norms(net: nn.Module, momentum: float | None) -> nn.Module:
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.momentum = momentum
    return net


def half_frozen(net: SERes2NetBlock) -> SERes2NetBlock:
    assert net.out.bn is not None
    net.out.bn.eval()
    return net


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = NETS[name]()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.3)
    return net


def inputs(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Of other means and scales from row to row, so that the statistics of a part are not those of all.
    x = torch.randn(rows, FRAMES, CHANNELS, generator=generator)
    x = x * torch.linspace(0.5, 2, rows)[:, None, None] + torch.linspace(-1, 1, rows)[:, None, None]
    return x.transpose(1, 2), torch.randn(rows, OUTPUTS, FRAMES, generator=generator)


def trained(net: nn.Module, x: Tensor, slope: Tensor) -> Found:
    """Output and gradients of the second of two steps, and the statistics after it."""
    for _ in range(2):
        net.zero_grad()
        leaf = x.clone().requires_grad_()
        out = net(leaf)
        (out * slope).sum().backward()
    assert leaf.grad is not None
    found = {"output": out, "gradient of x": leaf.grad}
    found |= {f"gradient of {name}": value.grad for name, value in net.named_parameters() if value.grad is not None}
    found |= {f"statistics {name}": value for name, value in net.named_buffers()}
    return {name: value.detach() for name, value in found.items()}


def work(rank: int, folder: Path) -> None:
    """One of two processes: a file of what it found for each network and share."""
    for name in NETS:
        for shares in SHARES:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(made(name))
            x, slope = (value.split(shares)[rank] for value in inputs(sum(shares)))
            with torch.autograd.profiler.profile() as profile:
                found = trained(net, x, slope)
            kernels = FORWARD & {event.name for event in profile.function_events}
            torch.save((found, bool(kernels)), _file(folder, name, shares, rank))


def _file(folder: Path, name: str, shares: tuple[int, int], rank: int) -> Path:
    return folder / f"{name} {shares[0]} {shares[1]} {rank}.pt"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes found; they start once for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    processes.run(work, 2, folder)
    return folder


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_two_processes_are_one(name: str, shares: tuple[int, int], results: Path) -> None:
    parts = []
    for rank in range(2):
        found, on_kernels = torch.load(_file(results, name, shares, rank))
        assert on_kernels
        parts.append(found)
    x, slope = inputs(sum(shares))
    exact = trained(made(name).double(), x.double(), slope.double())
    plain = trained(made(name), x, slope)
    alone = trained(copy.deepcopy(made(name)).double(), x[: shares[0]].double(), slope[: shares[0]].double())
    assert exact.keys() == parts[0].keys() == parts[1].keys()
    for key, want in exact.items():
        if key in ("output", "gradient of x"):
            got = torch.cat([part[key] for part in parts])
        elif key.startswith("gradient"):
            got = parts[0][key] + parts[1][key]
        else:
            assert torch.equal(parts[0][key], parts[1][key]), key
            got = parts[0][key]
        if not want.is_floating_point():
            assert torch.equal(got, want), key
            continue
        # As large as the error of one process, which has the same kernels.
        scale = float(want.abs().amax())
        bound = 4 * max(float((plain[key] - want).abs().amax()), 2.0**-22 * scale)
        error = float((got - want).abs().amax())
        assert error <= bound, f"{key}: error {error:.3g} exceeds {bound:.3g}"
        if key == "output":  # the part alone would be another
            assert float((alone[key] - want[: shares[0]]).abs().amax()) > 100 * bound


def test_one_process_needs_no_group() -> None:
    net = made("layer")
    x, slope = inputs(4)
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    got, want = trained(other, x, slope), trained(net, x, slope)
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5, msg=key)
