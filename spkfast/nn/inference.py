"""Layers that run on the kernels of the ops: when that applies, packed weights, precision, calibration."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.optim.optimizer import register_optimizer_step_post_hook

from spkfast import backends
from spkfast.errors import InputError, check_name
from spkfast.nn import _watch
from spkfast.nn.sync_batch_norm import SyncBatchNorm
from spkfast.nn.training import Kernels
from spkfast.ops._packing import PRECISIONS, Range, checked_range
from spkfast.reference import Precision, TdnnParams

_Packed = TypeVar("_Packed")
# What the kernels of a device read, and what they multiply.
_TYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_PRODUCTS = {"cpu": ("fp32", "bf16", "int8"), "cuda": ("fp32", "bf16", "fp16")}
# Whose kernels train.
_TRAINS = {"cpu": "native", "cuda": "triton"}
_PLAIN = (Tensor, nn.Parameter)
# What a module computes by beside its tensors.
_NUMBERS = ("dilation", "eps", "first_passes", "groups", "padding", "padding_mode", "reflect", "stride")
# Of the modules of torch that the kernels replace, and of a ModuleList.
_FORWARDS = frozenset(
    (
        nn.Conv1d.forward,
        nn.Linear.forward,
        nn.BatchNorm1d.forward,
        nn.SyncBatchNorm.forward,
        SyncBatchNorm.forward,
        nn.ModuleList.forward,
    )
)
# Share of the values of a batch that a range holds.
COVERAGE = 0.99999
NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm, SyncBatchNorm)
_OF_TYPE: Mapping[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def autocast_type(device: str) -> torch.dtype | None:
    """What autocast computes in on devices of a type; None where it is off, or torch has none, as on meta tensors."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class Kept(Generic[_Packed]):
    """What was made of tensors, until one of them changes. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Any, ...], _Packed, list[Tensor]] | None = None
        self._forgotten = 0

    def of(self, tensors: list[Tensor], options: Any, make: Callable[[], _Packed]) -> _Packed:
        """What ``make`` gives; called again where the tensors are others, or changed, or the options did."""
        made_of = options, _watch.states_of(tensors)
        # Read and written as one, since another thread may ask for other options at the same time.
        last = self._last
        if last is None or last[0] != made_of:
            forgotten = self._forgotten
            # The tensors and their memory stay, so that nothing new can lie in the same places.
            last = made_of, make(), [*tensors, *(tensor.detach() for tensor in tensors)]
            if forgotten == self._forgotten:  # else another thread saw a change meanwhile
                self._last = last
        return last[1]

    def forget(self) -> None:
        """Has it made again. The object stays: that there is another one tells of ``train`` and ``eval``."""
        self._forgotten += 1
        self._last = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept[_Packed]:
        return Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()


class KernelModule(nn.Module):
    """A module whose kernels of inference run in place of the modules inside it, where nothing speaks against them.

    Attributes:
        op: Whose kernels these are.
    """

    op = "tdnn_layer"

    @property
    def kept(self) -> Kept[Any]:
        """The packed weights."""
        return cast("Kept[Any]", self.__dict__.setdefault("_kept", Kept()))

    def train(self, mode: bool = True) -> KernelModule:
        """As of any module; frees packed weights."""
        self.__dict__.pop("_kept", None)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> KernelModule:
        replica = cast(KernelModule, super()._replicate_for_data_parallel())
        # What was kept belongs to the tensors of another device, and to another thread.
        for name in ("_inside", "_kept"):
            replica.__dict__.pop(name, None)
        return replica

    def misfit(self) -> str | None:
        """What the modules inside, of classes that are known, compute otherwise than the kernels of inference."""
        return None

    def products_at(self, x: Tensor) -> Precision:
        """Precision of the products of its kernels for an input."""
        return _OF_TYPE.get(autocast_type(x.device.type) or x.dtype, "fp32")

    def runs_at(self, precision: Precision, device: torch.device) -> bool:
        """Whether kernels exist here that multiply at a precision."""
        return precision in _PRODUCTS[device.type] and backends.resolve(device, "auto", self.op) != "reference"

    def tensors_inside(self) -> list[Tensor]:
        """All parameters and buffers, of a module of which it is known that its kernels apply."""
        inside = self._known_inside(evaluating=True)
        assert inside is not None
        return inside.tensors

    def weights_for_kernels(self, x: Tensor, *others: Tensor) -> list[Tensor] | None:
        """All parameters and buffers where the kernels of inference apply to these inputs, else None."""
        if (
            self.training
            or torch.compiler.is_compiling()
            or x.ndim != 3
            or not _can_run_kernels(x, *others)
            or not self.runs_at(self.products_at(x), x.device)
        ):
            return None
        inside = self._known_inside(evaluating=True)
        if inside is None:
            return None
        tensors = inside.tensors
        if tensors and tensors[0].device != x.device:
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others, *tensors)):
            return None
        return tensors

    def _known_inside(self, *, evaluating: bool) -> _Inside | None:
        """What lies inside, where the kernels can stand for all of it."""
        inside = self.__dict__.get("_inside")
        if inside is None or inside.changed():
            # A number of a module, which is no tensor, may be what changed.
            self.kept.forget()
            inside = self.__dict__["_inside"] = _Inside(self)
        if inside.unknown is not None or (evaluating and inside.misfit is not None) or inside.is_watched(evaluating):
            return None
        return inside


class InferenceLayer(KernelModule):
    """A layer that has an inference form beside the plain one.

    In evaluation mode, where no gradient is wanted, its kernels run in place of the modules inside it: on weights that
    they pack at the first call and again after any of them changed. A change that torch does not count, as of
    ``weight.data`` in place, is seen once :meth:`train` or :meth:`eval` is called. The modules themselves run where one
    of them has a hook, a parametrization or a forward of its own, and while torch.compile or torch.export look.

    Attributes:
        precision: What the products of the inference form multiply; see :func:`set_precision`.
        input_ranges: Smallest and largest input of each product, for ``int8``; see :func:`calibrate`.
    """

    precision: Precision = "fp32"
    input_ranges: Mapping[str, Range] = MappingProxyType({})

    def obstacle(self) -> str | None:
        """Why its kernels never run, whatever the inputs, the device and the mode; None where they do."""
        inside = _Inside(self)
        return inside.unknown or inside.misfit

    def products_at(self, x: Tensor) -> Precision:
        """Precision of the products: that which was set, or that of the weights or of autocast where it is half."""
        if self.precision != "fp32":
            return self.precision
        return super().products_at(x)

    def kernels_for_training(self, x: Tensor, *others: Tensor) -> Kernels | None:
        """The kernels that train on these inputs, all rows of which have all frames; else None.

        Training is what wants a gradient, or the statistics of a batch.
        """
        device = x.device.type
        autocast = autocast_type(device)
        precision = "fp32" if autocast is None else _OF_TYPE.get(autocast)
        backend = _TRAINS.get(device)
        if (
            backend is None
            or torch.jit.is_tracing()
            or torch.compiler.is_exporting()
            or precision not in _PRODUCTS[device]
            or x.ndim != 3
            or x.numel() < 2 * x.shape[1]  # of one value a channel there is no variance, and torch says so
            or not (autocast is not None or x.dtype == torch.float32)
            or not _can_run_kernels(x, *others, of_one_type=autocast is None)
            or backends.resolve(x.device, "auto", "tdnn_layer") != backend
        ):
            return None
        if not self.training and not (
            torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others, *self.parameters()))
        ):
            return None
        compiles = torch.compiler.is_compiling()
        known = self._known_to_compiler() if compiles else self._known_inside(evaluating=False) is not None
        if not known or any(value.dtype != torch.float32 or value.device != x.device for value in self.parameters()):
            return None
        return Kernels(precision, backend)

    def _known_to_compiler(self) -> bool:
        """The same, in words that torch.compile can follow."""
        return all(
            part is self
            or (
                _is_known(type(part))
                and "forward" not in part.__dict__
                and not any(getattr(part, hooks) for hooks in _watch.HOOKS)
            )
            for part in self.modules()
        )


def _can_run_kernels(x: Tensor, *others: Tensor, of_one_type: bool = True) -> bool:
    """Whether inputs are such that kernels read them, and nothing but autograd watches what is computed."""
    types = _TYPES.get(x.device.type, ())
    if torch.compiler.is_compiling():
        return all(part.dtype in types for part in (x, *others))
    return not (
        type(x) is not Tensor
        or any(type(other) is not Tensor or (of_one_type and other.dtype != x.dtype) for other in others)
        or any(part.dtype not in types for part in (x, *others))
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or backends.is_transformed()
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


class _Inside:
    """What lies inside a layer, remembered: to walk through its modules takes as long as a small product.

    Attributes:
        tensors: All parameters and buffers.
        unknown: What the kernels cannot see, of the tensors or of what the modules compute; None where they see all.
        misfit: See :meth:`KernelModule.misfit`.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        reasons: list[str] = []
        self._entries: list[tuple[dict[str, Any], str, Any]] = []
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._modules: list[dict[str, Any]] = []
        waiting = [layer]
        while waiting:
            module = waiting.pop()
            of_module = module.__dict__
            if module is not layer:
                self._modules.append(of_module)
                self._classes.append((module, type(module)))
                if not _is_known(type(module)):
                    reasons.append(f"a {type(module).__name__} of another class than torch's")
                if isinstance(module, KernelModule):
                    self._entries += [(of_module, name, of_module.get(name)) for name in ("precision", "input_ranges")]
                    self._entries.append((of_module, "_kept", module.kept))  # which train and eval drop
            self._entries += [(of_module, name, of_module[name]) for name in _NUMBERS if name in of_module]
            for kind in ("_parameters", "_buffers", "_modules"):
                self._entries += [(of_module[kind], name, value) for name, value in of_module[kind].items()]
            self._sizes.append((of_module["_modules"], len(of_module["_modules"])))
            self.tensors += [value for kind in ("_parameters", "_buffers") for value in of_module[kind].values()]
            waiting += [child for child in reversed(of_module["_modules"].values()) if child is not None]
        self.tensors = [tensor for tensor in self.tensors if tensor is not None]
        for tensor in self.tensors:
            if type(tensor) not in _PLAIN:
                reasons.append(f"a {type(tensor).__name__} in place of a tensor")
            elif tensor.dtype == torch.float64:
                reasons.append("float64 weights")
            elif tensor.is_inference():  # of which changes are not counted
                reasons.append("weights made in inference mode")
        self.unknown = reasons[0] if reasons else None
        self.misfit = layer.misfit() if self.unknown is None and isinstance(layer, KernelModule) else None

    def changed(self) -> bool:
        """Whether a module was added, or a module, its class, a tensor or a number replaced."""
        return _watch.is_changed(self._entries, self._sizes, self._classes)

    def is_watched(self, evaluating: bool) -> bool:
        """Whether a hook wants to see a module inside, or one has a forward of its own or, where all should be in
        evaluation mode, is in training mode."""
        return _watch.is_watched(self._modules, evaluating)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    return None


def _is_known(kind: type[nn.Module]) -> bool:
    forward = kind.forward
    if issubclass(kind, nn.Conv1d) and kind._conv_forward is not nn.Conv1d._conv_forward:
        return False
    return forward in _FORWARDS or forward.__module__.startswith("spkfast.")


def _count_fused_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Counts the change of parameters by a fused step, which torch does not; packed weights would be kept."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(_count_fused_step)


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode of a module; afterwards each part has its own again. What is in it already keeps its packing."""
    trained = _watch.in_training(module)
    if trained:
        module.eval()
    try:
        yield
    finally:
        for part in trained:
            part.training = True


def inference_params(layer: nn.Module, bn: nn.Module | None = None) -> TdnnParams:
    """A convolution or linear layer and the batch norm after it in inference form."""
    weight = cast(Tensor, layer.weight)
    weight = weight[..., None] if weight.ndim == 2 else weight
    bias = cast("Tensor | None", layer.bias)
    if bn is None:
        return TdnnParams(weight, bias)
    return TdnnParams(weight, bias, *affine_of(bn))


def affine_of(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation mode, float64."""
    assert isinstance(bn, NORMS) and bn.running_var is not None and bn.running_mean is not None
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight
    shift = -bn.running_mean * scale
    if bn.bias is not None:
        shift = shift + bn.bias
    return scale, shift


def has_inference_form(bn: nn.Module | None) -> bool:
    """Whether a batch norm is an affine map in evaluation mode."""
    return bn is None or (isinstance(bn, NORMS) and bn.running_var is not None)


def set_precision(module: nn.Module, precision: Precision) -> nn.Module:
    """Sets what the products of inference multiply, in all layers of a module that have an inference form.

    Training stays in the type of the weights, and so does every call that the modules themselves answer (see
    :class:`InferenceLayer`); sums, squeeze-and-excitation, statistics and embedding layer are float32.

    Args:
        module: A network with float32 weights.
        precision: ``fp32``, ``bf16``, ``fp16`` (on a GPU) or ``int8`` (on a CPU, after :func:`calibrate`).

    Returns:
        The module.

    Raises:
        InputError: If the precision is unknown, the module has no such layer or weights of another type, or ``int8``
            lacks calibration.
    """
    check_name("precision", precision, list(PRECISIONS))
    layers = _some_inference_layers(module)
    for name, (layer, *_) in layers.items():
        types = {tensor.dtype for tensor in layer.parameters()} - {torch.float32}
        if precision != "fp32" and types:
            raise InputError(f"precision {precision!r} needs float32 weights, {name or 'the module'} has {types.pop()}")
        missing = [key for key in quantised_inputs(layer) if key not in layer.input_ranges]
        if precision == "int8" and missing:
            raise InputError(
                f"precision 'int8' needs calibration: {name or 'the module'} has no range of {missing[0]!r}; "
                "'spkfast calibrate' finds the ranges, spkfast.nn.calibrate those of a network in memory"
            )
    for layer in itertools.chain(*layers.values()):
        layer.precision = precision
    return module


def quantised_inputs(layer: InferenceLayer) -> dict[str, nn.Module]:
    """The modules of a layer whose inputs are quantised, by the name of their range."""
    return getattr(layer, "quantised", dict)()


def calibrate(module: nn.Module, batches: Iterable[Any], *, coverage: float = COVERAGE) -> dict[str, dict[str, Range]]:
    """Finds the ranges of the inputs of all products, for ``int8``.

    Args:
        module: A network; it is run in evaluation mode at full precision.
        batches: What the network is called with: tensors, or tuples of arguments. Some hundred utterances will do.
        coverage: Share of the values of a batch that its range holds, above 0 and at most 1; the widest range of all
            batches is taken. Padding counts as values do: batches of one length have none.

    Returns:
        The ranges by layer and product; see :func:`set_input_ranges`.

    Raises:
        InputError: If there is no batch, an input of a product is empty or not finite or never comes, ``coverage`` is
            out of range, or the module has no layer with an inference form.
    """
    if not 0 < coverage <= 1:
        raise InputError(f"coverage must be above 0 and at most 1, got {coverage}")
    layers = _some_inference_layers(module)
    precisions = [(layer, layer.precision) for layer in itertools.chain(*layers.values())]
    seen: dict[str, dict[str, Range]] = {name: {} for name in layers}

    def watcher(name: str, key: str) -> Callable[..., None]:
        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["x"]
            values = torch.cat([part.flatten() for part in ([x] if isinstance(x, Tensor) else x)]).float()
            if not values.numel():
                raise InputError(f"the range of {key!r} of {name or 'the module'} needs values, got an empty input")
            if not values.isfinite().all():
                raise InputError(
                    f"the range of {key!r} of {name or 'the module'} must be finite, got an input with NaN or infinity"
                )
            low, high = range_of(values, coverage)
            before = seen[name].get(key, (low, high))
            seen[name][key] = min(low, before[0]), max(high, before[1])

        return watch

    handles = [
        inner.register_forward_pre_hook(watcher(name, key), with_kwargs=True)
        for name, alike in layers.items()
        for layer in alike
        for key, inner in quantised_inputs(layer).items()
    ]
    count = 0
    try:
        set_precision(module, "fp32")
        with evaluation_mode(module), torch.no_grad():
            for batch in batches:
                module(*batch) if isinstance(batch, tuple | list) else module(batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
        for layer, precision in precisions:
            layer.precision = precision
    if not count:
        raise InputError("calibration needs at least one batch")
    for name, (layer, *_) in layers.items():
        unseen = [key for key in quantised_inputs(layer) if key not in seen[name]]
        if unseen:
            raise InputError(f"no batch reached {unseen[0]!r} of {name or 'the module'}, which needs a range")
    set_input_ranges(module, seen)
    return input_ranges(module)


def range_of(values: Tensor, coverage: float = COVERAGE) -> Range:
    """The range that holds a share of the values."""
    outside = int(values.numel() * (1 - coverage) / 2)
    if not outside:
        return float(values.min()), float(values.max())
    lowest = values.topk(outside + 1, largest=False, sorted=True).values[-1]
    return float(lowest), float(values.topk(outside + 1, sorted=True).values[-1])


def input_ranges(module: nn.Module) -> dict[str, dict[str, Range]]:
    """The ranges that :func:`calibrate` found, by layer and product; empty without calibration."""
    return {name: dict(layer.input_ranges) for name, layer in inference_layers(module).items() if layer.input_ranges}


def set_input_ranges(module: nn.Module, ranges: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Gives a module ranges that :func:`input_ranges` gave of another one with the same weights.

    Raises:
        InputError: If a layer or product is unknown, or a range is not two finite numbers, the smaller one first.
    """
    layers = _some_inference_layers(module)
    checked: dict[str, dict[str, Range]] = {}
    for name, of_layer in ranges.items():
        if name not in layers:
            raise InputError(f"the ranges name {name!r}, which is no layer with an inference form")
        if not isinstance(of_layer, Mapping):
            raise InputError(f"the ranges of {name} must be a mapping, got {of_layer!r}")
        known = quantised_inputs(layers[name][0])
        checked[name] = {}
        for key, value in of_layer.items():
            if key not in known:
                raise InputError(f"the ranges of {name} name {key!r}, which it does not have")
            checked[name][key] = _checked_range(f"the range of {key!r} of {name}", value)
    for name, of_checked in checked.items():
        for layer in layers[name]:
            layer.input_ranges = of_checked


def _checked_range(name: str, value: Sequence[float]) -> Range:
    try:
        low, high = (float(bound) for bound in value)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be two numbers, got {value!r}") from None
    return checked_range(name, (low, high))


def inference_layers(module: nn.Module) -> dict[str, InferenceLayer]:
    """Layers with an inference form; not those inside another one, whose kernels they are a part of.

    Those of layers that :func:`spkfast.accelerate` swapped count as being in their place.
    """
    return {name: alike[0] for name, alike in _layers("", module).items()}


def _layers(name: str, module: nn.Module) -> dict[str, list[InferenceLayer]]:
    """The layers, each with the one that computes the same where a whole network that was swapped cannot run."""
    # A layer of another toolkit that spkfast.accelerate swapped computes by one that is no child of it.
    swapped = getattr(module, "_spkfast_inference_form", None)
    form = swapped() if callable(swapped) else None
    layer = module if form is None else form
    if isinstance(layer, InferenceLayer):
        return {name: [layer]}
    found = _layers_of_children(name, layer)
    if form is not None:
        inside = itertools.chain(*_layers_of_children(name, module).values())
        by_parameters = {id(_first_parameters(other)): other for other in inside}
        for alike in found.values():
            alike += filter(None, [by_parameters.get(id(_first_parameters(alike[0])))])
    return found


def _layers_of_children(name: str, module: nn.Module) -> dict[str, list[InferenceLayer]]:
    found: dict[str, list[InferenceLayer]] = {}
    for child_name, child in module.named_children():
        found |= _layers(f"{name}.{child_name}" if name else child_name, child)
    return found


def _first_parameters(layer: nn.Module) -> dict[str, Any]:
    """Where a layer holds its first parameters, which are those of one layer of torch."""
    return next(part._parameters for part in layer.modules() if part._parameters)


def _some_inference_layers(module: nn.Module) -> dict[str, list[InferenceLayer]]:
    found = _layers("", module)
    if not found:
        raise InputError(f"{type(module).__name__} has no layer with an inference form")
    return found
