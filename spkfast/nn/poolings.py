"""Poolings by name."""

from __future__ import annotations

import builtins
import functools
import inspect
from collections.abc import Callable
from typing import Any

from spkfast.errors import InputError, check_name, check_options
from spkfast.nn.pooling import (
    ASTP,
    AttentionForm,
    AttentiveStatsPool,
    Deviation,
    FrameAttentivePool,
    MaxPool,
    MultiHeadAttentiveStatsPool,
    MultiQueryAttentiveStatsPool,
    Pooling,
    StatsPool,
    XiPool,
)

__all__ = ["create", "list", "options"]

_ASTP_3DSPEAKER = AttentionForm(Deviation(low=1e-10), Deviation(unbiased=True, add=1e-10), tanh=True)
_SPEECHBRAIN = AttentionForm(Deviation(low=1e-12), Deviation(low=1e-12), relu=True, bn=True, tanh=True)
_TAORUIJIE = AttentionForm(Deviation(low=1e-4), Deviation(unbiased=True, low=1e-4), relu=True, bn=True, tanh=True)
_ESPNET = AttentionForm(Deviation(low=1e-4, high=1e4), Deviation(low=None), relu=True, bn=True)
_RAWNET3 = AttentionForm(
    Deviation(low=1e-4, high=1e4), Deviation(unbiased=True, low=1e-4, high=1e4), relu=True, bn=True
)
_RESNETSE34V2 = AttentionForm(Deviation(low=1e-5), relu=True, bn=True)


def _tap(channels: int) -> StatsPool:
    return StatsPool(channels)


def _tstp(channels: int, *, eps: float = 1e-7) -> StatsPool:
    return StatsPool(channels, Deviation(unbiased=True, add=eps))


def _tsdp(channels: int, *, eps: float = 1e-7) -> StatsPool:
    return StatsPool(channels, Deviation(unbiased=True, add=eps), with_mean=False)


def _stats(channels: int) -> StatsPool:
    return StatsPool(channels, Deviation(low=None))


def _speechbrain_stats(channels: int) -> StatsPool:
    return StatsPool(channels, Deviation(unbiased=True, offset=1e-5))


def _sap(channels: int) -> FrameAttentivePool:
    return FrameAttentivePool(channels)


def _asp(channels: int) -> FrameAttentivePool:
    return FrameAttentivePool(channels, Deviation(low=1e-5))


def _asp_channel(channels: int, *, bottleneck: int = 128, with_std: bool = True) -> AttentiveStatsPool:
    return AttentiveStatsPool(channels, bottleneck, global_context=False, form=_RESNETSE34V2, with_std=with_std)


_POOLINGS: dict[str, Callable[..., Pooling]] = {
    "asp": _asp,
    "asp_channel": _asp_channel,
    "astp": functools.partial(AttentiveStatsPool, form=ASTP),
    "astp_3dspeaker": functools.partial(AttentiveStatsPool, form=_ASTP_3DSPEAKER),
    "chn_attn_stat": functools.partial(AttentiveStatsPool, form=_ESPNET),
    "max": MaxPool,
    "mean": _tap,
    "mhastp": MultiHeadAttentiveStatsPool,
    "mqmhastp": MultiQueryAttentiveStatsPool,
    "rawnet3": functools.partial(AttentiveStatsPool, form=_RAWNET3),
    "sap": _sap,
    "speechbrain": functools.partial(AttentiveStatsPool, form=_SPEECHBRAIN),
    "speechbrain_stats": _speechbrain_stats,
    "stats": _stats,
    "taoruijie": functools.partial(AttentiveStatsPool, bottleneck=256, form=_TAORUIJIE),
    "tap": _tap,
    "tsdp": _tsdp,
    "tstp": _tstp,
    "xi": XiPool,
}


def list() -> builtins.list[str]:
    """Names that :func:`create` knows."""
    return sorted(_POOLINGS)


def options(name: str) -> builtins.list[str]:
    """Keywords that :func:`create` takes for a pooling.

    Raises:
        InputError: If the name is unknown.
    """
    check_name("pooling", name, list())
    return [key for key in inspect.signature(_POOLINGS[name]).parameters if key not in ("channels", "form")]


def create(name: str, channels: int, **config: Any) -> Pooling:
    """A pooling with fresh weights; it announces the size of its result as ``output_size``.

    The plain ones: ``tap`` (also ``mean``) gives the mean, ``max`` the largest value, ``tsdp`` the standard deviation.
    Mean and standard deviation: ``tstp`` (wespeaker; ``eps`` 1e-8 for 3D-Speaker's, 0 for its StatsPool), ``stats``
    (ESPnet), ``speechbrain_stats`` (speechbrain's x-vector, without the noise that it adds to the mean).

    Attentive, a weight per frame: ``sap`` and, with a standard deviation, ``asp`` (voxceleb_trainer). A weight per
    frame and channel, all of :class:`AttentiveStatsPool`: ``astp`` (wespeaker), ``astp_3dspeaker``, ``speechbrain``,
    ``taoruijie``, ``chn_attn_stat`` (ESPnet), ``rawnet3``, ``asp_channel`` (ResNetSE34V2 of voxceleb_trainer, ASP of
    wespeaker). In groups of channels: ``mhastp`` and ``mqmhastp`` (wespeaker). With a prior: ``xi`` (wespeaker).

    Args:
        name: One of :func:`list`.
        channels: Channels C of a frame; C * F for maps (B, C, F, T).
        **config: Keywords of the pooling, see :func:`options`.

    Raises:
        InputError: If the name or a keyword is unknown.
    """
    known = options(name)
    check_options("pooling", name, config, known)
    for key in ("bottleneck", "heads", "layers", "queries"):
        if key in config and (not isinstance(config[key], int) or config[key] < 1):
            raise InputError(f"{key} of pooling {name} must be a positive integer, got {config[key]!r}")
    eps = config.get("eps", 0)
    if not isinstance(eps, int | float) or not eps >= 0:
        raise InputError(f"eps of pooling {name} must be a number of at least 0, got {eps!r}")
    return _POOLINGS[name](channels, **config)
