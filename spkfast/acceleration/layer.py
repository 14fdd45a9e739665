"""A swapped layer: the module it was, computing by a spkfast layer over the same torch layers."""

from __future__ import annotations

import dataclasses
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spkfast.acceleration.network import Network
from spkfast.nn import poolings
from spkfast.nn._watch import HOOKS
from spkfast.nn.inference import NORMS, InferenceLayer, autocast_type, inference_params
from spkfast.nn.se_res2net import SERes2NetBlock, TdnnLayer, real_frames
from spkfast.ops.tdnn_layer import pack_tdnn_layer, run_packed_layer

DROPOUTS = (nn.Dropout, nn.Dropout1d)
_SETTINGS = ("precision", "input_ranges")
# What a convolution computes by beside its tensors, and look() tells.
_NUMBERS = ("dilation", "groups", "padding", "padding_mode", "stride")
TITLES = {
    "conv": "convolution",
    "block": "SE-Res2Net block",
    "layer": "convolution, ReLU and batch norm",
    "network": "ECAPA-TDNN as a whole",
    "pool": "attentive statistics pooling",
}


def look(leaf: nn.Module) -> tuple[Any, ...] | None:
    """Kind and sizes of a layer of torch; None for one that is not as the spkfast layers have it."""
    kind = next((kind for kind in (nn.Conv1d, nn.Linear, *NORMS) if isinstance(leaf, kind)), None)
    own = getattr(type(leaf), "_spkfast_original", type(leaf))
    if kind is None or own.forward is not kind.forward or leaf._modules:
        return None
    weight, bias = (leaf._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or bias is None:
        return None
    if isinstance(leaf, nn.Conv1d):
        plain = leaf.padding_mode == "zeros" and leaf.stride == (1,)
        return ("product", *weight.shape, leaf.padding, leaf.dilation, leaf.groups) if plain else None
    if isinstance(leaf, NORMS):
        return ("norm", *weight.shape) if leaf.running_mean is not None else None
    return ("product", *weight.shape)


class Convolution(InferenceLayer):
    """A convolution alone, with the parameters of another one."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, N, T)."""
        weight = cast(Tensor, self.weight)
        # The kernels do not check sizes; torch names those that are wrong.
        tensors = self.weights_for_kernels(x) if x.shape[1] == weight.shape[1] else None
        if tensors is None:
            if self.precision != "fp32":  # a layer before it ran on its kernels
                x = x.to(weight.dtype)
            padding = (weight.shape[2] - 1) // 2 * self.dilation
            return F.conv1d(x, weight, cast(Tensor, self.bias), padding=padding, dilation=self.dilation)
        precision, input_range = self.products_at(x), self.input_ranges.get("in")
        packed = self.kept.of(
            tensors,
            (precision, input_range),
            lambda: pack_tdnn_layer(inference_params(self), precision=precision, input_range=input_range),
        )
        return run_packed_layer([x], packed, None, dilation=self.dilation, relu=False)

    def quantised(self) -> dict[str, nn.Module]:
        """Where the inputs of its product are seen."""
        return {"in": self}


_MAKERS: dict[str, Callable[..., nn.Module]] = {
    "block": SERes2NetBlock, "conv": Convolution, "layer": TdnnLayer, "network": Network, "pool": poolings.create
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """What takes the place of a layer: enough to build it again after a copy.

    Attributes:
        kind: ``block``, ``conv``, ``layer``, ``network`` or ``pool``.
        options: Keywords of the spkfast layer.
        leaves: Name of each torch layer in the spkfast layer, and in the one whose place it takes.
        looks: What :func:`look` says of them.
        others: Name and class of every other module in the layer whose place it takes.
        lengths: Its second argument is relative lengths.
        column: It returns (B, P, 1), or of a network (B, 1, E), in place of (B, P).
        maps: It takes maps (B, C, F, T) too.
    """

    kind: str
    options: dict[str, Any]
    leaves: dict[str, str]
    looks: tuple[Any, ...] = ()
    others: tuple[tuple[str, type], ...] = ()
    lengths: bool = False
    column: bool = False
    maps: bool = False

    @property
    def title(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{TITLES[self.kind]} ({options})"

    def others_in(self, module: nn.Module) -> tuple[tuple[str, type], ...]:
        """Name and class of what is in a module, but for the leaves."""
        leaves = set(self.leaves.values())
        found = []
        waiting = [(name, part) for name, part in module._modules.items() if part is not None]
        while waiting:
            name, part = waiting.pop()
            if name in leaves:
                continue
            found.append((name, getattr(type(part), "_spkfast_original", type(part))))
            waiting += [(f"{name}.{inner}", child) for inner, child in part._modules.items() if child is not None]
        return tuple(found)

    def build(self, module: nn.Module) -> nn.Module:
        """The spkfast layer over the torch layers of ``module``; nothing is allocated."""
        with torch.device("meta"):
            layer = _MAKERS[self.kind](**self.options)
        for ours, theirs in self.leaves.items():
            parent, _, name = ours.rpartition(".")
            layer.get_submodule(parent)._modules[name] = module.get_submodule(theirs)
        if self.kind == "conv":  # the module itself, which as a child of its own view would never be freed
            layer._parameters = module._parameters
        return layer

    def run(self, layer: nn.Module, x: Tensor, second: Any = None) -> Any:
        """What the layer whose place it takes would give, of frames and relative lengths.

        The second argument of TaoRuijie's network is whether to augment.
        """
        if self.kind in ("conv", "layer"):
            return _in_type_of(x, layer(x))
        if isinstance(second, bool):
            return layer(x, None, second)
        num_frames = x.shape[1 if self.kind == "network" else -1]
        lengths = None if second is None else _counts(second, num_frames)
        if self.kind == "pool":
            out = layer(x, lengths)
            return out[..., None] if self.column else out
        out = layer(x, real_frames(lengths, num_frames, x.dtype))
        if self.kind == "block":
            return _in_type_of(x, out)
        return out[:, None] if self.column else out


def _in_type_of(x: Tensor, out: Tensor) -> Tensor:
    """The output of a layer in the type that the code around it counts on; autocast gives it another one."""
    return out.to(x.dtype) if autocast_type(x.device.type) is None else out


def _counts(lengths: Tensor, frames: int) -> Tensor:
    """Frames t for which ``t < lengths * frames`` holds, in the rounding of the toolkits that ask this."""
    return (lengths * frames).ceil().clamp(0, frames).to(torch.int64)


class Unknown(Exception):
    """Why a module cannot be swapped; ``similar`` where it is built like a known layer."""

    def __init__(self, reason: str, similar: bool = False) -> None:
        super().__init__(reason)
        self.similar = similar


class Accelerated:
    """Goes before the class of a swapped layer; see :func:`accelerate`."""

    _spkfast_original: type
    _spkfast_plan: Plan

    @property
    def spkfast_kind(self) -> str:
        """What it was recognised as."""
        return self._spkfast_plan.kind

    def _spkfast_inference_form(self) -> nn.Module | None:
        """The spkfast layer that computes, now or once the mode and hooks allow; None where there is none."""
        view = _view(cast(nn.Module, self))
        return None if view is None else view.layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class exists in memory alone, but what that is made of can be imported.
        return _restore, (self._spkfast_original,), self.__getstate__()

    def __getstate__(self) -> Any:
        # The view is made again: it is no more than another arrangement of the same torch layers, but for its settings.
        state: dict[str, Any] = cast(Any, super()).__getstate__()
        view = state.pop("_spkfast_view", None)
        return state if view is None else {**state, "_spkfast_settings": view.settings()}

    def train(self, mode: bool = True) -> Any:
        super().train(mode)  # type: ignore[misc]
        view = self.__dict__.get("_spkfast_view")
        if view is not None and view.layer is not None:
            view.layer.train(mode)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica.__dict__.pop("_spkfast_view", None)
        return replica


def _restore(original: type[nn.Module]) -> nn.Module:
    """A swapped layer without its state; pickles name this function."""
    cls = accelerated_class(original)
    return cls.__new__(cls)


def accelerated_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class of a swapped layer: its own, with another forward.

    Raises:
        Unknown: If there can be none.
    """
    if original in _CLASSES:
        return _CLASSES[original]
    own = original.forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        view = _view(self)
        inputs = None if view is None else view.inputs(args, kwargs)
        if view is None or inputs is None or not view.usable(self):
            return own(self, *args, **kwargs)
        return view.run(*inputs)

    forward.__module__ = __name__  # the spkfast layers run their kernels only where all inside is known to them
    body = {"forward": forward, "_spkfast_original": original, "__module__": __name__, "__doc__": original.__doc__}
    bases = (Accelerated, original)
    try:
        cls = types.new_class(f"Accelerated{original.__name__}", bases, exec_body=lambda space: space.update(body))
    except Exception as error:  # whatever its __init_subclass__ or metaclass raises
        raise Unknown(f"its class cannot be derived from: {error}", similar=True) from error
    return _CLASSES.setdefault(original, cls)


_CLASSES: dict[type, type] = {}


def swap(module: nn.Module, plan: Plan) -> None:
    """Makes a module compute by the plan from now on."""
    looks = tuple(look(module.get_submodule(name)) for name in plan.leaves.values() or [""])
    plan = dataclasses.replace(plan, looks=looks, others=plan.others_in(module))
    # Changing the class, not the object, keeps whatever refers to the module: other parents, hooks, isinstance.
    cls = accelerated_class(type(module))
    module.__dict__["_spkfast_plan"] = plan
    module.__class__ = cls
    _view(module)


class _View:
    """The spkfast layer of a module, and how to tell that it still stands for it.

    It is no child of the module, so it adds no names to the state dict, and its torch layers are the module's own.
    """

    def __init__(self, module: nn.Module, plan: Plan, settings: dict[str, dict[str, Any]]) -> None:
        self.plan, self._module = plan, weakref.ref(module)
        self._settings = settings
        self._links: list[tuple[dict[str, Any], str, Any]] = [
            (of._modules, name, part) for of in module.modules() for name, part in of._modules.items()
        ]
        self._sizes = [(of._modules, len(of._modules)) for of in module.modules()]
        parts = [part for part in module.modules() if part is not module]
        self._classes = [(part, type(part)) for part in parts]
        # Each must be empty: what hangs on a part, or was put in its place, counts on its code being run.
        self._empty = [getattr(part, name) for part in parts for name in HOOKS]
        self._attributes = [part.__dict__ for part in parts]
        self._norms = [part for part in parts if isinstance(part, NORMS)]
        self._dropouts = [part for part in parts if isinstance(part, DROPOUTS)]
        self.layer: nn.Module | None = None
        found = dict(module.named_modules(remove_duplicate=False))
        leaves = [found.get(name) for name in plan.leaves.values()]
        self._links += [
            (leaf.__dict__, name, leaf.__dict__[name])
            for leaf in leaves
            for name in _NUMBERS
            if leaf is not None and name in leaf.__dict__
        ]
        looks = tuple(leaf and look(leaf) for leaf in leaves or [module])
        if (plan.looks, plan.others) == (looks, plan.others_in(module)):
            self._empty += [leaf._modules for leaf in leaves or [module] if leaf is not None and look(leaf)]
            self.layer = plan.build(module)
            self._own = [part for part in self.layer.modules() if part not in set(parts)]
            for name, part in self.layer.named_modules():
                part.__dict__.update(settings.get(name, {}))

    def settings(self) -> dict[str, dict[str, Any]]:
        """Precision and ranges of its inference layers, by name."""
        if self.layer is None:
            return self._settings
        parts = dict(self.layer.named_modules())
        return {
            name: {key: part.__dict__[key] for key in _SETTINGS if key in part.__dict__}
            for name, part in parts.items()
            if isinstance(part, InferenceLayer)
        }

    def holds(self, module: nn.Module) -> bool:
        """Whether it is of this module, which is still made of the same parts, of the same classes and numbers."""
        if self._module() is not module:
            return False
        for parts, size in self._sizes:
            if len(parts) != size:
                return False
        for part, kind in self._classes:
            if type(part) is not kind:
                return False
        for values, name, value in self._links:  # noqa: SIM110 (faster than all)
            if values.get(name) is not value:
                return False
        return True

    def usable(self, module: nn.Module) -> bool:
        """Whether it may run in place of the module's own code; if so it is in the module's mode."""
        if self.layer is None or any(self._empty) or any("forward" in attributes for attributes in self._attributes):
            return False
        # Pruning and the like take away the weight, which is the module's own.
        if self.plan.kind == "conv" and look(module) != self.plan.looks[0]:
            return False
        if any(dropout.training and dropout.p for dropout in self._dropouts):
            return False
        # Batch norm decides what is computed; fine-tuning may freeze it, or some of it.
        modes = [norm.training for norm in self._norms] or [module.training]
        training = modes[0]
        if any(mode != training for mode in modes):
            return False
        if self.layer.training != training:
            for part in self._own:
                part.training = training
        return True

    def run(self, x: Tensor, second: Any) -> Any:
        assert self.layer is not None
        return self.plan.run(self.layer, x, second)

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any] | None:
        """Arguments of :meth:`Plan.run`; None for what only the module's own code knows."""
        x = args[0] if args else None
        if self.plan.options.get("family") == "taoruijie":
            augment = args[1] if len(args) == 2 else kwargs.get("aug")
            known = isinstance(x, Tensor) and x.ndim == 2 and len(args) + len(kwargs) == 2 and isinstance(augment, bool)
            return (cast(Tensor, x), augment) if known else None
        if not isinstance(x, Tensor) or not (x.ndim == 3 or (x.ndim == 4 and self.plan.maps)):
            return None
        if all(value is None for value in (*args[1:], *kwargs.values())):
            return x, None
        if not self.plan.lengths or len(args) + len(kwargs) != 2:
            return None
        lengths = args[1] if len(args) == 2 else kwargs.get("lengths")
        if not isinstance(lengths, Tensor) or lengths.shape != x.shape[:1] or lengths.device != x.device:
            return None
        return x, lengths


def _view(module: nn.Module) -> _View | None:
    """The view of a swapped layer, which may not be usable; None where there is none."""
    attributes = module.__dict__
    plan = attributes.get("_spkfast_plan")  # a class may make new objects of its own class, as Sequential's slices
    if plan is None or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return None
    view: _View | None = attributes.get("_spkfast_view")
    if not torch.compiler.is_compiling() and (view is None or not view.holds(module)):
        settings = attributes.get("_spkfast_settings", {}) if view is None else view.settings()
        view = attributes["_spkfast_view"] = _View(module, plan, settings)
    return view
