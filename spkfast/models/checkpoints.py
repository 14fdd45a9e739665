"""ECAPA-TDNN weights of other toolkits: family from the keys, sizes from the shapes, every key accounted for."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spkfast.errors import InputError, nearest
from spkfast.models.base import SpeakerModel
from spkfast.models.ecapa_tdnn import EcapaTdnn


class Imported(NamedTuple):
    """A network with the weights of another toolkit, and what became of each of their keys.

    Attributes:
        model: The network, in evaluation mode, float32, on the CPU.
        family: Toolkit: one of :data:`FAMILIES`.
        found_by: Why that family, in words.
        config: Keywords that make the network again.
        assumed: Those of them that neither the weights nor the caller told; of ``groups``, that of the first layer.
        renamed: Their key and ours, for every tensor of the network.
        dropped: Key and reason, for everything else. A key of the checkpoint is in one of the two lists, once.
        head: Class matrix (N, E) of the loss it was trained with, where the checkpoint has one.
    """

    model: SpeakerModel
    family: str
    found_by: str
    config: dict[str, Any]
    assumed: list[str]
    renamed: list[tuple[str, str]]
    dropped: list[tuple[str, str]]
    head: Tensor | None


@dataclasses.dataclass(frozen=True)
class _Family:
    """How a toolkit names the parts of its ECAPA-TDNN.

    Attributes:
        sign: A key that its networks have.
        not_with: Keys whose presence speaks against it.
        mark: A part of many of its keys, by which it is found where the sign is missing.
        parts: Its names of single modules, and ours.
        block: Its prefix of a block, ``{i}`` the number.
        first_block: Number of its first block; ours is 1.
        block_parts: Its names of modules in a block, ``{j}`` a Res2 convolution, and ours.
        poolings: Its names of modules in poolings of which a network has one, and ours.
        merged: Modules of its poolings that are one of ours, ``{h}`` the number by which they follow each other.
    """

    sign: str
    mark: str
    parts: Mapping[str, str]
    block: str
    block_parts: Mapping[str, str]
    first_block: int = 1
    not_with: tuple[str, ...] = ()
    poolings: tuple[Mapping[str, str], ...] = ()
    merged: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def rules(self) -> dict[str, str]:
        """Every module name of theirs, and ours."""
        blocks = {self.block + theirs: f"encoder.blk{{i}}.{ours}" for theirs, ours in self.block_parts.items()}
        poolings = {theirs: ours for names in self.poolings for theirs, ours in names.items()}
        return {**self.parts, **blocks, **poolings, **self.merged}


_RES2NET = {"conv1": "in_.conv", "bn1": "in_.bn", "convs.{j}": "res.{j}.conv", "bns.{j}": "res.{j}.bn",
            "conv3": "out.conv", "bn3": "out.bn", "se.se.1": "se.fc1"}  # fmt: skip
_SPEECHBRAIN = _Family(
    sign="blocks.1.tdnn1.conv.conv.weight",
    mark="res2net_block.",
    parts={
        "blocks.0.conv.conv": "encoder.stem.conv", "blocks.0.norm.norm": "encoder.stem.bn",
        "mfa.conv.conv": "encoder.mfa.conv", "mfa.norm.norm": "encoder.mfa.bn",
        "asp.tdnn.conv.conv": "pooling.fc1", "asp.tdnn.norm.norm": "pooling.bn", "asp.conv.conv": "pooling.fc2",
        "asp_bn.norm": "projector.bn", "fc.conv": "projector.fc",
    },
    block="blocks.{i}.",
    block_parts={
        "tdnn1.conv.conv": "in_.conv", "tdnn1.norm.norm": "in_.bn",
        "res2net_block.blocks.{j}.conv.conv": "res.{j}.conv", "res2net_block.blocks.{j}.norm.norm": "res.{j}.bn",
        "tdnn2.conv.conv": "out.conv", "tdnn2.norm.norm": "out.bn",
        "se_block.conv1.conv": "se.fc1", "se_block.conv2.conv": "se.fc2", "shortcut.conv": "shortcut",
    },
)  # fmt: skip
_TABLE: Mapping[str, _Family] = {
    "wespeaker": _Family(
        sign="layer2.se_res2block.0.conv.weight",
        mark="se_res2block.",
        parts={
            "layer1.conv": "encoder.stem.conv", "layer1.bn": "encoder.stem.bn", "conv": "encoder.mfa.conv",
            "bn": "projector.bn", "linear": "projector.fc", "bn2": "projector.bn2",
        },
        poolings=(
            {"pool.linear1": "pooling.fc1", "pool.linear2": "pooling.fc2"},
            {"pool.attention.0": "pooling.fc1", "pool.attention.2": "pooling.bn", "pool.attention.3": "pooling.fc2"},
            {"pool": "pooling", "pool.lin1_relu_bn.0": "pooling.fc1", "pool.lin1_relu_bn.2": "pooling.bn",
             "pool.lin2": "pooling.fc2"},
        ),
        merged={
            "pool.heads_att_trans.{h}.att_{j}": "pooling.att.{j}",
            "pool.n_query.{i}.heads_att_trans.{h}.att_{j}": "pooling.queries.{i}.att.{j}",
        },
        block="layer{i}.se_res2block.",
        block_parts={
            "0.conv": "in_.conv", "0.bn": "in_.bn", "1.convs.{j}": "res.{j}.conv", "1.bns.{j}": "res.{j}.bn",
            "2.conv": "out.conv", "2.bn": "out.bn", "3.linear1": "se.fc1", "3.linear2": "se.fc2",
        },
        first_block=2,
    ),
    "speechbrain": _SPEECHBRAIN,
    "3dspeaker": _SPEECHBRAIN,
    "taoruijie": _Family(
        sign="layer1.se.se.1.weight",
        mark=".se.se.",
        not_with=("layer1.se.se.4.weight", "layer1.se.se.3.running_mean"),
        parts={
            "conv1": "encoder.stem.conv", "bn1": "encoder.stem.bn", "layer4": "encoder.mfa.conv",
            "attention.0": "pooling.fc1", "attention.2": "pooling.bn", "attention.4": "pooling.fc2",
            "bn5": "projector.bn", "fc6": "projector.fc", "bn6": "projector.bn2",
        },
        block="layer{i}.",
        block_parts={**_RES2NET, "se.se.3": "se.fc2"},
    ),
    "espnet": _Family(
        sign="encoder.layer1.se.se.4.weight",
        mark=".se.se.",
        parts={
            "encoder.conv": "encoder.stem.conv", "encoder.bn": "encoder.stem.bn",
            "encoder.layer4": "encoder.mfa.conv", "pooling.attention.0": "pooling.fc1",
            "pooling.attention.2": "pooling.bn", "pooling.attention.3": "pooling.fc2",
            "projector.bn": "projector.bn", "projector.fc": "projector.fc", "projector.bn2": "projector.bn2",
        },
        block="encoder.layer{i}.",
        block_parts={**_RES2NET, "se.se.3": "se.bn", "se.se.4": "se.fc2"},
    ),
}  # fmt: skip
FAMILIES = tuple(_TABLE)
"""Toolkits whose ECAPA-TDNN is known."""

_MOST_PREFIXES = 4  # parts of a key that may stand before the network's own name
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# speechbrain and 3D-Speaker keep the head in a file of its own, which has no prefix unless someone joined the two.
_HEADS = ("projection.weight", "projection.linear.weight", "speaker_loss.weight", "loss.weight", "loss.0.weight",
          "classifier.weight")  # fmt: skip
_NOT_OF_THE_NETWORK = {
    r"(projection|speaker_loss|loss|classifier)\..+": "part of the training head",
    r"torchfbank\..+|frontend\.(flipped_filter|transform\..+)": "constant of the front-end, whose settings tell it",
}
# Keys of networks that would else be taken for a damaged ECAPA-TDNN, or for nothing at all.
_OTHERS = {
    "spkfast itself, for load_state_dict of a network from models.create": r"(.*\.)?encoder\.stem\.conv\.weight",
    "SKA-TDNN": r".*\.skconvs\..*",
    "RawNet3": r"(.*\.)?layer1\.afms\..*",
    "CAM++": r"(.*\.)?xvector\.block1\..*",
    "ReDimNet": r".*(inputs_weights|fin_wght1d).*",
    "TitaNet (NeMo)": r".*\.mconv\..*",
    "ResNet": r"(.*\.)?layer1\.0\.conv1\.weight",
}


def import_state_dict(state_dict: Mapping[str, Any], /, family: str | None = None, **config: Any) -> Imported:
    """The network of another toolkit's ECAPA-TDNN, from its weights under that toolkit's own names.

    Sizes follow from the shapes. Wrappers (``{"state_dict": ...}``), the ``module.`` of parallel training and a prefix
    that all keys of the network share are taken off. speechbrain and 3D-Speaker name everything alike and are the same
    network; without ``family`` such keys count as speechbrain's.

    Args:
        state_dict: Weights, of any floating type.
        family: One of :data:`FAMILIES`; None to tell from the keys.
        **config: Keywords of :class:`spkfast.models.EcapaTdnn` that keys and shapes cannot tell: ``dilations``, the
            ``groups`` of the stem, ``padding``, a pooling without parameters. Others are compared with the shapes.

    Raises:
        InputError: If the family is unknown or not that of the keys, a key is missing, left over or of a wrong shape,
            or a keyword is unknown or contradicts the shapes.
    """
    known = [name for name in inspect.signature(EcapaTdnn).parameters if name != "self"]
    for name in config:
        if name not in known:
            raise InputError(f"unknown option {name!r} of model ecapa_tdnn{nearest(name, known)}")
    tensors, dropped = _unwrap(state_dict)
    originals = _without_module(tensors)
    family, prefix, found_by = _family(list(originals), family)
    names = _Names(_TABLE[family], [key.removeprefix(prefix) for key in originals])
    parts: dict[str, dict[int, str]] = {}  # our key to their keys, by place
    left: list[str] = []
    head = None
    for key, original in originals.items():
        inner = key.removeprefix(prefix)
        ours = names.ours(inner) if key.startswith(prefix) else None
        reason = None if ours else _why_dropped(inner)
        if ours:
            place = parts.setdefault(ours[0], {})
            if ours[1] in place:
                raise InputError(f"keys {place[ours[1]]!r} and {original!r} both mean {ours[0]!r}")
            place[ours[1]] = original
        elif reason:
            dropped.append((original, reason))
            if inner in _HEADS:
                head = tensors[original]
        else:
            left.append(original)
    found = {ours: _joined([tensors[place[n]] for n in sorted(place)]) for ours, place in parts.items()}
    inferred = _Sizes(family, names, found, config).config()
    try:
        told = _merged(inferred, config)
        with torch.device("meta"):  # nothing is allocated before the weights are known to be there
            expected = EcapaTdnn(**told).state_dict()
    except InputError:
        raise
    except (TypeError, KeyError, ValueError) as error:  # keywords that no network takes
        raise InputError(f"{family} checkpoint: {error}") from error
    fitted = _fitted(found, expected, family, names, left)
    model = EcapaTdnn(**told)
    model.load_state_dict(fitted)
    if head is not None and not (head.ndim == 2 and head.shape[1] == model.embedding_dim):
        head = None  # of a head with layers of its own
    # The other toolkits' networks have one choice of both.
    free = ("dilations", "groups") if _TABLE[family] is _SPEECHBRAIN else ()
    assumed = [name for name in free if name not in config]
    if "pooling" not in config and not any(ours.startswith("pooling.") for ours in found):
        assumed.append("pooling")
    renamed = [(place[n], ours) for ours, place in parts.items() for n in sorted(place)]
    head = None if head is None else head.float()
    return Imported(model.eval(), family, found_by, model.config, assumed, renamed, dropped, head)


def family_of(state_dict: Mapping[str, Any]) -> str:
    """Toolkit whose keys these are; ``speechbrain`` where they may be 3D-Speaker's too.

    Raises:
        InputError: If they are those of no toolkit of :data:`FAMILIES`.
    """
    return _family(list(_without_module(_unwrap(state_dict)[0])), None)[0]


def check_family(family: str | None) -> None:
    """Raises an :class:`InputError` for a family that is neither None nor one of :data:`FAMILIES`."""
    if family is not None and family not in FAMILIES:
        close = nearest(str(family), list(FAMILIES))
        raise InputError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}{close}")


class _Names:
    """Translation between a toolkit's keys and ours.

    Args:
        family: The toolkit's names.
        keys: Its keys in a checkpoint: where several of its poolings share a name of ours, theirs is that of the one
            which is there.
    """

    def __init__(self, family: _Family, keys: Iterable[str] = ()) -> None:
        self._offset = family.first_block - 1
        rules = family.rules()
        modules = {key.rpartition(".")[0] for key in keys}
        pooling = max(family.poolings, key=lambda names: len(modules & names.keys()), default={})
        self._to_ours = [(_pattern(theirs), ours, theirs) for theirs, ours in rules.items()]
        self._to_theirs = [(_pattern(ours), theirs, ours) for theirs, ours in {**pooling, **rules}.items()]

    def ours(self, key: str) -> tuple[str, int] | None:
        """Our key, and the place of the tensor among those joined in it; None for an unknown one."""
        return _translate(key, self._to_ours, -self._offset)

    def theirs(self, key: str) -> str:
        """Their key, for messages; ours where they have none."""
        found = _translate(key, self._to_theirs, self._offset)
        return found[0] if found else key


def _pattern(module: str) -> re.Pattern[str]:
    """What matches a module name with numbers ``{i}``."""
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d{1,4})", re.escape(module)))


def _translate(key: str, rules: list[tuple[re.Pattern[str], str, str]], offset: int) -> tuple[str, int] | None:
    module, _, leaf = key.rpartition(".")
    for pattern, target, source in rules:
        match = pattern.fullmatch(module)
        if match is None:
            continue
        # The only modules with parameters of their own among containers are xi's priors.
        if source in ("pool", "pooling") and not leaf.startswith("prior_"):
            continue
        numbers = {name: int(digits) for name, digits in match.groupdict().items()}
        place = numbers.pop("h", 0)
        if "blk{i}" in target or "blk{i}" in source:
            numbers["i"] += offset
            if numbers["i"] < 1:
                continue
        return f"{target.format(**{'h': 0, **numbers})}.{leaf}", place
    return None


def _unwrap(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Tensors of the network's dictionary, and what lies beside them with the reason not to take it."""
    dropped: list[tuple[str, str]] = []
    for _ in range(4):  # an end, should a dictionary hold itself
        if not isinstance(state_dict, Mapping):
            raise InputError(f"a state dict must map names to tensors, got {type(state_dict).__name__}")
        inner = [name for name in _WRAPPERS if isinstance(state_dict.get(name), Mapping)]
        if len(inner) > 1:
            raise InputError(f"the checkpoint holds {' and '.join(map(repr, inner))}; pass the one you mean")
        if not inner:
            break
        dropped += [(str(key), "beside the network's weights") for key in state_dict if key != inner[0]]
        state_dict = state_dict[inner[0]]
    dropped += [(str(key), "not a tensor") for key, value in state_dict.items() if not isinstance(value, Tensor)]
    return {str(key): value for key, value in state_dict.items() if isinstance(value, Tensor)}, dropped


def _without_module(keys: Iterable[str]) -> dict[str, str]:
    """Keys without the ``module.`` that parallel training puts in, and the keys they were."""
    originals: dict[str, str] = {}
    for original in keys:
        key = re.sub(r"(^|\.)(module\.)+", r"\1", original)
        if key in originals:
            raise InputError(f"keys {originals[key]!r} and {original!r} differ by 'module.' alone")
        originals[key] = original
    return originals


def _family(keys: list[str], family: str | None) -> tuple[str, str, str]:
    """Family, prefix of the network's keys, and how it was found."""
    check_family(family)
    present = set(keys)
    found: dict[tuple[str, str], str] = {}
    for name, names in _TABLE.items():
        if name == "3dspeaker":  # told, never found
            continue
        for key in keys:
            prefix = key.removesuffix(names.sign)
            if (prefix and not prefix.endswith(".")) or prefix == key:
                continue
            if not any(prefix + other in present for other in names.not_with):
                found[name, prefix] = key
    if not keys:
        raise InputError("holds no tensors")
    other = next((what for what, form in _OTHERS.items() if any(re.fullmatch(form, key) for key in keys)), None)
    if other is None and not found and (near := _nearest_family(keys, family)) is not None:
        return near
    if other is not None or not found:
        seen = f"they look like those of {other}" if other else f"they begin {', '.join(map(repr, keys[:3]))}"
        raise InputError(f"the keys are not those of an ECAPA-TDNN of {', '.join(FAMILIES)}: {seen}")
    if len(found) > 1:
        shown = ", ".join(f"{name} below {prefix!r}" for name, prefix in found)
        raise InputError(f"the checkpoint holds several networks ({shown}); pass the state dict of the one you mean")
    ((name, prefix), sign) = next(iter(found.items()))
    if family is not None and _TABLE[family] is not _TABLE[name]:
        raise InputError(f"family={family!r} contradicts the keys: {sign!r} is {name}'s")
    return family or name, prefix, "told" if family else f"key {sign!r}"


def _nearest_family(keys: list[str], family: str | None) -> tuple[str, str, str] | None:
    """As :func:`_family` for keys without the sign, so that what is missing can be told; None for keys of no family."""
    if family is not None:
        candidates = [family]
    else:
        candidates = [name for name in _TABLE if name != "3dspeaker" and any(_TABLE[name].mark in key for key in keys)]
    counts: Counter[tuple[str, str]] = Counter()
    for name in candidates:
        names = _Names(_TABLE[name])
        for key in keys:
            parts = key.split(".", _MOST_PREFIXES)
            prefixes = ["".join(f"{part}." for part in parts[:n]) for n in range(len(parts))]
            counts.update((name, prefix) for prefix in prefixes if names.ours(key.removeprefix(prefix)))
    if not counts:
        return None
    ((name, prefix), count) = counts.most_common(1)[0]
    return name, prefix, "told" if family else f"{count} of {len(keys)} keys"


def _why_dropped(key: str) -> str | None:
    if key in _HEADS:
        return "class matrix of the training head"
    for form, reason in _NOT_OF_THE_NETWORK.items():
        if re.fullmatch(form, key):
            return reason
    if key.startswith("frontend."):
        raise InputError(f"the network has a learned front-end ({key!r}), which is not supported yet")
    return None


def _joined(tensors: list[Tensor]) -> Tensor:
    for value in tensors:
        if value.layout is not torch.strided or value.is_quantized:
            raise InputError(f"a tensor of shape {tuple(value.shape)} is sparse or quantized, which is not supported")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(f"a tensor of shape {tuple(value.shape)} claims more values than are stored for it")
    values = [value.detach().float() if value.is_floating_point() else value.detach() for value in tensors]
    if len({value.shape[1:] for value in values}) > 1:
        raise InputError(f"the heads of the pooling differ in shape: {[tuple(value.shape) for value in values]}")
    return values[0] if len(values) == 1 else torch.cat(values)


def _fitted(
    found: dict[str, Tensor], expected: dict[str, Tensor], family: str, names: _Names, left: list[str]
) -> dict[str, Tensor]:
    """The tensors in the shapes of the model: 1x1 convolutions and linear layers differ by a last 1.

    Raises:
        InputError: If a key is missing, left over or of another shape.
    """
    missing = [names.theirs(key) for key in expected if key not in found]
    left = [*left, *(names.theirs(key) for key in found if key not in expected)]
    fitted, wrong = {}, []
    for key, target in expected.items():
        value = found.get(key)
        if value is None:
            continue
        ones = [*value.shape, 1] if target.ndim > value.ndim else [*value.shape[: target.ndim]]
        if list(target.shape) != ones or value.numel() != target.numel():
            wrong.append(f"{names.theirs(key)} {tuple(value.shape)} for {tuple(target.shape)}")
        elif target.is_floating_point() and not value.is_floating_point():
            wrong.append(f"{names.theirs(key)} {value.dtype}")
        else:
            fitted[key] = value.reshape(target.shape)
    lists = {"missing": missing, "left over": left, "of another shape or type": wrong}
    if told := [f"{word}: {_listed(keys)}" for word, keys in lists.items() if keys]:
        raise InputError(f"{family} checkpoint does not fit its network; {'; '.join(told)}")
    return fitted


def _listed(keys: list[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


class _Sizes:
    """Keywords of the network, from the shapes of its tensors."""

    def __init__(self, family: str, names: _Names, tensors: dict[str, Tensor], given: Mapping[str, Any]) -> None:
        self._family, self._names, self._given = family, names, given
        self._shapes = {key: tuple(value.shape) for key, value in tensors.items()}

    def config(self) -> dict[str, Any]:
        """Every keyword that the shapes tell."""
        blocks = {int(match[1]) for key in self._shapes if (match := re.match(r"encoder\.blk(\d{1,4})\.", key))}
        num_blocks = max(blocks, default=1)
        stem, mfa = (self._of(f"encoder.{layer}.conv.weight", 3) for layer in ("stem", "mfa"))
        channels, kernels = [stem[0]], [stem[2]]
        groups = [self._stem_groups()]
        scale = 1
        for i in range(1, num_blocks + 1):
            block = f"encoder.blk{i}."
            out, into = self._of(f"{block}out.conv.weight", 3), self._of(f"{block}in_.conv.weight", 3)
            groups.append(self._groups(f"{block}in_.conv.weight", channels[-1], into))
            channels.append(out[0])
            if self._groups(f"{block}out.conv.weight", out[0], out) != groups[-1]:
                raise InputError(f"block {i}: its two 1x1 convolutions have different groups, {into} and {out}")
            res = self._shapes.get(f"{block}res.0.conv.weight", (out[0], out[0], 1))
            if len(res) != 3 or not res[0] or out[0] % res[0]:
                raise InputError(f"{self._names.theirs(f'{block}res.0.conv.weight')} has shape {res}, which divides no "
                                 f"{out[0]} channels")  # fmt: skip
            convs = sum(bool(re.fullmatch(rf"{re.escape(block)}res\.\d+\.conv\.weight", key)) for key in self._shapes)
            if convs != max(out[0] // res[0] - 1, min(convs, 1)):
                raise InputError(
                    f"block {i} has {convs} Res2 convolutions of {res[0]} channels, but {out[0]} channels in all"
                )
            if i == 1:
                scale = out[0] // res[0]
            kernels.append(res[2])
        groups.append(self._groups("encoder.mfa.conv.weight", sum(channels[1:]), mfa))
        same = len(set(channels)) == 1
        config: dict[str, Any] = {
            "feature_dim": stem[1] * groups[0],
            "channels": channels[0] if same else channels,
            "embedding_dim": self._of("projector.fc.weight")[0],
            "mfa_channels": mfa[0],
            "dialect": self._family,
            "scale": scale,
            "kernel_sizes": kernels if same and mfa[2] == 1 else [*kernels, mfa[2]],
            "groups": groups[0] if len(set(groups)) == 1 else groups,
            "se_channels": self._of("encoder.blk1.se.fc1.weight")[0],
            "emb_bn": "projector.bn2.weight" in self._shapes,
        }
        if same and mfa[2] != 1:
            config["channels"] = channels  # a list says how many blocks there are
        if num_blocks != 3 and "dilations" not in self._given:
            raise InputError(f"the network has {num_blocks} blocks, whose dilations are not in the checkpoint: pass "
                             f"dilations, a list of {num_blocks + 1} ('spkfast convert --option')")  # fmt: skip
        return config | self._pooling(mfa[0])

    def _of(self, key: str, ndim: int | None = None) -> tuple[int, ...]:
        shape = self._shapes.get(key)
        if shape is None:
            raise InputError(f"{self._family} checkpoint does not fit its network; missing: {self._names.theirs(key)}")
        if not shape or 0 in shape or (ndim is not None and len(shape) != ndim):
            raise InputError(f"{self._names.theirs(key)} has shape {shape}, which no such network has")
        return shape

    def _stem_groups(self) -> int:
        """Told by a keyword or 1: the values per frame are not known otherwise."""
        groups = self._given.get("groups", 1)
        first = groups[0] if isinstance(groups, list | tuple) and groups else groups
        if not isinstance(first, int) or first < 1:
            raise InputError(f"groups must be positive integers, got {groups!r}")
        return first

    def _groups(self, key: str, in_channels: int, shape: tuple[int, ...]) -> int:
        if in_channels % shape[1]:
            raise InputError(f"{self._names.theirs(key)} has shape {shape}, but takes {in_channels} channels")
        return in_channels // shape[1]

    def _pooling(self, channels: int) -> dict[str, Any]:
        """Name and options of the pooling, and the keywords of the network that are its sizes."""
        parts = {key.removeprefix("pooling.") for key in self._shapes if key.startswith("pooling.")}
        width = self._of("projector.bn.weight", 1)[0]
        if "fc1.weight" in parts:
            fc1 = self._of("pooling.fc1.weight", 3)
            config: dict[str, Any] = {"attention_channels": fc1[0]}
            if "prior_mean" in parts:
                return {**config, "pooling": {"name": "xi", "with_std": width == 2 * channels}}
            if fc1[1] not in (channels, 3 * channels):
                raise InputError(f"{self._names.theirs('pooling.fc1.weight')} has shape {fc1}, but takes {channels} or "
                                 f"{3 * channels} channels")  # fmt: skip
            name = {"wespeaker": "asp_channel" if "bn.weight" in parts else "astp", "taoruijie": "taoruijie",
                    "espnet": "chn_attn_stat"}.get(self._family, "speechbrain")  # fmt: skip
            return {**config, "global_context": fc1[1] == 3 * channels, "pooling": {"name": name}}
        for prefix, name in (("queries.0.", "mqmhastp"), ("", "mhastp")):
            if f"{prefix}att.0.weight" in parts:
                return {"pooling": {"name": name, **self._heads(f"pooling.{prefix}att", channels, name)}}
        both = {"wespeaker": "tstp", "espnet": "stats"}.get(self._family)
        if both is None:  # these toolkits have no choice of poolings, so the dialect's own is missing
            return {}
        # Poolings without parameters: the width tells mean from mean with deviation, no more.
        return {} if "pooling" in self._given else {"pooling": {"name": both if width == 2 * channels else "tap"}}

    def _heads(self, prefix: str, channels: int, name: str) -> dict[str, Any]:
        layers = sum(bool(re.fullmatch(re.escape(prefix) + r"\.\d+\.weight", key)) for key in self._shapes)
        first, last = self._of(f"{prefix}.0.weight", 3), self._of(f"{prefix}.{layers - 1}.weight", 3)
        heads = self._groups(f"{prefix}.0.weight", channels, first)
        options = {"heads": heads, "layers": layers, "per_channel": last[0] == channels}
        if layers > 1:
            options["bottleneck"] = first[0] // heads
        if name == "mqmhastp":
            queries = {key.split(".")[2] for key in self._shapes if key.startswith("pooling.queries.")}
            options["queries"] = len(queries)
        return options


def _merged(inferred: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Both together.

    Raises:
        InputError: If a given keyword contradicts the shapes.
    """
    merged = dict(inferred)
    for name, value in given.items():
        if name == "pooling" and name in inferred:
            told = dict(value) if isinstance(value, Mapping) else {"name": value}
            told.setdefault("name", inferred[name]["name"])
            if told["name"] == "mean":
                told["name"] = "tap"
            if any(told.get(key, own) != own for key, own in inferred[name].items()):
                raise InputError(f"pooling={value!r} contradicts the checkpoint, which gives {inferred[name]!r}")
            merged[name] = {**inferred[name], **told}
        elif name not in inferred or (name == "dialect" and {value, inferred[name]} == {"speechbrain", "3dspeaker"}):
            merged[name] = value
        elif _comparable(name, value, inferred) != _comparable(name, inferred[name], inferred):
            raise InputError(f"{name}={value!r} contradicts the checkpoint, whose shapes give {inferred[name]!r}")
    return merged


def _comparable(name: str, value: Any, inferred: dict[str, Any]) -> Any:
    """The value in one of its forms: a number for every layer and the list of them are the same thing."""
    if name not in ("channels", "kernel_sizes", "groups"):
        return value
    channels = inferred["channels"]
    num_layers = len(channels if isinstance(channels, list) else inferred["kernel_sizes"]) + 1
    last = inferred["mfa_channels"] if name == "channels" else 1
    if isinstance(value, int):
        return [value] * (num_layers - 1) + [last if name == "channels" else value]
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return values + [last] * (num_layers - len(values))
