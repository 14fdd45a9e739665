"""Faster layers for the models of other toolkits, swapped in place."""

from __future__ import annotations

import logging
from typing import NamedTuple, TypeVar

from torch import nn

from spkfast.acceleration.layer import Accelerated, Plan, Unknown, swap
from spkfast.acceleration.structure import convolution, recognise
from spkfast.errors import InputError
from spkfast.nn.pooling import Pooling
from spkfast.nn.se_res2net import SERes2NetBlock, TdnnLayer

__all__ = ["Accelerated", "accelerate"]

_log = logging.getLogger("spkfast.accelerate")
_Model = TypeVar("_Model", bound=nn.Module)


def accelerate(model: _Model) -> _Model:
    """Swaps the layers of a live model that spkfast has a faster one for, in place.

    Layers are recognised by structure, not by name: by the types and sizes of the torch layers that they are made of.
    Then the layer and what would take its place are compared on small random inputs and weights, in float64, in
    evaluation and training mode, outputs and gradients; where they differ, as in a subclass that computes something
    else, the layer stays. Known are the SE-Res2Net blocks, the layers of convolution, ReLU and batch norm, and the
    attentive statistics poolings of wespeaker, speechbrain, 3D-Speaker, TaoRuijie's ECAPA-TDNN and ESPnet; and, by the
    names of their weights, the whole networks of all but ESPnet, where what lies between the layers is swapped too.

    A swapped layer is the same object: it keeps its parameters and their names, hooks, children and methods, and stays
    an instance of its class. It computes with these parameters, so that optimisers, ``state_dict``, ``to``, ``half``,
    ``deepcopy``, ``pickle`` and distributed training work as before. Where it cannot stand in for the layer (hooks on
    a part of it, arguments that it does not know, export to a graph) the layer's own code runs.

    What was swapped, and of everything else why not, goes to the logger ``spkfast.accelerate`` at level INFO.

    Args:
        model: Any module; models without a known layer are left as they are, with one warning in the log. A second
            call changes nothing.

    Returns:
        The model.

    Raises:
        InputError: If ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    known, left = _walk(model, "", set())
    for part in left:
        _log.info("%s (%s) stays: %s", part.name, part.kind, part.reason)
    if not known:
        _log.warning("no layer of %s is known to spkfast: it stays as it is", type(model).__name__)
    return model


class _Left(NamedTuple):
    """A module that stays as it is."""

    name: str
    kind: str
    reason: str
    similar: bool


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> tuple[bool, list[_Left]]:
    """Swaps what is known in a module, parents first.

    Returns:
        Whether there was anything, and what stays: of a module without anything known the module itself, not each of
        its parts, but for those that are built like a known one.
    """
    if isinstance(module, (Accelerated, SERes2NetBlock, TdnnLayer, Pooling)):
        return True, []
    if module in seen:
        return False, []
    seen.add(module)
    title = name or "the model itself"
    plan, own = None, _Left(title, type(module).__name__, "", False)
    try:
        plan = recognise(module)
    except Unknown as unknown:
        own = own._replace(reason=str(unknown), similar=unknown.similar)
    if plan is not None and plan.kind != "network":
        _swap(module, title, plan)
        return True, []
    children = {f"{name}.{child_name}" if name else child_name: child for child_name, child in module.named_children()}
    known, left = False, []
    for child_name, child in children.items():
        known_here, left_here = _walk(child, child_name, seen)
        known |= known_here
        left += left_here
    if any(isinstance(child, Accelerated) and child.spkfast_kind == "block" for child in children.values()):
        # Beside the blocks of a network, what takes time are the products between them.
        for child_name, child in children.items():
            between = None if isinstance(child, Accelerated) else convolution(child)
            if between is not None:
                _swap(child, child_name, between)
                left = [part for part in left if part.name != child_name]
    if plan is not None:  # after its layers, which serve where the network's own code has to run
        _swap(module, title, plan)
        return True, left
    if not known:
        return False, [own, *(part for part in left if part.similar)]
    return True, [own, *left] if own.similar else left


def _swap(module: nn.Module, name: str, plan: Plan) -> None:
    _log.info("%s (%s) swapped for %s", name, type(module).__name__, plan.title)
    swap(module, plan)
