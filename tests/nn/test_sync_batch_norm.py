"""Synchronised batch norm: two processes with a part of the batch each are one process with all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

import spkfast
from spkfast.errors import InputError
from spkfast.nn import SERes2NetBlock, SyncBatchNorm
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
# With batch norm that no kernel takes, where torch's class refuses on a CPU.
WHOLE = {
    "bare": lambda: nn.Sequential(nn.Conv1d(CHANNELS, OUTPUTS, 1), nn.BatchNorm1d(OUTPUTS)),
    "whole network": lambda: Features(
        spkfast.models.create(
            "ecapa_tdnn", feature_dim=CHANNELS, channels=16, mfa_channels=24, embedding_dim=OUTPUTS,
            attention_channels=8, se_channels=4, scale=4, dialect="speechbrain",
        )
    ),
}  # fmt: skip
NETS |= WHOLE
CONVERT: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch": nn.SyncBatchNorm.convert_sync_batchnorm,
    "own": SyncBatchNorm.convert,
}
Found = dict[str, Tensor]


class Features(nn.Module):
    """A network that takes (B, C, T) and gives (B, E, 1)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(1, 2).contiguous())[..., None]


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
    """One of two processes: a file of what it found for each network, share and class of batch norm."""
    for name in NETS:
        for shares in SHARES:
            for kind, convert in CONVERT.items():
                if kind == "torch" and name in WHOLE:
                    continue
                net = convert(made(name))
                x, slope = (value.split(shares)[rank] for value in inputs(sum(shares)))
                with torch.autograd.profiler.profile() as profile:
                    found = trained(net, x, slope)
                kernels = FORWARD & {event.name for event in profile.function_events}
                torch.save((found, bool(kernels)), _file(folder, name, shares, kind, rank))


def _file(folder: Path, name: str, shares: tuple[int, int], kind: str, rank: int) -> Path:
    return folder / f"{name} {shares[0]} {shares[1]} {kind} {rank}.pt"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes found; they start once for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    processes.run(work, 2, folder)
    return folder


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in NETS for k in CONVERT if k == "own" or n not in WHOLE])
def test_two_processes_are_one(name: str, kind: str, shares: tuple[int, int], results: Path) -> None:
    parts = []
    for rank in range(2):
        found, on_kernels = torch.load(_file(results, name, shares, kind, rank))
        assert on_kernels or name == "bare"
        parts.append(found)
    x, slope = inputs(sum(shares))
    exact = trained(made(name).double(), x.double(), slope.double())
    plain = trained(made(name), x, slope)
    alone = trained(made(name).double(), x[shares[0] :].double(), slope[shares[0] :].double())
    assert exact.keys() == parts[0].keys() == parts[1].keys()
    squares = torch.zeros(2, dtype=torch.float64)
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
        if name == "whole network" and key.startswith("gradient of net"):
            # Deep in a network the error of one small tensor is a matter of luck: all together.
            squares += torch.stack([(value - want).square().sum() for value in (got, plain[key])])
            continue
        # As large as the error of one process, which has the same kernels.
        scale = float(want.abs().amax())
        bound = 4 * max(float((plain[key] - want).abs().amax()), 2.0**-22 * scale)
        error = float((got - want).abs().amax())
        assert error <= bound, f"{key}: error {error:.3g} exceeds {bound:.3g}"
        if key == "output":  # the part alone would be another
            assert float((alone[key] - want[shares[0] :]).abs().amax()) > 100 * bound
    assert squares[0] <= 4**2 * squares[1]


@pytest.mark.parametrize("kind", CONVERT)
@pytest.mark.parametrize("name", ["layer", "bare"])
def test_one_process_needs_no_group(name: str, kind: str) -> None:
    if kind == "torch" and name == "bare":
        pytest.skip("torch's class refuses tensors of a CPU")
    net = made(name)
    x, slope = inputs(4)
    other = CONVERT[kind](copy.deepcopy(net))
    got, want = trained(other, x, slope), trained(net, x, slope)
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5, msg=key)


def test_takes_the_place_of_batch_norm_with_the_same_tensors() -> None:
    net = made("whole network")
    state = {name: value.data_ptr() for name, value in net.state_dict().items()}
    net.net.encoder.stem.bn.eval().requires_grad_(False)
    assert SyncBatchNorm.convert(net) is net
    norms = [part for part in net.modules() if isinstance(part, SyncBatchNorm)]
    assert norms and not any(isinstance(part, nn.BatchNorm1d | nn.SyncBatchNorm) for part in net.modules())
    assert {name: value.data_ptr() for name, value in net.state_dict().items()} == state
    first = net.net.encoder.stem.bn
    assert not first.training and not first.weight.requires_grad and norms[-1].training
    assert isinstance(SyncBatchNorm.convert(nn.BatchNorm1d(3)), SyncBatchNorm)


def test_evaluates_on_the_kernels_of_inference() -> None:
    net = made("whole network").net.eval()
    other = SyncBatchNorm.convert(copy.deepcopy(net))
    x = inputs(2)[0].transpose(1, 2).contiguous()
    with torch.inference_mode():
        assert torch.equal(net(x), other(x))


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 5)], ids=str)
def test_says_what_it_takes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"input must have shape \(B, C\) or \(B, C, T\), got"):
        SyncBatchNorm(3)(torch.zeros(shape))
