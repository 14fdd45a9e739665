"""Recognition of layers by the types and sizes of the torch layers that they are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

from torch import nn

from spkfast.acceleration.comparison import compared
from spkfast.acceleration.layer import DROPOUTS, TITLES, Plan, Unknown, accelerated_class, look
from spkfast.acceleration.network import networks
from spkfast.nn import poolings
from spkfast.nn.inference import NORMS

# Leaves without weights. What they compute is not asked: the arithmetic of the whole layer is compared.
_PLAIN = (nn.AdaptiveAvgPool1d, nn.Identity, nn.ReLU, nn.Sigmoid, nn.Softmax, nn.Tanh)
# What a swapped layer has of its own.
_PICKLING = ("__reduce_ex__", "__reduce__", "__getstate__")


def recognise(module: nn.Module) -> Plan:
    """What takes the place of a module.

    Raises:
        Unknown: If nothing can.
    """
    try:
        return _recognised(module)
    except Unknown:
        raise
    except Exception as error:  # whatever the code of others raises
        raise Unknown(f"looking at it fails: {type(error).__name__}: {error}", similar=True) from error


def _recognised(module: nn.Module) -> Plan:
    plans = [Plan("network", options, leaves) for options, leaves in networks(module)]
    if not plans:
        parts = _parts(module)
        plans = [*_block_plans(parts), *_pool_plans(parts), *_layer_plans(parts)]
    if not plans:
        raise Unknown("its layers are not arranged as in a known one")
    title = TITLES[plans[0].kind]
    if plans[0].kind == "pool" and type(module).forward is nn.Sequential.forward:
        raise Unknown(
            "it gives attention weights alone, and the pooling by them is in the code around it", similar=True
        )
    if _pickled_otherwise(module):
        raise Unknown(f"it is built like {title}, but has a way of its own to be pickled", similar=True)
    if "forward" in module.__dict__:
        raise Unknown(f"it is built like {title}, but its forward was replaced", similar=True)
    try:
        fitted = compared(module, plans)
    except Unknown:
        raise
    except Exception as error:
        raise Unknown(f"it is built like {title}, but running it fails: {error}", similar=True) from error
    if fitted is None:
        raise Unknown(f"it is built like {title}, but computes something else", similar=True)
    accelerated_class(type(module))
    return fitted


def _pickled_otherwise(module: nn.Module) -> bool:
    return any(getattr(type(module), name) is not getattr(nn.Module, name) for name in _PICKLING)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The torch layers of a module that have weights, with their names, in order."""

    products: list[tuple[str, nn.Conv1d | nn.Linear]]
    norms: list[tuple[str, nn.Module]]


def _parts(module: nn.Module) -> _Parts:
    if not any(True for _ in module.children()):
        raise Unknown("it is a single layer, and part of none that is known")
    products: list[tuple[str, nn.Conv1d | nn.Linear]] = []
    norms: list[tuple[str, nn.Module]] = []
    for name, part in module.named_modules():
        if any(True for _ in part.children()):
            if part._parameters or part._buffers:
                raise Unknown(f"{type(part).__name__} has weights of its own beside its layers")
        elif isinstance(part, nn.Conv1d | nn.Linear) and look(part):
            products.append((name, part))
        elif isinstance(part, NORMS) and look(part):
            norms.append((name, part))
        elif type(part) not in (*_PLAIN, *DROPOUTS):
            raise Unknown(f"{name} ({type(part).__name__}) is part of no known layer")
        if part is not module and "forward" in part.__dict__:
            raise Unknown(f"{name} ({type(part).__name__}) has a forward of its own")
    return _Parts(products, norms)


def _sizes(product: nn.Conv1d | nn.Linear) -> tuple[int, int, int]:
    """Inputs, outputs and taps."""
    if isinstance(product, nn.Linear):
        return product.in_features, product.out_features, 1
    return product.in_channels, product.out_channels, product.kernel_size[0]


def _one_tap(product: nn.Conv1d | nn.Linear, inputs: int, outputs: int, groups: int = 1) -> bool:
    if isinstance(product, nn.Conv1d) and (product.groups != groups or product.padding not in ((0,), "same", "valid")):
        return False
    return _sizes(product) == (inputs, outputs, 1)


def _padding_mode(conv: nn.Conv1d) -> str | None:
    """What a convolution must read beyond the ends for the number of frames to stay; None where it cannot."""
    (taps,), (dilation,) = conv.kernel_size, conv.dilation
    reach = (taps - 1) // 2 * dilation
    if taps % 2 == 0:
        return None
    if conv.padding in ((reach,), "same"):
        return "zeros"
    return "reflect" if conv.padding in ((0,), "valid") else None


def _widths(norms: list[tuple[str, nn.Module]]) -> list[int]:
    return [cast(nn.BatchNorm1d, norm).num_features for _, norm in norms]


def _layer_plans(parts: _Parts) -> Iterator[Plan]:
    if len(parts.products) != 1 or len(parts.norms) != 1:
        return
    ((conv_name, conv),), ((norm_name, _),) = parts.products, parts.norms
    if not isinstance(conv, nn.Conv1d) or _widths(parts.norms) != [conv.out_channels]:
        return
    mode = _padding_mode(conv)
    if mode is not None:
        inputs, outputs, taps = _sizes(conv)
        options = {"in_channels": inputs, "out_channels": outputs, "kernel_size": taps, "dilation": conv.dilation[0],
                   "groups": conv.groups, "padding_mode": mode}  # fmt: skip
        yield Plan("layer", options, {"conv": conv_name, "bn": norm_name})


def _block_plans(parts: _Parts) -> Iterator[Plan]:
    names, products = [name for name, _ in parts.products], [product for _, product in parts.products]
    if len(products) < 5:
        return
    inputs, channels, _ = _sizes(products[0])
    num_res = len(products) - (4 if inputs == channels else 5)
    if num_res < 1 or channels % (num_res + 1):
        return
    width = channels // (num_res + 1)
    into, res, (out, fc1, fc2), shortcut = (
        products[0],
        products[1 : num_res + 1],
        products[num_res + 1 :][:3],
        products[num_res + 4 :],
    )
    first = res[0]
    bottleneck = _sizes(fc1)[1]
    if not (isinstance(into, nn.Conv1d) and isinstance(out, nn.Conv1d) and isinstance(first, nn.Conv1d)):
        return
    mode = _padding_mode(first)
    taken = mode is not None and all(_like(conv, first) and _sizes(conv)[:2] == (width, width) for conv in res)
    taken = taken and first.groups == 1 and into.groups == out.groups
    taken = taken and _one_tap(into, inputs, channels, into.groups) and _one_tap(out, channels, channels, out.groups)
    taken = taken and _one_tap(fc1, channels, bottleneck) and _one_tap(fc2, bottleneck, channels)
    taken = taken and all(isinstance(conv, nn.Conv1d) and _one_tap(conv, inputs, channels) for conv in shortcut)
    widths = [channels, *[width] * num_res, channels]
    se_bn = _widths(parts.norms) == [*widths, bottleneck]
    if not taken or not (se_bn or _widths(parts.norms) == widths):
        return
    ours = ["in_.conv", *(f"res.{j}.conv" for j in range(num_res)), "out.conv", "se.fc1", "se.fc2", "shortcut"]
    ours_norms = ["in_.bn", *(f"res.{j}.bn" for j in range(num_res)), "out.bn", "se.bn"]
    leaves = dict(zip(ours, names, strict=False))
    leaves |= dict(zip(ours_norms, (name for name, _ in parts.norms), strict=False))
    for identity in ("first", "last") if mode == "reflect" else ("last", "first"):
        options = {"channels": channels, "kernel_size": first.kernel_size[0], "dilation": first.dilation[0],
                   "scale": num_res + 1, "se_channels": bottleneck, "in_channels": inputs, "groups": into.groups,
                   "identity": identity, "padding_mode": mode, "se_bn": se_bn}  # fmt: skip
        yield Plan("block", options, leaves)


def convolution(module: nn.Module) -> Plan | None:
    """What takes the place of a convolution of torch alone; None where nothing does."""
    try:
        sizes = look(module)
        if sizes is None or not isinstance(module, nn.Conv1d) or module.groups != 1 or _padding_mode(module) != "zeros":
            return None
        if _pickled_otherwise(module):
            return None
        accelerated_class(type(module))
    except Exception:  # whatever the code of others raises; why a single layer stays was said before
        return None
    return Plan("conv", {"dilation": module.dilation[0]}, {})


def _like(conv: nn.Conv1d | nn.Linear, other: nn.Conv1d) -> bool:
    same = ("kernel_size", "dilation", "padding", "groups")
    return isinstance(conv, nn.Conv1d) and all(getattr(conv, name) == getattr(other, name) for name in same)


def _pool_plans(parts: _Parts) -> Iterator[Plan]:
    if len(parts.products) != 2 or len(parts.norms) > 1:
        return
    (fc1_name, fc1), (fc2_name, fc2) = parts.products
    (inputs, bottleneck, _), (_, channels, _) = _sizes(fc1), _sizes(fc2)
    if not (isinstance(fc1, nn.Conv1d) and isinstance(fc2, nn.Conv1d)) or inputs not in (channels, 3 * channels):
        return
    if not (_one_tap(fc1, inputs, bottleneck) and _one_tap(fc2, bottleneck, channels)):
        return
    leaves = {"fc1": fc1_name, "fc2": fc2_name}
    names = ["astp", "astp_3dspeaker"]
    if parts.norms:
        if _widths(parts.norms) != [bottleneck]:
            return
        leaves["bn"] = parts.norms[0][0]
        names = ["speechbrain", "taoruijie", "chn_attn_stat", "rawnet3", "asp_channel"]
    for name in names:
        options = {"name": name, "channels": channels, "bottleneck": bottleneck}
        if "global_context" in poolings.options(name):
            options["global_context"] = inputs != channels
        elif inputs != channels:
            continue
        yield Plan("pool", options, leaves)
