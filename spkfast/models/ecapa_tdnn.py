"""ECAPA-TDNN in the dialects of wespeaker, speechbrain (= 3D-Speaker), TaoRuijie and ESPnet."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn

from spkfast.errors import InputError, nearest
from spkfast.models.base import SpeakerModel
from spkfast.nn import poolings, projectors
from spkfast.nn.se_res2net import Identity, PaddingMode, SERes2NetBlock, TdnnLayer, real_frames


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What differs between the toolkits' ECAPA-TDNN.

    Attributes:
        pooling: Name in :func:`spkfast.nn.poolings.create`.
        attention_channels: Bottleneck of the attention; for another pooling than the dialect's, that pooling's own.
        identity: Which group the Res2 convolutions pass.
        padding_mode: What convolutions read beyond the ends.
        sum_inputs: A block takes the sum of all that came before it, not the previous output alone.
        se_bn: Batch norm inside the squeeze-and-excitation.
        se_lengths: The toolkit's own squeeze-and-excitation knows lengths, which its convolutions never do.
        mfa_bn: Batch norm after the aggregation layer.
        mfa_channels: Channels of the aggregation layer; None for those of all blocks together.
        emb_bn: Batch norm on the embedding.
    """

    pooling: str
    attention_channels: int = 128
    identity: Identity = "last"
    padding_mode: PaddingMode = "zeros"
    sum_inputs: bool = False
    se_bn: bool = False
    se_lengths: bool = False
    mfa_bn: bool = False
    mfa_channels: int | None = 1536
    emb_bn: bool = False


_SPEECHBRAIN = Dialect(
    "speechbrain", identity="first", padding_mode="reflect", se_lengths=True, mfa_bn=True, mfa_channels=None
)
DIALECTS: Mapping[str, Dialect] = {
    "wespeaker": Dialect("astp"),
    "speechbrain": _SPEECHBRAIN,
    "3dspeaker": _SPEECHBRAIN,
    "taoruijie": Dialect("taoruijie", attention_channels=256, sum_inputs=True, emb_bn=True),
    "espnet": Dialect("chn_attn_stat", sum_inputs=True, se_bn=True),
}

# Names of weights before the network was made of parts, still used for those of a block.
_FORMER_NAMES = (
    (r"(stem|mfa)\.", r"encoder.\1."),
    (r"(blk\d+)\.in\.", r"encoder.\1.in_."),
    (r"(blk\d+)\.", r"encoder.\1."),
    (r"asp\.", "pooling."),
    (r"post\.bn\.", "projector.bn."),
    (r"emb\.fc\.", "projector.fc."),
    (r"emb\.bn\.", "projector.bn2."),
)


def current_name(name: str) -> str:
    """The name of a weight today, of one that may be from before the network was made of parts."""
    for former, current in _FORMER_NAMES:
        if re.match(former, name):
            return re.sub(f"^{former}", current, name)
    return name


class EcapaEncoder(nn.Module):
    """Frame-level part of ECAPA-TDNN: stem, SE-Res2Net blocks, aggregation of their outputs.

    Args:
        feature_dim: Values per frame M.
        channels: Channels of the stem and of each block.
        mfa_channels: Channels C of the output.
        kernel_sizes: Taps of the stem, of each block and of the aggregation layer.
        dilations: Their dilations in frames.
        groups: Channel groups of the stem, of the 1x1 layers of each block and of the aggregation layer.
        scale: Channel groups of the Res2 convolutions.
        se_channels: Bottleneck of the squeeze-and-excitation.
        dialect: The rest.
        exact: Pad each row at its own end, not at that of the batch.
    """

    def __init__(
        self,
        feature_dim: int,
        channels: Sequence[int],
        mfa_channels: int,
        kernel_sizes: Sequence[int],
        dilations: Sequence[int],
        groups: Sequence[int],
        scale: int,
        se_channels: int,
        dialect: Dialect,
        exact: bool,
    ) -> None:
        super().__init__()
        self.feature_dim, self.output_size = feature_dim, mfa_channels
        self.exact, self.se_lengths = exact, exact or dialect.se_lengths
        self.num_blocks = len(channels) - 1
        self.sum_inputs = dialect.sum_inputs
        mode = dialect.padding_mode
        self.stem = TdnnLayer(feature_dim, channels[0], kernel_sizes[0], dilations[0], groups[0], mode)
        for i in range(1, self.num_blocks + 1):
            block = SERes2NetBlock(
                channels[i],
                kernel_sizes[i],
                dilations[i],
                scale,
                se_channels,
                in_channels=channels[i - 1],
                groups=groups[i],
                identity=dialect.identity,
                padding_mode=mode,
                se_bn=dialect.se_bn,
            )
            self.add_module(f"blk{i}", block)
        self.mfa = TdnnLayer(
            sum(channels[1:]), mfa_channels, kernel_sizes[-1], dilations[-1], groups[-1], mode, dialect.mfa_bn
        )

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Features (B, T, M) to frames (B, C, T) and their lengths."""
        x = features.transpose(1, 2)
        frames = real_frames(lengths, x.shape[-1], x.dtype)
        padding, excited = frames if self.exact else None, frames if self.se_lengths else None
        if padding is not None:
            x = x.masked_fill(padding.mask == 0, 0)  # a product would keep NaN
        blocks = [functools.partial(block, frames=excited, padding=padding) for block in self._blocks()]
        return self.mfa(self._outputs_of(blocks, self.stem(x, padding)), padding), lengths

    def bound(self) -> Callable[[Tensor], Tensor]:
        """Features to frames on the kernels, which apply, of rows all of whose frames are real."""
        blocks = self._blocks()
        stem = self.stem.bound([self.feature_dim])
        calls = [block.bound(block.in_.conv.in_channels) for block in blocks]
        mfa = self.mfa.bound([block.out.conv.out_channels for block in blocks])
        return lambda features: mfa(self._outputs_of(calls, stem([features.transpose(1, 2)])))

    def _blocks(self) -> list[SERes2NetBlock]:
        return [cast(SERes2NetBlock, self.get_submodule(f"blk{i}")) for i in range(1, self.num_blocks + 1)]

    def _outputs_of(self, blocks: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
        """The outputs of all blocks."""
        outputs: list[Tensor] = []
        for block in blocks:
            if self.sum_inputs and outputs:
                x = x + outputs[-1]
            elif outputs:
                x = outputs[-1]
            outputs.append(block(x))
        return outputs


class EcapaTdnn(SpeakerModel):
    """ECAPA-TDNN: a stem, SE-Res2Net blocks, aggregation, attentive statistics pooling, a linear projection.

    What is None follows from the dialect.

    Args:
        feature_dim: Values per frame M.
        channels: Channels of stem and blocks, multiples of ``scale``; or a list, of the stem, of each block and, where
            ``mfa_channels`` is None, of the aggregation layer.
        embedding_dim: Size E of the embedding.
        mfa_channels: Channels of the aggregation layer.
        dialect: Toolkit whose details are followed: ``wespeaker``, ``speechbrain`` (= ``3dspeaker``), ``taoruijie`` or
            ``espnet``. See :data:`DIALECTS`.
        scale: Channel groups of the Res2 convolutions.
        kernel_sizes: Taps of the stem and of each block, odd. Where ``channels`` is a list, which says how many blocks
            there are, a last one may follow, of the aggregation layer.
        dilations: Dilations in frames, as ``kernel_sizes``.
        groups: Channel groups of the stem, of the 1x1 layers of each block and of the aggregation layer, as
            ``kernel_sizes``, or one number for all.
        attention_channels: Bottleneck of the attention; for another pooling than the dialect's, that pooling's own.
        se_channels: Bottleneck of the squeeze-and-excitation.
        global_context: Give the attention the utterance's mean and standard deviation (``GLOB`` models of wespeaker).
        pooling: Name of a pooling of :mod:`spkfast.nn.poolings`, or a mapping with ``name`` and its options.
        emb_bn: Batch norm on the embedding.
        padding: ``exact``: convolutions pad each row of a batch at its own end, so that its embedding does not depend
            on the batch. ``batch``: at the end of the batch, and lengths count where the toolkit itself has them; for
            comparisons with it.

    Reference: Desplanques et al., "ECAPA-TDNN: Emphasized Channel Attention, Propagation and Aggregation in TDNN Based
    Speaker Verification", Interspeech 2020.
    """

    def __init__(
        self,
        feature_dim: int = 80,
        channels: int | Sequence[int] = 512,
        embedding_dim: int = 192,
        mfa_channels: int | None = None,
        dialect: str = "wespeaker",
        scale: int = 8,
        kernel_sizes: Sequence[int] = (5, 3, 3, 3),
        dilations: Sequence[int] = (1, 2, 3, 4),
        groups: int | Sequence[int] = 1,
        attention_channels: int | None = None,
        se_channels: int = 128,
        global_context: bool = True,
        pooling: str | Mapping[str, Any] | None = None,
        emb_bn: bool | None = None,
        padding: Literal["exact", "batch"] = "exact",
    ) -> None:
        if dialect not in DIALECTS:
            names = ", ".join(DIALECTS)
            raise InputError(f"dialect must be one of {names}, got {dialect!r}{nearest(str(dialect), list(DIALECTS))}")
        if padding not in ("exact", "batch"):
            raise InputError(f"padding must be 'exact' or 'batch', got {padding!r}")
        details = DIALECTS[dialect]
        one_width = isinstance(channels, int | str)  # a string is refused as a number, not as a list of letters
        widths = [_positive("channels", channels)] if one_width else _positives("channels", channels)
        if not one_width and mfa_channels is None and len(widths) > 1:
            *widths, mfa_channels = widths
        num_blocks = len(_positives("kernel_sizes", kernel_sizes) if one_width else widths) - 1
        channels = widths[0] if one_width else widths
        widths = widths * (num_blocks + 1) if one_width else widths
        if mfa_channels is None:
            mfa_channels = sum(widths[1:]) if details.mfa_channels is None else details.mfa_channels
        if emb_bn is None:
            emb_bn = details.emb_bn
        layers = {
            "kernel_sizes": _of_each_layer("kernel_sizes", kernel_sizes, num_blocks),
            "dilations": _of_each_layer("dilations", dilations, num_blocks),
            "groups": [_positive("groups", groups)] * (num_blocks + 2)
            if isinstance(groups, int)
            else _of_each_layer("groups", groups, num_blocks),
        }
        if any(size % 2 == 0 for size in layers["kernel_sizes"]):
            raise InputError(f"kernel_sizes must be odd, got {list(kernel_sizes)}")
        for name, value in {
            "feature_dim": feature_dim, "embedding_dim": embedding_dim, "scale": scale, "mfa_channels": mfa_channels,
            "se_channels": se_channels,
            "attention_channels": 1 if attention_channels is None else attention_channels,
        }.items():  # fmt: skip
            _positive(name, value)
        pooling = dict(pooling) if isinstance(pooling, Mapping) else {"name": pooling or details.pooling}
        if not isinstance(pooling.get("name"), str):
            raise InputError(f"pooling must be a name, or a mapping with one under 'name', got {pooling}")
        if attention_channels is None and pooling["name"] == details.pooling:
            attention_channels = details.attention_channels
        sizes = {"bottleneck": attention_channels, "global_context": global_context}
        known = poolings.options(pooling["name"])
        # What is None is left to the pooling.
        options = {key: value for key, value in sizes.items() if key in known and value is not None}
        options |= {key: value for key, value in pooling.items() if key != "name"}
        encoder = EcapaEncoder(
            feature_dim,
            widths,
            mfa_channels,
            layers["kernel_sizes"],
            layers["dilations"],
            layers["groups"],
            scale,
            se_channels,
            details,
            padding == "exact",
        )
        pool = poolings.create(pooling["name"], encoder.output_size, **options)
        projector = projectors.create(
            "ska_tdnn" if emb_bn else "rawnet3", pool.output_size, embedding_dim=embedding_dim
        )
        config = {
            "feature_dim": feature_dim, "channels": channels, "embedding_dim": embedding_dim,
            "mfa_channels": mfa_channels, "dialect": dialect, "scale": scale, "kernel_sizes": list(kernel_sizes),
            "dilations": list(dilations), "groups": groups if isinstance(groups, int) else list(groups),
            "attention_channels": attention_channels, "se_channels": se_channels, "global_context": global_context,
            "pooling": pooling, "emb_bn": emb_bn, "padding": padding,
        }  # fmt: skip
        super().__init__(encoder, pool, projector, name="ecapa_tdnn", config=config)
        self.register_load_state_dict_pre_hook(_rename)


def _rename(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        current = prefix + current_name(key.removeprefix(prefix))
        if current != key:
            state_dict[current] = state_dict.pop(key)


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a positive integer, got {value!r}")
    return value


def _positives(name: str, values: Any) -> list[int]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise InputError(f"{name} must be a list of positive integers, got {values!r}")
    return [_positive(f"{name}[{i}]", value) for i, value in enumerate(values)]


def _of_each_layer(name: str, values: Any, num_blocks: int) -> list[int]:
    """Values of the stem, of each block and of the aggregation layer."""
    values = _positives(name, values)
    if num_blocks < 1 or len(values) not in (num_blocks + 1, num_blocks + 2):
        raise InputError(
            f"{name} must name the stem and each of the {num_blocks} blocks alike, and may name the aggregation layer, "
            f"got {values}"
        )
    return values if len(values) == num_blocks + 2 else [*values, 1]
