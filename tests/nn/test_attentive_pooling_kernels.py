"""Attentive pooling in evaluation mode runs on one kernel of the CPU: equal to its modules in every form and layout."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from spkfast import backends
from spkfast.nn import pooling, poolings, set_precision
from spkfast.ops import _attentive_pooling

pytestmark = pytest.mark.skipif(
    backends.resolve(torch.device("cpu"), "auto", "tdnn_layer") == "reference", reason="the extension is not built"
)

# Names of poolings whose class is AttentiveStatsPool with weights of each channel's own.
NAMES = ["astp", "speechbrain", "taoruijie", "chn_attn_stat"]
LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")
LAYOUTS = {
    "frames side by side": lambda x: x,
    "channels side by side": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other frame": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "part of more channels": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "one utterance again and again": lambda x: x[:1].expand_as(x),
    "one channel again and again": lambda x: x[:, :1].expand_as(x),
}


def _pooling(name: str, channels: int, bottleneck: int, **options: bool) -> pooling.AttentiveStatsPool:
    torch.manual_seed(0)
    layer = poolings.create(name, channels, bottleneck=bottleneck, **options).eval()
    for bn in (inner for inner in layer.modules() if isinstance(inner, torch.nn.BatchNorm1d)):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    assert isinstance(layer, pooling.AttentiveStatsPool)
    return layer


def _exact(layer: torch.nn.Module, x: Tensor, lengths: Tensor | None) -> Tensor:
    return copy.deepcopy(layer).double()(x.double(), lengths)


def _relative(found: Tensor, expected: Tensor) -> float:
    expected = expected.detach()
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of the kernel, which a test that never reaches it would not notice."""
    seen: list[int] = []
    kernel = _attentive_pooling.attentive_moments

    def counted(*args: object, **options: object) -> object:
        seen.append(1)
        return kernel(*args, **options)

    monkeypatch.setattr(pooling, "attentive_moments", counted)
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_modules(name: str, layout: str, calls: list[int]) -> None:
    layer = _pooling(name, 70, 6)
    x = LAYOUTS[layout](torch.randn(4, 70, 61) + 1)
    lengths = torch.tensor([61, 13, 1, 0])
    with torch.no_grad():
        found = layer(x, lengths)
    assert calls
    assert _relative(found, _exact(layer, x, lengths)) < 2e-6


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("channels", [1, 16, 65, 200, 600])
def test_levels_and_sizes(channels: int, level: str, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)
    layer = _pooling("astp", channels, 5)
    for frames in (1, 7, 100):
        x = torch.randn(2, channels, frames)
        try:
            with torch.no_grad():
                found = layer(x)
        except ValueError as error:
            assert "is above this CPU" in str(error)
            pytest.skip(str(error))
        assert _relative(found, _exact(layer, x, None)) < 2e-6
    assert calls


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_products(name: str, calls: list[int]) -> None:
    layer = set_precision(_pooling(name, 64, 8), "bf16")
    x, lengths = torch.randn(3, 64, 90), torch.tensor([90, 40, 2])
    with torch.no_grad():
        found = layer(x, lengths)
    assert calls and found.dtype == torch.float32
    # Frames are rounded to 8 bits, and an attention of them to that.
    assert _relative(found, _exact(layer, x, lengths)) < 2 * 2**-8


def test_an_odd_number_of_bfloat16_channels_takes_other_kernels(calls: list[int]) -> None:
    layer = set_precision(_pooling("astp", 7, 3), "bf16")
    x = torch.randn(2, 7, 30)
    with torch.no_grad():
        found = layer(x)
    assert not calls
    assert _relative(found, _exact(layer, x, None)) < 2 * 2**-8


def test_one_channel_of_frames_apart(calls: list[int]) -> None:
    layer, x = _pooling("astp", 1, 3), torch.randn(2, 1, 100)[..., ::2]
    with torch.no_grad():
        found = layer(x)
    assert calls
    assert _relative(found, _exact(layer, x, None)) < 2e-6


def test_a_row_does_not_depend_on_its_batch(calls: list[int]) -> None:
    layer = _pooling("astp", 96, 16)
    x, lengths = torch.randn(9, 96, 300), torch.randint(1, 301, (9,))
    poisoned = x.masked_fill(torch.arange(300) >= lengths[:, None, None], torch.nan)
    with torch.no_grad():
        together = layer(poisoned, lengths)
        alone = torch.cat([layer(x[i : i + 1, :, : lengths[i]]) for i in range(9)])
    assert len(calls) == 10
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_without_context(calls: list[int]) -> None:
    layer = _pooling("astp", 40, 8, global_context=False)
    x = torch.randn(3, 40, 50)
    with torch.no_grad():
        found = layer(x)
    assert calls
    assert _relative(found, _exact(layer, x, None)) < 2e-6
