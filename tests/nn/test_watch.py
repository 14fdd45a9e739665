"""What is asked of modules at every call: the compiled functions and their definitions alike."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from spkfast.nn import _watch


@pytest.fixture(params=["definition", "compiled"], autouse=True)
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "definition":
        monkeypatch.setattr(_watch, "_compiled", None)
    else:
        assert _watch._compiled is not None


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_values_that_were_replaced(kind: Callable[..., Any]) -> None:
    value = object()
    values = kind(a=value, b=None)
    entries: Any = [(values, "a", value), (values, "b", None), (values, "absent", None)]
    assert not _watch.is_changed(entries, [(values, 2)], [])
    values["a"] = object()
    assert _watch.is_changed(entries, [], [])
    values["a"] = value
    assert not _watch.is_changed(entries, [], [])
    del values["a"]
    assert _watch.is_changed(entries, [], [])
    values["a"], values["absent"] = value, 1
    assert _watch.is_changed(entries, [], []) and not _watch.is_changed(entries[:2], [], [])
    assert _watch.is_changed([], [(values, 2)], [])


def test_other_classes() -> None:
    module: nn.Module = nn.Conv1d(2, 2, 1)
    classes = [(module, nn.Conv1d)]
    assert not _watch.is_changed([], [], classes)
    module.__class__ = type("Own", (nn.Conv1d,), {})
    assert _watch.is_changed([], [], classes)


def test_watched_modules() -> None:
    module = nn.BatchNorm1d(2).eval()
    of_modules = [nn.Linear(2, 2).eval().__dict__, module.__dict__]

    def watched() -> tuple[bool, bool]:
        return bool(_watch.is_watched(of_modules, True)), bool(_watch.is_watched(of_modules, False))

    assert watched() == (False, False)
    for register in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        module.register_full_backward_hook,
        module.register_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)  # type: ignore[arg-type]
        assert watched() == (True, True)
        handle.remove()
        assert watched() == (False, False)
    module.train()
    assert watched() == (True, False)
    module.eval()
    assert watched() == (False, False)
    module.compile(backend="eager")
    assert watched() == (True, True)
    module._compiled_call_impl = None
    assert watched() == (False, False)
    module.forward = lambda x: x  # type: ignore[method-assign]
    assert watched() == (True, True)


def test_tensors_that_changed() -> None:
    tensors = [nn.Parameter(torch.ones(3)), torch.ones(0), torch.ones(2)]
    before = _watch.states_of(tensors)
    assert _watch.states_of(tensors) == before and hash(before) == hash(_watch.states_of(tensors))
    kept = tensors[2].detach()  # whose memory nothing else takes
    changes: list[Callable[[], object]] = [
        lambda: tensors[2].add_(1),
        lambda: setattr(tensors[2], "data", torch.zeros(2)),
        lambda: tensors.__setitem__(2, tensors[2].detach()),
        lambda: tensors.pop(),
    ]
    for change in changes:
        change()
        assert _watch.states_of(tensors) != before
        before = _watch.states_of(tensors)
    assert kept.tolist() == [2, 2]


def test_parts_in_training() -> None:
    shared = nn.Dropout()
    net = nn.Sequential(nn.Sequential(shared, nn.Linear(2, 2)), shared, nn.ReLU()).eval()
    net.register_module("none", None)
    assert _watch.in_training(net) == []
    shared.train()
    net[2].train()
    assert {*map(id, _watch.in_training(net))} == {id(shared), id(net[2])}
    assert _watch.in_training(net.train())[0] is net
    scripted = torch.jit.script(nn.Sequential(nn.ReLU()).eval())
    assert _watch.in_training(scripted) == []
    assert len(_watch.in_training(scripted.train())) == 2


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises((TypeError, AttributeError)):
        _watch.is_watched([3], True)  # type: ignore[list-item]
    with pytest.raises(AttributeError):
        _watch.states_of([3])  # type: ignore[list-item]
    with pytest.raises(AttributeError):
        _watch.in_training(3)  # type: ignore[arg-type]
