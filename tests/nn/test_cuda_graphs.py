"""Networks replayed from CUDA graphs: what padding, limits, changes and threads may not do to a result.

Without a GPU a copy of the network, made where a graph would be captured, stands in: like a graph it knows no change.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spkfast import models
from spkfast.errors import InputError
from spkfast.models.ecapa_tdnn import DIALECTS
from spkfast.nn import CudaGraphs, calibrate, set_input_ranges, set_precision
from spkfast.nn.cuda_graphs import _Gpu
from tests.models.test_ecapa_tdnn import randomized
from tests.nn.test_inference_layers import CHANGES, batch, plain, relative_error

_DIALECTS = [name for name in DIALECTS if name != "3dspeaker"]  # speechbrain by another name


class _CopyOfNet:
    def __init__(self, net: nn.Module, inputs: tuple[Tensor, Tensor | None]) -> None:
        self.net, self.inputs = copy.deepcopy(net), inputs
        self.output = net(*inputs).clone()

    def replay(self) -> None:
        with torch.no_grad():
            self.output.copy_(self.net(*self.inputs))


class _StandIn(_Gpu):
    def __init__(self) -> None:
        super().__init__()
        self.captures = 0

    def captures_on(self, device: torch.device) -> bool:
        return True

    def capture(self, net: nn.Module, inputs: tuple[Tensor, Tensor | None], beside: Any) -> tuple[Any, Tensor]:
        self.captures += 1
        graph = _CopyOfNet(net, inputs)
        return graph, graph.output

    @contextlib.contextmanager
    def in_order(self, device: torch.device) -> Iterator[None]:
        yield


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Callable[[CudaGraphs], int]:
    """Graphs are captured here too; how many one has captured."""
    monkeypatch.setattr("spkfast.nn.cuda_graphs._Gpu", _StandIn)
    return lambda graphed: graphed._gpu.captures  # type: ignore[attr-defined]


def features_of(rows: int, frames: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, frames, 20, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dialect", _DIALECTS)
@pytest.mark.usefixtures("captures")
def test_padding_changes_no_result(dialect: str, precision: Any) -> None:
    net = set_precision(randomized(dialect), precision)
    graphed = CudaGraphs(net, frames_step=16)
    features, lengths = batch()  # its padding is NaN, and stays in spare rows and frames
    with torch.inference_mode():
        for inputs in (
            (features, lengths),
            (features[:3], lengths[:3]),
            (features_of(3, 37),),
            (features_of(1, 33),),
            (features_of(2, 48),),
            (features_of(3, 48), torch.tensor([0, 48, 1])),
        ):
            got, want = graphed(*inputs), net(*inputs)
            assert got.shape == want.shape and got.dtype == want.dtype
            assert relative_error(got, want) < 1e-5  # as of a row in a batch and alone
    # Lengths or not, of 48 frames: four rows with, two without, one with.
    assert len(graphed) == 3


def test_sizes_share_graphs(captures: Callable[[CudaGraphs], int]) -> None:
    graphed = CudaGraphs(randomized("wespeaker"), max_batch=6, max_frames=70, frames_step=20)
    with torch.no_grad():
        for rows, frames in ((1, 1), (1, 19), (3, 21), (4, 40), (4, 39), (5, 61), (6, 70), (5, 70)):
            graphed(features_of(rows, frames))
    shapes = [(graph.features.shape[:2], graph.lengths is not None) for graph in graphed._graphs.values()]
    # The largest size is that of the limits; where all frames are real no lengths are needed.
    assert set(shapes) == {((1, 20), True), ((4, 40), True), ((4, 40), False), ((6, 70), True), ((6, 70), False)}
    assert captures(graphed) == len(graphed) == 5


def test_the_least_recently_used_graph_goes(captures: Callable[[CudaGraphs], int]) -> None:
    graphed = CudaGraphs(randomized("wespeaker"), frames_step=10, max_graphs=2)
    with torch.no_grad():
        for frames, number in ((10, 1), (20, 2), (10, 2), (30, 3), (10, 3), (20, 4)):
            graphed(features_of(1, frames))
            assert captures(graphed) == number and len(graphed) <= 2
    graphed.clear()
    assert len(graphed) == 0


def test_result_is_the_callers(captures: Callable[[CudaGraphs], int]) -> None:
    graphed = CudaGraphs(randomized("wespeaker"))
    with torch.no_grad():
        first = graphed(features_of(2, 50))
        kept = first.clone()
        graphed(features_of(2, 50, seed=1))
    assert captures(graphed) == 1 and torch.equal(first, kept)


def test_lengths_beyond_the_frames_end_with_them(captures: Callable[[CudaGraphs], int]) -> None:
    """As on a GPU, where the network asks nothing about them; here it refuses."""
    net = randomized("wespeaker")
    graphed, features = CudaGraphs(net), features_of(2, 30)
    with torch.no_grad():
        got = graphed(features, torch.tensor([31, 50]))
        assert captures(graphed) == 1 and relative_error(got, net(features)) < 1e-5


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: str, captures: Callable[[CudaGraphs], int]) -> None:
    net, inputs = randomized("wespeaker"), batch()
    graphed = CudaGraphs(net)
    with torch.no_grad():
        before = graphed(*inputs)
        graphed(*inputs)
        assert captures(graphed) == 1
        CHANGES[change](net)
        got = graphed(*inputs)
        assert relative_error(got, plain(net, *inputs)) < 1e-5 < relative_error(got, before)
        assert captures(graphed) == 2 and len(graphed) == 1
        assert torch.equal(graphed(*inputs), got) and captures(graphed) == 2


def test_changes_of_the_projector_are_noticed(captures: Callable[[CudaGraphs], int]) -> None:
    """Which is no layer with an inference form, and packs nothing."""
    net, inputs = randomized("wespeaker"), batch()
    graphed = CudaGraphs(net)
    with torch.no_grad():
        for number, change in enumerate(
            (
                lambda: net.projector.fc.weight.mul_(2),
                lambda: setattr(net.projector.fc, "weight", nn.Parameter(torch.ones(24, 96))),
                lambda: setattr(net.projector.bn, "eps", 0.5),
                lambda: net.projector.bn.running_var.mul_(2),
            ),
            start=2,
        ):
            before = graphed(*inputs)
            change()
            got = graphed(*inputs)
            assert relative_error(got, plain(net, *inputs)) < 1e-5 and captures(graphed) == number
            assert not torch.equal(got, before)


def test_settings_are_noticed(captures: Callable[[CudaGraphs], int]) -> None:
    net, inputs = randomized("wespeaker"), batch()
    ranges = calibrate(net, [batch(1)])
    halved = {name: {key: (low / 2, high / 2) for key, (low, high) in of.items()} for name, of in ranges.items()}
    graphed = CudaGraphs(net)
    results = []
    with torch.no_grad():
        for change in (
            lambda: set_precision(net, "fp32"),
            lambda: set_precision(net, "bf16"),
            lambda: set_precision(net, "int8"),
            lambda: set_input_ranges(net, halved),
        ):
            change()
            results.append(graphed(*inputs))
            assert relative_error(results[-1], net(*inputs)) < 1e-5
            assert captures(graphed) == len(results) and len(graphed) == 1
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(results))


def test_autocast_has_graphs_of_its_own(captures: Callable[[CudaGraphs], int]) -> None:
    net, features = randomized("wespeaker"), features_of(2, 50)
    graphed = CudaGraphs(net)
    with torch.no_grad():
        for number in (2, 2):  # and those beside stay
            wide = graphed(features)
            with torch.autocast("cpu", torch.bfloat16):
                half = graphed(features)
                assert relative_error(half, net(features)) < 1e-5
            assert captures(graphed) == number and not torch.equal(half, wide)
            assert relative_error(wide, net(features)) < 1e-5


def test_modes_of_inference_share_graphs(captures: Callable[[CudaGraphs], int]) -> None:
    net = randomized("wespeaker").requires_grad_(False)
    graphed = CudaGraphs(net)
    want = net(features_of(2, 50))
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            got = graphed(features_of(2, 50))
            assert got.is_inference() == (mode is torch.inference_mode)
            assert relative_error(got, want) < 1e-5
    assert captures(graphed) == 1


class _Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda net: net.train(),
        lambda net: net.encoder.blk2.res[0].bn.train(),
        lambda net: net.register_forward_hook(lambda *_: None),
        lambda net: net.encoder.register_forward_pre_hook(lambda *_: None),
        lambda net: net.pooling.fc1.register_full_backward_hook(lambda *_: None),
        lambda net: nn.utils.parametrizations.weight_norm(net.projector.fc).eval(),
        lambda net: setattr(net, "forward", net.forward),
        lambda net: net.set_submodule("projector.fc", _Own(96, 24).eval()),
        lambda net: net.double(),
    ],
    ids=["training", "one in training", "hook", "hook before", "backward hook", "parametrization", "forward",
         "own class", "float64"],
)  # fmt: skip
def test_the_network_itself_runs(prepare: Callable[[nn.Module], Any], captures: Callable[[CudaGraphs], int]) -> None:
    net, features = randomized("wespeaker"), features_of(2, 50)
    graphed = CudaGraphs(net)
    with torch.no_grad():
        graphed(features)
        prepare(net)
        features = features.to(net.encoder.stem.conv.weight.dtype)
        state = copy.deepcopy(net.state_dict())
        got = graphed(features)
        net.load_state_dict(state)  # training moves statistics
        assert torch.equal(got, net(features)) and captures(graphed) == 1


def test_inputs_for_the_network_itself(captures: Callable[[CudaGraphs], int]) -> None:
    net = randomized("wespeaker")
    graphed = CudaGraphs(net, max_batch=2, max_frames=50)
    assert graphed(features_of(1, 50)).requires_grad  # of the weights
    leaf = features_of(1, 50).requires_grad_()
    net.requires_grad_(False)
    assert graphed(leaf).requires_grad
    with torch.no_grad():
        for rows, frames in ((3, 50), (1, 51), (0, 50)):
            features = features_of(rows, frames)
            assert torch.equal(graphed(features), net(features))
        for features, lengths, message in (
            (features_of(1, 50)[:, :, :19], None, r"M = 20, got \(1, 50, 19\)"),
            (features_of(1, 0), None, "at least one frame"),
            (features_of(1, 50)[0], None, "must have shape"),
            (features_of(1, 50).double(), None, "must be torch.float32"),
            (features_of(2, 50), torch.tensor([5]), r"shape \(B,\)"),
            (features_of(2, 50), torch.tensor([5, 6], dtype=torch.int32), "int64"),
            (features_of(1, 50).numpy(), None, "must be a torch tensor"),
        ):
            with pytest.raises(InputError, match=message):
                graphed(features, lengths)
    assert captures(graphed) == 0


def test_elsewhere_than_on_a_gpu_the_network_runs() -> None:
    graphed = CudaGraphs(randomized("wespeaker"))
    with torch.no_grad():
        assert torch.equal(graphed(features_of(2, 30)), graphed.net(features_of(2, 30)))
    assert len(graphed) == 0


def test_compiles_as_the_network(captures: Callable[[CudaGraphs], int]) -> None:
    net = randomized("wespeaker")
    graphed, features = CudaGraphs(net), features_of(2, 50)
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(lambda x: graphed(x), fullgraph=True, backend="eager")(features)
        assert captures(graphed) == 0 and relative_error(got, net(features)) < 1e-5


@pytest.mark.usefixtures("captures")
def test_copies_start_anew() -> None:
    graphed = CudaGraphs(randomized("wespeaker"), 2, 100, 25, 3)
    with torch.no_grad():
        want = graphed(features_of(2, 30))
        for other in (copy.deepcopy(graphed), pickle.loads(pickle.dumps(graphed))):
            assert len(other) == 0 and other.net is not graphed.net and other._limits == graphed._limits
            assert relative_error(other(features_of(2, 30)), want) < 1e-5


@pytest.mark.usefixtures("captures")
def test_threads_do_not_mix() -> None:
    net = randomized("wespeaker")
    graphed = CudaGraphs(net, frames_step=20, max_graphs=2)
    wrong: list[Any] = []
    with torch.no_grad():
        wanted = {(frames, seed): net(features_of(2, frames, seed)) for frames in (20, 33, 60) for seed in range(4)}

    def work(seed: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                for frames in (20, 33, 60):
                    got = graphed(features_of(2, frames, seed))
                    if not relative_error(got, wanted[frames, seed]) < 1e-5:
                        wrong.append((frames, seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(graphed) == 2


@pytest.mark.parametrize("name", ["max_batch", "max_frames", "frames_step", "max_graphs"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_refuses_limits(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} must be a positive integer, got {value!r}"):
        CudaGraphs(randomized("wespeaker"), **{name: value})


@pytest.mark.parametrize("net", [models.create("ecapa_tdnn", channels=16, padding="batch"), nn.Linear(2, 2)], ids=type)
def test_refuses_networks_whose_rows_depend_on_their_padding(net: nn.Module) -> None:
    with pytest.raises(InputError, match="padding='exact'"):
        CudaGraphs(net)


@pytest.mark.gpu
def test_on_a_gpu(require: Callable[[str, bool, str], None]) -> None:
    require("cuda", torch.cuda.is_available(), "torch finds no CUDA device")
    net = randomized("wespeaker").cuda()
    graphed = CudaGraphs(net, frames_step=20, max_graphs=3)
    streams = [torch.cuda.Stream() for _ in range(2)]
    with torch.inference_mode():
        for precision in ("fp32", "bf16", "fp16"):
            set_precision(net, precision)
            inputs = [(features.cuda(), lengths.cuda()) for features, lengths in map(batch, range(4))]
            inputs += [(features_of(rows, frames).cuda(), None) for rows, frames in ((1, 40), (2, 33), (3, 60), (1, 1))]
            torch.cuda.synchronize()
            got = []
            for turn in range(3):
                for number, pair in enumerate(inputs):  # graphs share their memory, whatever the streams
                    with torch.cuda.stream(streams[(turn + number) % 2]):
                        got.append(graphed(*pair))
            torch.cuda.synchronize()
            assert len(graphed) == 3
            for result, pair in zip(got, 3 * inputs, strict=True):
                want = net(*pair)
                if precision == "fp32":
                    assert relative_error(result, want) < 4e-5  # either is within 2e-5 of the truth
                else:  # either is within the angle whose cosine is 0.9995; between them it may be twice as wide
                    assert F.cosine_similarity(result, want).min() > 2 * 0.9995**2 - 1
    set_precision(net, "fp32")
    with torch.no_grad():
        for change in ("p.data =", "p in place", "buffer in place", "eps", "pooling", "to"):
            before = graphed(*inputs[0])
            CHANGES[change](net)
            got = graphed(*inputs[0])
            assert relative_error(got, net(*inputs[0])) < 4e-5 < relative_error(got, before)
