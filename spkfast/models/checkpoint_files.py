"""Checkpoints of other toolkits on disk: read without running anything in them, with the settings that lie beside."""

from __future__ import annotations

import os
import re
import stat
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch

from spkfast import frontends
from spkfast.errors import InputError
from spkfast.frontends import FrontendSpec
from spkfast.models.checkpoints import Imported, check_family, family_of, import_state_dict

_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".model", ".safetensors")
_NETWORKS = ("avg_model.pt", "embedding_model.ckpt")
_HEAD = "classifier.ckpt"
# Files that lie beside a network, and why they are not needed.
_COMPANIONS = {
    "mean_var_norm_emb.ckpt": "mean of embeddings, which speechbrain subtracts on request only",
    "label_encoder.txt": "names of the training speakers",
    "label_encoder.ckpt": "names of the training speakers",
    "optimizer.ckpt": "state of the training",
}
_SETTINGS = ("hyperparams.yaml", "config.yaml")
_MOST_BYTES_OF_SETTINGS = 16 * 2**20
_MOST_KEYS = 10_000
_MOST = 2**31  # of a number among them; Python itself refuses to print very large ones
_SAFE_GLOBALS: list[Any] = [  # numpy numbers, as training loops put losses and epochs beside the weights
    np.dtype,
    *(type(np.dtype(name)) for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]


class ImportedFile(NamedTuple):
    """A network of another toolkit with the front-end it was trained on, and where each came from.

    Attributes:
        network: The network, and what became of every key.
        frontend: Its front-end.
        frontend_from: Where the front-end's settings come from, in words.
        file: File of the weights.
        settings: YAML file beside it that was used, if any.
        unused: Files beside it that were not needed, and why.
    """

    network: Imported
    frontend: FrontendSpec
    frontend_from: str
    file: Path
    settings: Path | None
    unused: list[tuple[str, str]]


class Settings(NamedTuple):
    """What a toolkit's YAML file tells of a network.

    Attributes:
        family: Its toolkit.
        config: Keywords of the network that its keys cannot tell.
        frontend: Fields in which the front-end differs from the toolkit's preset, or a text that says what in it is
            not supported.
    """

    family: str
    config: dict[str, Any]
    frontend: dict[str, Any] | str


def import_checkpoint(
    source: str | os.PathLike[str],
    /,
    *,
    family: str | None = None,
    frontend: FrontendSpec | str | None = None,
    **config: Any,
) -> ImportedFile:
    """The network and front-end of another toolkit's checkpoint.

    Args:
        source: File of weights, or a folder of wespeaker, speechbrain, 3D-Speaker or ESPnet. The YAML file of the
            toolkit is used where it lies beside the weights or, as those of wespeaker and 3D-Speaker do, above them.
        family: See :func:`spkfast.models.import_state_dict`. Needed for speechbrain and 3D-Speaker where no YAML file
            tells them apart: their networks are alike, their front-ends are not.
        frontend: Front-end to take in place of the toolkit's, or the name of a preset, which
            takes the number of its mel bands from the network.
        **config: See :func:`spkfast.models.import_state_dict`.

    Raises:
        InputError: If a file is missing, damaged or would run code when loaded, the network does not fit its weights,
            or the front-end cannot be told.
    """
    check_family(family)
    file, unused = _weights_file(_absolute(Path(source)))
    state = read_weights(file)
    path, settings = _settings(file, family)
    known = {} if settings is None else {key: value for key, value in settings.config.items() if key not in config}
    try:
        told = family
        if settings is not None and family is None and settings.family != (found := family_of(state)):
            if (found, settings.family) != ("speechbrain", "3dspeaker"):
                raise InputError(f"the keys are {found}'s, but {path} is {settings.family}'s")
            told = settings.family
        network = import_state_dict(state, told, **known, **config)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    if told != family:
        network = network._replace(found_by=str(path))
    spec, origin = _frontend(file, path, settings, network, family, frontend)
    if spec.output_size != network.config["feature_dim"]:
        raise InputError(
            f"{path or file}: the front-end ({origin}) gives {spec.output_size} values per frame, the network takes "
            f"{network.config['feature_dim']}"
        )
    head = file.with_name(_HEAD)
    if network.head is None and file.name == "embedding_model.ckpt" and head.is_file():
        weight = read_weights(head).get("weight")
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[1] == network.model.embedding_dim:
            network = network._replace(head=weight.float())
    return ImportedFile(network, spec, origin, file, path, unused)


def read_weights(path: Path) -> Mapping[str, Any]:
    """The dictionary in a file of torch.save or safetensors; nothing in the file is run.

    Raises:
        InputError: If there is no such file, it is no such dictionary, is damaged, or would run code when loaded.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if not path.stat().st_size:
        raise InputError(f"{path}: is empty (0 bytes)")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: damaged: {_line(error)}") from error
    with open(path, "rb") as handle:
        head = handle.read(512)
    if head[257:262] == b"ustar" or head[:2] == b"\x1f\x8b":
        raise InputError(f"{path}: a tar or gzip archive: unpack it and name the folder or the file of the weights")
    if head[:2] == b"PK":
        _check_archive(path)
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about pickles it is going to refuse
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers of three formats raise whatever a damaged file makes them meet
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path}: refused: loading it would run {found[1]!r}; only tensors and plain values are read"
            ) from None
        # Of the other errors, a bad pickle's end in advice to load it all the same, and most are a number or a name.
        detail = f" ({_line(error)[:120]})" if isinstance(error, RuntimeError | OSError) else ""
        raise InputError(f"{path}: not a checkpoint, or a damaged one{detail}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds {type(content).__name__}, not a dictionary of tensors")
    return content


def _check_archive(path: Path) -> None:
    """Refuses a zip file that torch.save would not have written.

    Raises:
        InputError: If a member lies outside the archive's folder, is a link, is encrypted or compressed, or comes
            twice; or the members claim more bytes than the file has.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: damaged: {_line(error)}") from error
    names: set[str] = set()
    for member in members:
        name = PurePosixPath(member.filename)
        wrong = None
        if name.is_absolute() or ".." in name.parts or "\\" in member.orig_filename or ":" in member.filename:
            wrong = "lies outside the archive"
        elif stat.S_ISLNK(member.external_attr >> 16):
            wrong = "is a link"
        elif member.flag_bits & 1:
            wrong = "is encrypted"
        elif member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            wrong = "is compressed"
        elif member.filename in names:
            wrong = "comes twice"
        if wrong:
            raise InputError(f"{path}: refused: member {member.filename!r} {wrong}, as torch.save never writes it")
        names.add(member.filename)
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise InputError(f"{path}: refused: its members claim more bytes than the file has")
    if not any(PurePosixPath(name).name == "data.pkl" for name in names):
        raise InputError(f"{path}: a zip archive without a checkpoint: unpack it and name the folder")


def _absolute(source: Path) -> Path:
    """The path with the names of all folders above it, which count in the search for settings.

    Links are followed in folders only, and only where ``..`` asks for it: a file in a cache of downloads is often a
    link to one without a suffix.
    """
    source = source.absolute()
    if ".." not in source.parts:
        return source
    return source.resolve() if source.is_dir() else source.parent.resolve() / source.name


def _weights_file(source: Path) -> tuple[Path, list[tuple[str, str]]]:
    """File of the network, and the files beside it that are not needed."""
    if not source.exists():
        raise InputError(f"{source}: no such model; name a file or folder that is there: nothing is downloaded")
    if not source.is_dir():
        return source, []
    found, unused = _weights_in(source)
    if not found and (source / "models").is_dir():  # an experiment of wespeaker or 3D-Speaker
        inner, unused = _weights_in(source / "models")
        if len(inner) == 1:
            return source / "models" / inner[0], unused
        epochs = [path for path in sorted((source / "models").iterdir()) if path.is_dir()]
        below = [Path("models", name) for name in inner]
        below += [Path("models", epoch.name, name) for epoch in epochs for name in _weights_in(epoch)[0]]
        if below:
            more = " or another" if len(below) > 1 else ""
            raise InputError(f"{source}: the weights lie below: name {source / below[-1]}{more}")
    if not found:
        raise InputError(
            f"{source}: not a model folder: holds no config.yaml with model.safetensors, and no other weights "
            f"({', '.join('*' + suffix for suffix in _SUFFIXES)})"
        )
    if len(found) > 1:
        raise InputError(f"{source}: holds several checkpoints ({', '.join(found[:6])}); name the file")
    return source / found[0], unused


def _weights_in(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of the weights in a folder, one where a toolkit's own name is among them; and the files not needed."""
    beside = sorted(path.name for path in folder.iterdir() if path.is_file())
    unused = [(name, _COMPANIONS[name]) for name in beside if name in _COMPANIONS]
    named = [name for name in _NETWORKS if name in beside]
    found = named or [name for name in beside if Path(name).suffix in _SUFFIXES and name not in _COMPANIONS]
    return found, unused


def _settings(file: Path, family: str | None) -> tuple[Path | None, Settings | None]:
    """The YAML file of the toolkit and what it tells."""
    folders = [file.parent]
    if file.parent.name == "models":  # wespeaker
        folders.append(file.parent.parent)
    elif file.parent.name.startswith("CKPT"):  # 3D-Speaker, speechbrain
        folders.append(file.parent.parent.parent)
    for folder in folders:
        for name in _SETTINGS:
            path = folder / name
            if path.is_file() and (found := read_settings(path)) is not None:
                if family not in (None, found.family):
                    raise InputError(f"{path}: is {found.family}'s, family={family!r} was asked for")
                return path, found
    return None, None


def _frontend(
    file: Path,
    path: Path | None,
    settings: Settings | None,
    network: Imported,
    family: str | None,
    given: FrontendSpec | str | None,
) -> tuple[FrontendSpec, str]:
    """The front-end, and where it comes from."""
    size = network.config["feature_dim"]
    if isinstance(given, str):
        spec = fitting_preset(given, size)
        return spec, f"preset {given}, as given{_fitted_bands(given, spec)}"
    if given is not None:
        frontends.require_spec(given)
        return given, "given"
    if settings is not None:
        if isinstance(settings.frontend, str):
            raise InputError(
                f"{path}: {settings.frontend}; pass a front-end ('spkfast convert --frontend PRESET') "
                "to import the network all the same"
            )
        try:
            return frontends.frontend(settings.family, **{"n_mels": size, **settings.frontend}), f"{path}"
        except InputError as error:
            raise InputError(f"{path}: front-end: {error}") from error
    if network.family == "speechbrain" and family is None:
        raise InputError(
            f"{file}: speechbrain and 3D-Speaker name their weights alike, but differ in the front-end, and no "
            f"{' or '.join(_SETTINGS)} of theirs is beside it: pass family 'speechbrain' or '3dspeaker', or a "
            "front-end ('spkfast convert --family F' or '--frontend PRESET')"
        )
    spec = fitting_preset(network.family, size)
    return spec, f"preset {network.family}{_fitted_bands(network.family, spec)}"


def fitting_preset(name: str, size: int) -> FrontendSpec:
    """The preset, with as many mel bands as values per frame where it gives another number of values.

    Raises:
        InputError: If there is no such preset.
    """
    spec = frontends.frontend(name)
    return spec if spec.output_size == size else frontends.frontend(name, n_mels=size)


def _fitted_bands(name: str, spec: FrontendSpec) -> str:
    """What :func:`fitting_preset` changed, in words."""
    usual = frontends.frontend(name).n_mels
    return "" if spec.n_mels == usual else f", n_mels {spec.n_mels} in place of the preset's {usual}"


def read_settings(path: Path) -> Settings | None:
    """What the YAML file of a toolkit tells; None where it is of none that is known.

    Tags (``!new:``, ``!ref``, ``!!python/...``) are read as text: no object is made.

    Raises:
        InputError: If the file is not YAML, or tells of a network that is not supported.
    """
    content = _read_yaml(path)
    if not isinstance(content, Mapping):
        return None
    try:
        for read in (_speechbrain, _3dspeaker, _wespeaker, _espnet):
            if (found := read(content)) is not None:
                return found
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return None


class _Tagged(NamedTuple):
    """A YAML value under a tag that means an object or a reference."""

    tag: str
    value: Any


def _read_yaml(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes every unknown tag for text."""

        def flatten_mapping(self, node: Any) -> None:
            super().flatten_mapping(node)
            if len(node.value) > _MOST_KEYS:  # mappings merged into each other double with every line
                raise yaml.YAMLError(f"a mapping of more than {_MOST_KEYS} keys")

    def tagged(loader: Any, suffix: str, node: Any) -> _Tagged:
        if isinstance(node, yaml.MappingNode):
            return _Tagged(suffix, loader.construct_mapping(node, deep=True))
        if isinstance(node, yaml.SequenceNode):
            return _Tagged(suffix, loader.construct_sequence(node, deep=True))
        return _Tagged(suffix, loader.construct_scalar(node))

    Loader.add_multi_constructor("", tagged)
    if path.stat().st_size > _MOST_BYTES_OF_SETTINGS:
        raise InputError(f"{path}: too large for a settings file")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except Exception as error:  # what YAML's own types meet in a bad value is not always an error of YAML
        raise InputError(f"{path}: damaged: {_line(error)}") from error


def _resolved(value: Any, content: Mapping[str, Any]) -> Any:
    """The value, or a list's values, with references to top-level keys followed.

    Not in lists within lists, which no setting is: lists that refer to each other have no end.
    """
    value = _followed(value, content)
    return [_followed(item, content) for item in value] if isinstance(value, list) else value


def _followed(value: Any, content: Mapping[str, Any]) -> Any:
    """What a reference to a top-level key (``!ref <key>``, ``<key>``) leads to; any other value itself."""
    for _ in range(8):  # an end, should references go round
        text = value.value if isinstance(value, _Tagged) and value.tag == "!ref" else value
        match = re.fullmatch(r"<(\w+)>", text) if isinstance(text, str) else None
        if match is None or match[1] not in content:
            break
        value = content[match[1]]
    return value


def _mapping(content: Any, key: str, root: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The mapping under a key, tagged or not, with references followed; empty where there is none."""
    value = content.get(key) if isinstance(content, Mapping) else None
    if isinstance(value, _Tagged):
        value = value.value
    return {str(k): _resolved(v, root or {}) for k, v in value.items()} if isinstance(value, Mapping) else {}


def _tag(content: Mapping[str, Any], key: str) -> str:
    value = content.get(key)
    return value.tag if isinstance(value, _Tagged) else ""


def _speechbrain(content: Mapping[str, Any]) -> Settings | None:
    if not _tag(content, "embedding_model").startswith("!new:speechbrain."):
        return None
    config = _network(_mapping(content, "embedding_model", content))
    fbank, norm = _mapping(content, "compute_features", content), _mapping(content, "mean_var_norm", content)
    kind = _tag(content, "compute_features")
    if not kind.endswith(".Fbank"):
        return Settings("speechbrain", config, f"compute_features is {kind or 'missing'!r}, only Fbank is supported")
    names = {"n_mels": "n_mels", "sample_rate": "sample_rate", "n_fft": "n_fft", "f_min": "f_min", "f_max": "f_max",
             "win_length": "frame_length_ms", "hop_length": "frame_shift_ms"}  # fmt: skip
    only = {"deltas": False, "context": False, "requires_grad": False, "filter_shape": "triangular"}
    only_norm, norm_defaults = {"norm_type": "sentence", "std_norm": False}, {"norm_type": "global", "std_norm": True}
    problem = (
        # The others are noise on the filters in training, and the width of a context that is not there.
        _unknown("compute_features", fbank,
                 (*names, *only, "param_change_factor", "param_rand_factor", "left_frames", "right_frames"))
        or _unsupported(fbank, only)
        # The others belong to norms over more than a sentence, to padding and to the deviation.
        or _unknown("mean_var_norm", norm, (*only_norm, "mean_norm", "avg_factor", "requires_grad",
                                            "update_until_epoch", "avoid_padding_norm", "epsilon", "device"))
        or _unsupported(norm, only_norm, norm_defaults)
    )  # fmt: skip
    fields = {ours: fbank[theirs] for theirs, ours in names.items() if fbank.get(theirs) is not None}
    if norm.get("mean_norm") is False:
        fields["mean_norm"] = False
    return Settings("speechbrain", config, problem or _plain(fields))


def _3dspeaker(content: Mapping[str, Any]) -> Settings | None:
    model = _mapping(content, "embedding_model")
    if not _text(model.get("obj")).startswith("speakerlab."):
        return None
    config = _network(_mapping(model, "args", content))
    extractor = _mapping(content, "feature_extractor")
    if not _text(extractor.get("obj")).endswith(".FBank"):
        kind = _shown(extractor.get("obj", "missing"))
        return Settings("3dspeaker", config, f"feature_extractor is {kind}, only FBank is supported")
    fbank = _mapping(extractor, "args", content)
    problem = _unknown("FBank", fbank, ("n_mels", "sample_rate", "mean_nor"))
    fields: dict[str, Any] = {key: fbank[key] for key in ("n_mels", "sample_rate") if key in fbank}
    fields["mean_norm"] = bool(fbank.get("mean_nor", False))
    return Settings("3dspeaker", config, problem or _plain(fields))


def _network(model: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords that shapes cannot tell, from the arguments of the network of speechbrain and 3D-Speaker.

    Raises:
        InputError: If an argument is not known, or is none that our network can take.
    """
    config: dict[str, Any] = {"dilations": [1, 2, 3, 4, 1], "groups": [1, 1, 1, 1, 1]}  # defaults of their class
    told_by_shapes = ("input_size", "lin_neurons", "channels", "kernel_sizes", "attention_channels", "res2net_scale",
                      "se_channels", "global_context")  # fmt: skip
    if problem := _unknown("embedding_model", model, (*told_by_shapes, *config, "activation", "dropout", "device")):
        raise InputError(problem)
    activation = model.get("activation", "ReLU")
    if not re.fullmatch(r"(.+[.:])?ReLU", _text(activation)):
        raise InputError(f"embedding_model: activation {_shown(activation)} is not supported, only ReLU is")
    for key in config:
        value = config[key] = model.get(key, config[key])
        if not isinstance(value, list) or not all(isinstance(item, int) and abs(item) < _MOST for item in value):
            raise InputError(f"embedding_model: {key} is no list of integers below {_MOST}")
    return config


def _wespeaker(content: Mapping[str, Any]) -> Settings | None:
    if not isinstance(content.get("model"), str) or not _mapping(content, "dataset_args"):
        return None
    args, model = _mapping(content, "dataset_args"), _mapping(content, "model_args")
    # Without parameters, the mean and the standard deviation look alike.
    kind = _text(model.get("pooling_func")).lower()
    config: dict[str, Any] = {"pooling": kind} if kind in ("tap", "tsdp", "tstp") else {}
    kind = args.get("frontend") or args.get("feat_type") or "fbank"
    if kind != "fbank":
        return Settings("wespeaker", config, f"front-end {_shown(kind)} is not supported, only fbank is")
    names = {"num_mel_bins": "n_mels", "frame_length": "frame_length_ms", "frame_shift": "frame_shift_ms",
             "low_freq": "f_min", "high_freq": "f_max", "window_type": "window"}  # fmt: skip
    fbank, cmvn = _mapping(args, "fbank_args"), _mapping(args, "cmvn_args")
    problem = _unknown("fbank_args", fbank, (*names, "dither")) or _unknown(
        "cmvn_args", cmvn, ("norm_mean", "norm_var")
    )
    fields = {names[key]: value for key, value in fbank.items() if key in names}
    if "resample_rate" in args:
        fields["sample_rate"] = args["resample_rate"]
    normalised = args.get("cmvn", True) is not False
    fields["mean_norm"] = normalised and cmvn.get("norm_mean", True) is not False
    if normalised and cmvn.get("norm_var", False):
        fields |= {"std_norm": True, "std_unbiased": True, "var_eps": 1e-7}
    return Settings("wespeaker", config, problem or _plain(fields))


def _espnet(content: Mapping[str, Any]) -> Settings | None:
    if not (isinstance(content.get("encoder"), str) and "projector" in content and "pooling" in content):
        return None
    pooling, kind = content["pooling"], content.get("frontend")
    config: dict[str, Any] = {"pooling": pooling} if pooling in ("mean", "stats") else {}
    if kind != "melspec_torch":
        return Settings("espnet", config, f"front-end {_shown(kind)} is not supported, only melspec_torch is")
    mel, rate = _mapping(content, "frontend_conf"), _mapping(content, "preprocessor_conf").get("sample_rate", 16000)
    norm, norm_conf = content.get("normalize"), _mapping(content, "normalize_conf")
    problem = None
    if norm:
        problem = _unsupported({"normalize": norm}, {"normalize": "utterance_mvn"}) or _unsupported(
            norm_conf, {"norm_means": True, "norm_vars": False}
        )
    fields: dict[str, Any] = {"sample_rate": rate, "mean_norm": mel.get("normalize") == "mn" or bool(norm)}
    names = {"n_fft": "n_fft", "n_mels": "n_mels", "f_min": "f_min", "f_max": "f_max", "window_fn": "window",
             "mel_scale": "mel_scale"}  # fmt: skip
    if mel.get("normalize") is not None:
        problem = problem or _unsupported(mel, {"normalize": "mn"})
    problem = problem or _unknown(
        "frontend_conf", mel, (*names, "preemp", "log", "win_length", "hop_length", "normalize")
    )
    fields |= {ours: mel[theirs] for theirs, ours in names.items() if mel.get(theirs) is not None}
    for theirs, ours in (("win_length", "frame_length_ms"), ("hop_length", "frame_shift_ms")):
        if isinstance(mel.get(theirs), int) and isinstance(rate, int) and rate > 0:
            fields[ours] = 1000 * mel[theirs] / rate
    if (n_fft := mel.get("n_fft")) and isinstance(n_fft, int) and n_fft & (n_fft - 1):
        fields["round_to_power_of_two"] = False
    if mel.get("preemp") is False:
        fields["preemphasis"] = 0.0
    if not mel.get("log", False):
        fields |= {"log": "none", "log_offset": 0.0}
    return Settings("espnet", config, problem or _plain(fields))


def _unsupported(
    given: Mapping[str, Any], supported: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> str | None:
    """Which setting has another value than the one that is supported, in words."""
    for key, value in supported.items():
        found = given.get(key, (defaults or {}).get(key, value))
        if found != value:
            return f"{key}: {_shown(found)} is not supported, only {value!r} is"
    return None


def _unknown(part: str, given: Mapping[str, Any], known: Collection[str]) -> str | None:
    """Which setting of a part is not known, in words."""
    return next((f"{part} setting {_shown(key)} is not supported" for key in given if key not in known), None)


def _text(value: Any) -> str:
    """A text or the tag of an object; else nothing."""
    value = value.tag if isinstance(value, _Tagged) else value
    return value if isinstance(value, str) else ""


def _shown(value: Any) -> str:
    """The value for a message; lists and mappings by their kind alone, as they may hold each other without end."""
    if text := _text(value):
        return repr(text[:80])
    plain = isinstance(value, float | None) or (isinstance(value, int) and abs(value) < _MOST)
    return repr(value) if plain else type(value).__name__


def _plain(fields: dict[str, Any]) -> dict[str, Any] | str:
    """The fields, or which of them is an object, a reference that leads nowhere or too large a number."""
    for name, value in fields.items():
        if isinstance(value, _Tagged | Mapping | list) or (isinstance(value, str) and value.startswith("<")):
            return f"{name} is no plain value"
        if isinstance(value, int) and abs(value) >= _MOST:
            return f"{name} is no number below {_MOST}"
    return fields


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
