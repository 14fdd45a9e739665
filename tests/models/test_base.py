"""A network of spkfast.models by its kernels alone: equal to its modules, used where it may be, and never stale."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spkfast import backends, models
from spkfast.models.base import SpeakerModel
from spkfast.models.ecapa_tdnn import DIALECTS
from spkfast.nn import calibrate, input_ranges, poolings, projectors, set_input_ranges, set_precision
from tests.models.test_ecapa_tdnn import randomized

_DIALECTS = [name for name in DIALECTS if name != "3dspeaker"]  # speechbrain by another name


def batch(seed: int = 0, frames: int = 40) -> Tensor:
    return torch.randn(2, frames, 20, generator=torch.Generator().manual_seed(seed))


class Counted:
    """Calls of a network, and how many of them its kernels alone answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answered = 0
        bound = SpeakerModel._bound

        def counted(model: SpeakerModel, features: Tensor) -> Any:
            found = bound(model, features)
            self.answered += found is not None
            return found

        monkeypatch.setattr(SpeakerModel, "_bound", counted)

    def call(self, model: nn.Module, *inputs: Any) -> tuple[Tensor, bool]:
        before = self.answered
        with torch.no_grad():
            return model(*inputs), self.answered > before


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def modules(model: nn.Module, features: Tensor) -> Tensor:
    """What the modules give, each looking for itself whether its kernels apply."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeakerModel, "_bound", lambda model, features: None)
        return model(features)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dialect", _DIALECTS)
def test_equals_the_modules(dialect: str, precision: Any, calls: Counted) -> None:
    model = randomized(dialect)
    calibrate(model, [batch(1)])
    set_precision(model, precision)
    for frames in (40, 1, 7):
        features = batch(frames=frames)
        got, answered = calls.call(model, features)
        # The layers are the same, the projection is not.
        assert answered and error(got, modules(model, features)) < 1e-6
        again, answered = calls.call(model, features, torch.full((2,), frames))
        assert answered and torch.equal(again, got)


@pytest.mark.parametrize("pooling", poolings.list())
def test_every_pooling(pooling: str, calls: Counted) -> None:
    model = models.create("ecapa_tdnn", channels=32, feature_dim=20, pooling=pooling).eval()
    got, answered = calls.call(model, batch())
    assert answered and error(got, modules(model, batch())) < 1e-6


@pytest.mark.parametrize("projector", projectors.list())
def test_every_projector(projector: str, calls: Counted) -> None:
    model = models.create("ecapa_tdnn", channels=32, feature_dim=20)
    size = model.pooling.output_size
    model.projector = projectors.create(projector, size, embedding_dim=size if projector == "identity" else 24)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.eval()
    got, answered = calls.call(model, batch())
    assert answered and error(got, modules(model, batch())) < 1e-6


def test_projection_without_bias(calls: Counted) -> None:
    model = randomized("wespeaker")
    model.projector.fc = nn.Linear(model.pooling.output_size, 24, bias=False).eval()
    got, answered = calls.call(model, batch())
    assert answered and error(got, modules(model, batch())) < 1e-6


def _own_class(model: nn.Module) -> None:
    class Own(type(model.encoder.blk2)):  # type: ignore[misc]
        pass

    model.encoder.blk2.__class__ = Own


def _no_statistics(model: nn.Module) -> None:
    model.encoder.blk1.in_.bn = nn.BatchNorm1d(32, track_running_stats=False).eval()


_OBSTACLES: dict[str, Callable[[nn.Module], object]] = {
    "training": lambda model: model.train(),
    "a part in training": lambda model: model.encoder.blk2.se.train(),
    "a hook on a container": lambda model: model.encoder.register_forward_hook(lambda *_: None),
    "a hook on a part": lambda model: model.projector.bn.register_forward_pre_hook(lambda *_: None),
    "a forward of its own": lambda model: setattr(model.pooling, "forward", model.pooling.forward),
    "another class": _own_class,
    "no statistics": _no_statistics,
    "a precision of GPUs": lambda model: setattr(model.encoder.blk1, "precision", "fp16"),
    "several precisions": lambda model: set_precision(model.encoder.blk3, "bf16"),
    "precision of the encoder alone": lambda model: set_precision(model.encoder, "bf16"),
    "precision of GPUs of the pooling": lambda model: set_precision(model.pooling, "fp16"),
    "a compiled part": lambda model: model.encoder.compile(backend="eager"),
    "parametrization": lambda model: nn.utils.parametrizations.weight_norm(model.projector.fc),
}


@pytest.mark.parametrize("obstacle", _OBSTACLES)
def test_modules_run_where_something_speaks_against_it(obstacle: str, calls: Counted) -> None:
    model = randomized("wespeaker")
    assert calls.call(model, batch())[1]
    _OBSTACLES[obstacle](model)
    got, answered = calls.call(model, batch())
    assert not answered and got.isfinite().all()


def test_modules_run_for_gradients_and_other_types(calls: Counted) -> None:
    model = randomized("wespeaker")
    lengths = torch.tensor([40, 9])
    assert not calls.call(model, batch(), lengths)[1]
    model(batch()).sum().backward()
    model.requires_grad_(False)
    model(batch().requires_grad_()).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert not calls.call(model, batch())[1]
    with backends.only_reference():
        assert not calls.call(model, batch())[1]
    assert calls.answered == 0
    assert model(batch()).isfinite().all() and calls.answered == 1  # frozen, and no gradient wanted
    assert not calls.call(copy.deepcopy(model).double(), batch().double())[1]
    assert not calls.call(copy.deepcopy(model).bfloat16(), batch().bfloat16())[1]
    program = torch.export.export(model, (batch(),))
    traced = torch.jit.trace(model, (batch(), torch.tensor([40, 40])), check_trace=False)
    assert calls.answered == 1
    assert error(program.module()(batch()), model(batch())) < 1e-5
    assert error(traced(batch(), lengths), model(batch(), lengths)) < 1e-5


def _set_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def _uncounted(part: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for parameter in model.get_submodule(part).parameters():
            parameter.data.mul_(1.1)
        model.get_submodule(part).eval()

    return change


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.projector.bn.running_mean.add_(1)
        model.encoder.blk3.se.fc1.weight.mul_(1.1)


def _replace(name: str) -> Callable[[nn.Module], None]:
    return lambda model: model.set_submodule(name, randomized("wespeaker", seed=7).get_submodule(name))


def _dilate(model: nn.Module) -> None:
    for conv in (layer.conv for layer in model.encoder.blk2.res):
        conv.dilation = conv.padding = (5,)


def _ranges(model: nn.Module) -> None:
    set_precision(model, "int8")
    model(batch())
    halved = {
        name: {key: (low / 2, high / 2) for key, (low, high) in of.items()} for name, of in input_ranges(model).items()
    }
    set_input_ranges(model, halved)


_CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": _in_place,
    "data": _set_data,
    "uncounted, told of the whole": _uncounted(""),
    "uncounted, told of a layer": _uncounted("encoder.blk2"),
    "uncounted, told of the pooling": _uncounted("pooling"),
    "uncounted, told of the projector": _uncounted("projector"),
    "another block": _replace("encoder.blk2"),
    "another layer in a block": _replace("encoder.blk2.res.1"),
    "another projector": _replace("projector"),
    "dilation": _dilate,
    "which group passes": lambda model: setattr(model.encoder.blk1.res, "first_passes", True),
    "precision": lambda model: set_precision(model, "bf16"),
    "ranges": _ranges,
    "state": lambda model: model.load_state_dict(randomized("wespeaker", seed=7).state_dict()),
}  # fmt: skip


@pytest.mark.parametrize("change", _CHANGES)
def test_changes_are_seen(change: str, calls: Counted) -> None:
    model = randomized("wespeaker")
    calibrate(model, [batch(1)])
    before, _ = calls.call(model, batch())
    with torch.no_grad():
        _CHANGES[change](model)
    got, answered = calls.call(model, batch())
    fresh = copy.deepcopy(model)
    assert answered and error(got, before) > 1e-4
    assert error(got, modules(fresh, batch())) < 1e-6


def test_binds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bind, bound = randomized("wespeaker"), SpeakerModel._bind, []
    monkeypatch.setattr(SpeakerModel, "_bind", lambda *args: bound.append(None) or bind(*args))
    with torch.no_grad():
        for frames in (40, 9, 40):
            model(batch(frames=frames))
            model(batch(frames=frames), torch.tensor([1, frames]))
            model.requires_grad_(False)
            with torch.inference_mode():
                model(batch(frames=frames))
    assert len(bound) == 1


def test_copies_bind_for_themselves(calls: Counted) -> None:
    model = randomized("wespeaker")
    want, _ = calls.call(model, batch())
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ):
        got, answered = calls.call(other, batch())
        assert answered and torch.equal(got, want)
        _set_data(other)
        assert error(calls.call(other, batch())[0], want) > 1e-4
        assert torch.equal(calls.call(model, batch())[0], want)
