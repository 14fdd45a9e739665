"""What is asked of modules at every call, to see that nothing in them changed.

Each has its definition here, and runs in the compiled module, in a part of the time, where that was built.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from spkfast import backends
from spkfast.errors import InputError

try:
    _compiled = backends.compiled_module()
except InputError:  # as where only Triton's kernels run
    _compiled = None

# Where a module keeps its hooks.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_changed(
    entries: list[tuple[dict[str, Any], str, Any]],
    sizes: list[tuple[dict[str, Any], int]],
    classes: list[tuple[Any, type]],
) -> bool:
    """Whether a value is another one, or a number of values or a class is.

    Args:
        entries: Dictionary, key, and the value that it had; None where it had none.
        sizes: Dictionary, and how many values it had.
        classes: Object, and the class that it had.
    """
    if _compiled is not None:
        return _compiled.is_changed(entries, sizes, classes)
    return (
        any(type(module) is not kind for module, kind in classes)
        or any(len(values) != size for values, size in sizes)
        or any(values.get(name) is not value for values, name, value in entries)
    )


def is_watched(modules: list[dict[str, Any]], evaluating: bool) -> bool:
    """Whether one of the modules has a hook, a forward of its own or a compiled one or, where all should be in
    evaluation mode, is in training mode; each is given as its ``__dict__``."""
    if _compiled is not None:
        return _compiled.is_watched(modules, evaluating)
    return any(
        any(of_module.get(hooks) for hooks in HOOKS)
        or (evaluating and of_module.get("training"))
        or "forward" in of_module
        or of_module.get("_compiled_call_impl") is not None
        for of_module in modules
    )


def states_of(tensors: list[Tensor]) -> Hashable:
    """What differs where one of the tensors is another one, lies elsewhere, or changed in a way that torch counts."""
    if _compiled is not None:
        return _compiled.states_of(tensors)
    return tuple([(id(tensor), tensor._version, tensor.data_ptr()) for tensor in tensors])


def in_training(module: nn.Module) -> list[nn.Module]:
    """The module and those inside it that are in training mode."""
    if _compiled is not None:
        return _compiled.in_training(module)
    parts = [module]
    for part in parts:  # modules() takes three times as long, which a second of audio feels
        parts += filter(None, part._modules.values())
    return [part for part in parts if part.training]
