"""A head split between processes is the head with all classes, and its checkpoints fit any number of processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import spkfast
from spkfast.errors import InputError
from spkfast.nn import MarginSoftmaxLoss, ShardedMarginSoftmaxLoss
from tests import memory, processes

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch has no Gloo"
)
SIZE, CLASSES = 6, 11
RANKS = (1, 2, 4)
# Rows of each process.
SHARES = {1: [9], 2: [4, 5], 4: [3, 1, 4, 1]}
HEADS: dict[str, dict[str, Any]] = {
    "aam": {"margin": 0.4, "scale": 8.0},
    "subcenters": {"num_subcenters": 3, "topk": 3, "topk_margin": 0.1, "scale": 8.0, "label_smoothing": 0.1},
    "topk beyond": {"topk": 30, "topk_margin": 0.1, "scale": 8.0},
    "softmax": {"kind": "softmax"},
    "sphereface2": {"kind": "sphereface2", "scale": 8.0},
    "sphereface2 A": {"kind": "sphereface2", "scale": 8.0, "margin_type": "A", "bias": False},
}


def whole(name: str, dtype: torch.dtype = torch.float64) -> MarginSoftmaxLoss:
    torch.manual_seed(0)
    head = MarginSoftmaxLoss(SIZE, CLASSES, **HEADS[name])
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return head.to(dtype)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(5, SIZE).double()


def batches(ranks: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = sum(SHARES[ranks])
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, (rows,), generator=generator)
    return list(zip(x.split(SHARES[ranks]), target.split(SHARES[ranks]), strict=True))


def work(rank: int, folder: Path) -> None:
    """A step of each head, with the network in DDP; and a checkpoint."""
    ranks = distributed.get_world_size()
    x, target = batches(ranks)[rank]
    for name in HEADS:
        for dtype in (torch.float64, torch.float32):
            head = ShardedMarginSoftmaxLoss(SIZE, CLASSES, **HEADS[name]).to(dtype)
            head.load_full_state_dict(whole(name, dtype).state_dict())
            net = DistributedDataParallel(network().to(dtype))
            loss, stats = head(net(x.to(dtype)), target, return_stats=True)
            loss.backward()
            found = {"loss": loss.detach(), "accuracy": stats.accuracy, "cosine": stats.target_cosine}
            found |= {f"network {key}": value.grad for key, value in net.module.named_parameters()}
            grads = {key: value.grad for key, value in head.named_parameters()}
            if head.bias is not None and name == "softmax":
                grads["bias"] = head.gather_rows(grads["bias"])
            grads["weight"] = head.gather_rows(grads["weight"])
            found |= {f"head {key}": value for key, value in grads.items() if value is not None}
            torch.save(found, folder / f"{name} {dtype} {ranks} {rank}.pt")
    head = ShardedMarginSoftmaxLoss(SIZE, CLASSES, **HEADS["aam"]).double()
    head.load_full_state_dict(whole("aam").state_dict())
    net = network()
    fully_shard(net, mesh=init_device_mesh("cpu", (ranks,)))
    head(net(x), target).backward()
    torch.save(net.weight.grad.full_tensor(), folder / f"fully sharded {ranks} {rank}.pt")

    torch.manual_seed(0)
    head = ShardedMarginSoftmaxLoss(SIZE, CLASSES, num_subcenters=3)
    state = head.full_state_dict()
    assert (state is None) == (rank != 0)
    if state is not None:
        torch.save(state, folder / f"state {ranks}.pt")
    other = copy.deepcopy(head.state_dict())
    other["_extra_state"] = other["_extra_state"] | {"rank": rank + 1}
    with pytest.raises(InputError, match="keep full_state_dict"):
        head.load_state_dict(other)
    head.load_state_dict(head.state_dict())
    group = distributed.new_group(list(range(ranks)))
    copied = copy.deepcopy(ShardedMarginSoftmaxLoss(SIZE, CLASSES, process_group=group))
    assert copied.process_group is group and copied.weight.shape == (copied.classes, SIZE)
    for move in (head.gather_rows, head.own_rows):
        with pytest.raises(InputError, match="must have rows for each of"):
            move(torch.zeros(0))
    with pytest.raises(InputError, match=r"must have 'weight' of shape \(33, 6\), got \(30, 6\)"):
        head.load_full_state_dict({"weight": torch.zeros(30, SIZE)})
    if ranks > 1:
        with pytest.raises(InputError, match=f"num_speakers must be at least {ranks}"):
            ShardedMarginSoftmaxLoss(SIZE, ranks - 1)
    for given, message in (({"sample_rate": 0}, "sample_rate must"), ({"label_smoothing": 0.1}, "does not go with")):
        with pytest.raises(InputError, match=message):
            ShardedMarginSoftmaxLoss(SIZE, CLASSES, **{"sample_rate": 0.5, **given})
    sample(rank)
    torch.save(held(ShardedMarginSoftmaxLoss(64, 20_000)), folder / f"held {ranks} {rank}.pt")


def held(head: nn.Module) -> int:
    """Bytes of the weights, and what tensors hold beside them at the peak of a step."""
    x, target = torch.randn(8, 64), torch.arange(8) * 2000

    def step() -> None:
        head(x, target).backward()

    return sum(value.nbytes for value in head.parameters()) + memory.peak_bytes(step, torch.device("cpu"))


def sample(rank: int) -> None:
    """Steps that see a part of the classes, by optimisers that leave the others alone."""
    ranks = distributed.get_world_size()
    x, target = batches(ranks)[rank]
    for optimiser in (torch.optim.SGD, torch.optim.SparseAdam):
        torch.manual_seed(2)
        head = ShardedMarginSoftmaxLoss(5, CLASSES, sample_rate=0.3, num_subcenters=2, scale=8.0, topk=2).double()
        before = head.weight.detach().clone()
        step = optimiser(head.parameters(), lr=0.1)
        head(x, target).backward()
        assert head.weight.grad is not None and head.weight.grad.is_sparse
        step.step()
        moved = (head.weight.detach() != before).any(dim=1).view(-1, 2).any(dim=1)
        everyone = torch.cat([labels for _, labels in batches(ranks)])
        mine = everyone[(everyone >= head.first) & (everyone < head.first + head.classes)].unique() - head.first
        assert moved[mine].all()
        assert int(moved.sum()) <= max(len(mine), -(-3 * head.classes // 10))
        head.eval()
        full = MarginSoftmaxLoss(5, CLASSES, num_subcenters=2, scale=8.0, topk=2).double()
        rows = head.gather_rows(head.weight.detach())
        sent = [rows if rows is not None else torch.zeros_like(full.weight)]
        distributed.broadcast(sent[0], 0)
        full.weight.data = sent[0]
        torch.testing.assert_close(head(x, target), full(x, target))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all processes found, for each number of them."""
    found = tmp_path_factory.mktemp("processes")
    for ranks in RANKS:
        processes.run(work, ranks, found)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", HEADS)
def test_shares_are_the_whole(name: str, ranks: int, dtype: torch.dtype, folder: Path) -> None:
    parts = [torch.load(folder / f"{name} {dtype} {ranks} {rank}.pt") for rank in range(ranks)]
    head, net = whole(name, dtype), network().to(dtype)
    losses = []
    for (x, target), part in zip(batches(ranks), parts, strict=True):
        loss, stats = head(net(x.to(dtype)), target, return_stats=True)
        close = {"rtol": 1e-12, "atol": 0.0} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 0.0}
        torch.testing.assert_close(part["loss"], loss.detach(), **close)
        assert part["accuracy"] == stats.accuracy
        torch.testing.assert_close(part["cosine"], stats.target_cosine, **close)
        losses.append(loss)
    torch.stack(losses).mean().backward()
    wanted = {f"head {key}": value.grad for key, value in head.named_parameters()}
    wanted |= {f"network {key}": value.grad for key, value in net.named_parameters()}
    checked = set()
    for part in parts:
        for key, want in wanted.items():
            if key in part:
                assert want is not None
                bound = (1e-12 if dtype == torch.float64 else 1e-6) * float(want.abs().amax())
                assert float((part[key] - want).abs().amax()) <= bound, key
                checked.add(key)
    assert checked == set(wanted)


@pytest.mark.parametrize("ranks", RANKS)
def test_network_may_be_fully_sharded(ranks: int, folder: Path) -> None:
    for rank in range(ranks):
        want = torch.load(folder / f"aam {torch.float64} {ranks} {rank}.pt")["network weight"]
        got = torch.load(folder / f"fully sharded {ranks} {rank}.pt")
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * float(want.abs().amax()))


@pytest.mark.skipif(
    "native" not in spkfast.info()["ops"]["margin_softmax_loss"]["available"]["cpu"],
    reason="the definition keeps all cosines",
)
@pytest.mark.parametrize("ranks", RANKS)
def test_memory_is_shared_too(ranks: int, folder: Path) -> None:
    unshared = held(MarginSoftmaxLoss(64, 20_000))
    for rank in range(ranks):
        assert torch.load(folder / f"held {ranks} {rank}.pt") <= (1 / ranks + 0.1) * unshared


def test_checkpoints_and_first_weights_are_of_all_processes(folder: Path) -> None:
    states = [torch.load(folder / f"state {ranks}.pt") for ranks in RANKS]
    torch.manual_seed(0)
    head = MarginSoftmaxLoss(SIZE, CLASSES, num_subcenters=3)
    for state in states:
        assert torch.equal(state["weight"], head.weight)
        head.load_state_dict(state)


def test_needs_processes_and_known_settings() -> None:
    with pytest.raises(InputError, match="a sharded head needs processes"):
        ShardedMarginSoftmaxLoss(4, 3)
    with pytest.raises(InputError, match=r"unknown option 'margins' of head ShardedMarginSoftmaxLoss \(did you mean"):
        ShardedMarginSoftmaxLoss(4, 3, margins=0.1)
