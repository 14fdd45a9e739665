"""SpeakerEncoder: file or waveform in, embedding out; and the folder in which a model is kept."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spkfast import functional, models
from spkfast.backends import Backend
from spkfast.data.audio import read_audio, resample
from spkfast.errors import InputError
from spkfast.frontends import FrontendSpec, require_spec
from spkfast.frontends import frontend as preset
from spkfast.models.checkpoint_files import fitting_preset, import_checkpoint
from spkfast.models.ecapa_tdnn import current_name

FORMAT_VERSION = 2
_READ_VERSIONS = (1, 2)
_CONFIG, _WEIGHTS, _METADATA = "config.yaml", "model.safetensors", "spkfast"


class Threshold(NamedTuple):
    """Score above which two utterances count as one speaker, and the trial list on which it was set."""

    value: float
    list: str


class Verification(NamedTuple):
    """Cosine of two utterances and the decision; the latter and the threshold are None for a model without one."""

    score: float
    same_speaker: bool | None
    threshold: float | None


class SpeakerEncoder:
    """A network with its front-end: turns audio into speaker embeddings.

    Audio is a path, a binary file object, or a numpy or torch array of samples: floating in [-1, 1] or signed integer,
    shape (S,), or two-dimensional with the shorter axis for the channels, which are averaged. Files are resampled to
    the rate of the front-end; arrays too where ``sample_rate`` is given.

    Args:
        net: Network from :func:`spkfast.models.create`; put into evaluation mode.
        frontend: Settings of the features it was trained on, or the name of a preset, which takes the number of its mel
            bands from the network.
        threshold: Decision threshold of :meth:`verify`.
        device: ``cpu``, ``cuda``, ``cuda:1`` ..., to which the network is moved; ``auto`` takes CUDA where there is
            one, None leaves the network where it is.
    """

    def __init__(
        self,
        net: nn.Module,
        frontend: FrontendSpec | str,
        *,
        threshold: Threshold | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        expected = getattr(net, "config", {}).get("feature_dim")
        if isinstance(frontend, str):
            frontend = preset(frontend) if expected is None else fitting_preset(frontend, expected)
        require_spec(frontend)
        if expected not in (None, frontend.output_size):
            raise InputError(f"the model takes {expected} values per frame, the front-end gives {frontend.output_size}")
        self.device = _device(device, net)
        self.model = net.to(self.device).eval()
        self.frontend = frontend
        self.threshold = threshold

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        frontend: FrontendSpec | str | None = None,
        family: str | None = None,
        device: str = "auto",
        precision: str = "fp32",
    ) -> SpeakerEncoder:
        """The model kept in a folder, or in a checkpoint of another toolkit.

        Args:
            source: Folder written by :meth:`save`, a file in it, or the output folder of a training run; or an
                ECAPA-TDNN of wespeaker, speechbrain, 3D-Speaker, TaoRuijie or ESPnet, a file or folder, as
                :func:`spkfast.models.checkpoint_files.import_checkpoint` reads them.
            frontend: Front-end that the model is expected to have; any other is an error. For another toolkit's, the
                front-end to take in place of the one that its settings or its family tell. Either may be the name of a
                preset, which takes the number of its mel bands from the model.
            family: Toolkit of a checkpoint whose keys do not tell: ``speechbrain`` or ``3dspeaker``.
            device: ``cpu``, ``cuda``, ``cuda:1`` ...; ``auto`` takes CUDA where there is one.
            precision: ``fp32``.

        Raises:
            InputError: If a file is missing, damaged, of another format version, or disagrees with the rest; if a
                checkpoint would run code when loaded, or its family or front-end cannot be told.

        Warns:
            UserWarning: If neither the weights of another toolkit's checkpoint nor its settings tell everything, of
                what was assumed.
        """
        if frontend is not None and not isinstance(frontend, str):
            require_spec(frontend)
        if precision != "fp32":
            raise InputError(f"precision must be 'fp32' (no other is supported yet), got {precision!r}")
        if not is_own(Path(source)):
            found = import_checkpoint(source, family=family, frontend=frontend)
            if found.network.assumed:
                assumed = ", ".join(f"{name} {found.network.config[name]}" for name in found.network.assumed)
                warnings.warn(
                    f"{found.file}: assumed {assumed}, as neither the weights nor settings beside them tell; "
                    "'spkfast convert --option' takes others",
                    stacklevel=2,
                )
            return cls(found.network.model, found.frontend, device=device)
        if family is not None:
            raise InputError(f"{source}: is a model of spkfast, family={family!r} was asked for")
        folder = _model_folder(Path(source))
        config = _read_config(folder / _CONFIG)
        tensors, metadata = _read_weights(folder / _WEIGHTS)
        spec = _spec(config["frontend"], folder / _CONFIG)
        if isinstance(frontend, str):
            frontend = fitting_preset(frontend, spec.output_size)
        for other, origin in ((_stored_frontend(metadata, folder / _WEIGHTS), _WEIGHTS), (frontend, "the caller")):
            if other is not None and other.hash != spec.hash:
                raise InputError(
                    f"{folder / _CONFIG}: front-end differs from that of {origin}: {spec.difference(other)}"
                )
        if config["frontend_hash"] != spec.hash:
            raise InputError(
                f"{folder / _CONFIG}: frontend_hash is {config['frontend_hash']}, its fields give {spec.hash}"
            )
        try:
            net = models.create(config["model"]["name"], **config["model"]["config"])
        except (TypeError, ValueError) as error:
            raise InputError(f"{folder / _CONFIG}: {error}") from error
        _fill(net, tensors, folder / _WEIGHTS)
        threshold = config.get("threshold")
        return cls(
            net,
            spec,
            threshold=Threshold(float(threshold["value"]), str(threshold["list"])) if threshold else None,
            device=device,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the folder ``path`` with config.yaml and model.safetensors, whole or not at all.

        Raises:
            InputError: If ``path`` is there and is anything but such a folder, or the network is not of spkfast.models.
        """
        import yaml
        from safetensors.torch import save_file

        if not (hasattr(self.model, "name") and hasattr(self.model, "config")):
            raise InputError("only networks of spkfast.models can be saved: this one has no name and config")
        target = Path(path)
        if target.exists():
            if not target.is_dir():
                raise InputError(f"{target}: is a file; name a folder")
            foreign = [p.name for p in target.iterdir()]
            foreign = [name for name in foreign if name not in (_CONFIG, _WEIGHTS)] or _not_own(target)
            if foreign:
                raise InputError(
                    f"{target}: holds {sorted(foreign)[0]!r}, which saving would remove; name another folder"
                )
        fields = self.frontend.to_dict()
        config: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": {"name": self.model.name, "config": self.model.config},
            "frontend": fields,
            "frontend_hash": self.frontend.hash,
        }
        if self.threshold is not None:
            config["threshold"] = {"value": float(self.threshold.value), "list": self.threshold.list}
        facts = {"format_version": FORMAT_VERSION, "frontend_hash": self.frontend.hash, "frontend": fields}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh, old = (target.with_name(f".{target.name}.{word}-{os.getpid()}") for word in ("new", "old"))
        try:
            fresh.mkdir()
            # One entry: the order of several would change from file to file, and with it the file's checksum.
            save_file(tensors, fresh / _WEIGHTS, metadata={_METADATA: json.dumps(facts, sort_keys=True)})
            (fresh / _CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            shutil.copymode(fresh / _CONFIG, fresh / _WEIGHTS)  # the writer of the weights shuts others out
            for name in (_CONFIG, _WEIGHTS):
                with open(fresh / name, "rb") as file:
                    os.fsync(file.fileno())
            if target.exists():
                target.rename(old)
            fresh.rename(target)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            for folder in (fresh, old):
                shutil.rmtree(folder, ignore_errors=True)

    def __repr__(self) -> str:
        name = getattr(self.model, "name", type(self.model).__name__)
        return f"SpeakerEncoder({name}, front-end {self.frontend.hash}, {self.device})"

    @property
    def fingerprint(self) -> str:
        """Hex digest of network, front-end and weights: equal for encoders that give the same embeddings.

        Keywords of the network count where they differ from their defaults, so that one which is added later changes
        no digest as long as its default keeps the network as it was and is not None.
        """
        config: Any = self.model.config
        parameters = inspect.signature(type(self.model)).parameters
        # As JSON, in which a list and a tuple are the same.
        given = {name: json.dumps(value, sort_keys=True) for name, value in config.items()}
        defaults = {name: json.dumps(parameters[name].default, default=str) for name in given if name in parameters}
        counted = {name: text for name, text in given.items() if text != defaults.get(name)}
        digest = hashlib.sha256(json.dumps([self.model.name, counted, self.frontend.hash], sort_keys=True).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def load_audio(self, audio: Any, sample_rate: int | None = None, *, name: str | None = None) -> np.ndarray:
        """Checked samples at the rate of the front-end: mono float32, shape (S,).

        Args:
            audio: See the class.
            sample_rate: Rate of an array in Hz; None for the rate of the front-end. Files know theirs.
            name: What error messages call the audio.

        Raises:
            InputError: If the audio cannot be read, holds NaN or infinite samples, or is shorter than one frame.
        """
        if _is_file(audio):
            samples, rate = read_audio(audio)
            name = name or str(audio)
        else:
            name = name or "audio array"
            samples, rate = _mono(audio, name), self.frontend.sample_rate if sample_rate is None else sample_rate
        if not rate > 0:
            raise InputError(f"sample_rate must be positive, got {rate}")
        samples = resample(samples, rate, self.frontend.sample_rate)
        if len(samples) < self.frontend.frame_length:
            raise InputError(
                f"{name}: too short: {len(samples)} samples at {self.frontend.sample_rate} Hz, one frame needs "
                f"{self.frontend.frame_length}"
            )
        return samples

    def embed(
        self, audio: Any, sample_rate: int | None = None, *, normalize: bool = False, backend: Backend = "auto"
    ) -> Tensor:
        """Embedding of one utterance, shape (E,), float32 on the CPU, as the network gives it.

        Args:
            audio: See the class.
            sample_rate: Rate of an array in Hz; None for the rate of the front-end.
            normalize: Scale to length 1.
            backend: Implementation of the front-end: ``auto``, ``reference``, ``native`` or ``triton``.

        Raises:
            InputError: As :meth:`load_audio`; or if the embedding is not finite.
        """
        return self.embed_batch([audio], sample_rate, normalize=normalize, backend=backend)[0]

    def embed_batch(
        self,
        audios: Sequence[Any],
        sample_rate: int | None = None,
        *,
        normalize: bool = False,
        backend: Backend = "auto",
        batch_seconds: float = 60.0,
    ) -> Tensor:
        """Embeddings of utterances of any lengths, shape (B, E), float32 on the CPU, in the order given.

        Utterances of like length share a padded batch; each gives the embedding it gives alone.

        Args:
            audios: See the class; all are held in memory.
            sample_rate: Rate of arrays in Hz; None for the rate of the front-end.
            normalize: Scale each row to length 1.
            backend: Implementation of the front-end: ``auto``, ``reference``, ``native`` or ``triton``.
            batch_seconds: Most audio in one batch, padding counted; a longer utterance is a batch of its own.

        Raises:
            InputError: As :meth:`load_audio`; or if an embedding is not finite.
        """
        if isinstance(audios, str | os.PathLike):
            raise InputError(f"audios must be a list of utterances, got the one path {audios}: use embed()")
        names = [str(audio) if _is_file(audio) else f"audio {i}" for i, audio in enumerate(audios)]
        waveforms = [
            self.load_audio(audio, sample_rate, name=None if _is_file(audio) or len(audios) == 1 else name)
            for audio, name in zip(audios, names, strict=True)
        ]
        rows = self._embed(waveforms, backend, batch_seconds)
        for name, row in zip(names, rows, strict=True):
            if isinstance(row, str):
                raise InputError(f"{name}: {row}")
        if not rows:
            return torch.empty(0, getattr(self.model, "embedding_dim", 0))
        out = torch.stack([row for row in rows if isinstance(row, Tensor)])
        return nn.functional.normalize(out, dim=1) if normalize else out

    def embed_files(
        self, paths: Iterable[str | os.PathLike[str]], *, backend: Backend = "auto", batch_seconds: float = 60.0
    ) -> Iterator[Tensor | InputError]:
        """Embeddings of any number of files, in their order, a few batches of audio in memory at a time.

        Args:
            paths: Audio files.
            backend: Implementation of the front-end: ``auto``, ``reference``, ``native`` or ``triton``.
            batch_seconds: Most audio in one batch, padding counted; a longer utterance is a batch of its own.

        Yields:
            Shape (E,), float32 on the CPU, as the network gives it; for a file without one, the error that tells why.
        """
        # Lengths are matched among several batches' worth of files, else padding would cost more.
        most = 8 * batch_seconds * self.frontend.sample_rate
        window: list[tuple[str, np.ndarray | InputError]] = []
        held = 0
        for path in paths:
            try:
                samples = self.load_audio(path)
            except InputError as error:
                if window:
                    window.append((str(path), error))
                else:  # nothing to wait for
                    yield error
                continue
            window.append((str(path), samples))
            held += len(samples)
            if held >= most:
                yield from self._embed_window(window, backend, batch_seconds)
                window, held = [], 0
        yield from self._embed_window(window, backend, batch_seconds)

    def _embed_window(
        self, window: list[tuple[str, np.ndarray | InputError]], backend: Backend, batch_seconds: float
    ) -> Iterator[Tensor | InputError]:
        waveforms = [audio for _, audio in window if not isinstance(audio, InputError)]
        rows = iter(self._embed(waveforms, backend, batch_seconds))
        for path, audio in window:
            row = audio if isinstance(audio, InputError) else next(rows)
            yield InputError(f"{path}: {row}") if isinstance(row, str) else row

    @torch.inference_mode()
    def _embed(self, waveforms: list[np.ndarray], backend: Backend, batch_seconds: float) -> list[Tensor | str]:
        """Embedding of each waveform, or a complaint in words."""
        if not batch_seconds > 0:
            raise InputError(f"batch_seconds must be positive, got {batch_seconds}")
        # In training mode an embedding would depend on its batch, and batch norm would learn from it.
        was_training = self.model.training
        self.model.eval()
        try:
            return self._embed_batches(waveforms, backend, batch_seconds)
        finally:
            self.model.train(was_training)

    def _embed_batches(self, waveforms: list[np.ndarray], backend: Backend, batch_seconds: float) -> list[Tensor | str]:
        rows: dict[int, Tensor | str] = {}
        for batch in _batches([len(w) for w in waveforms], int(batch_seconds * self.frontend.sample_rate)):
            embeddings = self._forward([waveforms[i] for i in batch], backend)
            for i, embedding, good in zip(batch, embeddings, embeddings.isfinite().all(dim=1).tolist(), strict=True):
                seconds = len(waveforms[i]) / self.frontend.sample_rate
                rows[i] = embedding if good else f"the model gives no finite embedding for its {seconds:.3f} s"
        return [rows[i] for i in range(len(waveforms))]

    def verify(self, a: Any, b: Any, sample_rate: int | None = None, *, backend: Backend = "auto") -> Verification:
        """Cosine of two utterances, and whether it lies above the model's threshold.

        Raises:
            InputError: As :meth:`embed`.
        """
        first, second = (self.embed(audio, sample_rate, normalize=True, backend=backend) for audio in (a, b))
        score = float((first * second).sum().clamp(-1, 1))
        if self.threshold is None:
            return Verification(score, None, None)
        return Verification(score, score > self.threshold.value, self.threshold.value)

    def _forward(self, waveforms: list[np.ndarray], backend: Backend) -> Tensor:
        lengths = torch.tensor([len(w) for w in waveforms])
        padded = torch.zeros(len(waveforms), int(lengths.max()))
        for row, waveform in zip(padded, waveforms, strict=True):
            row[: len(waveform)] = torch.from_numpy(waveform)
        features, frame_lengths = functional.log_mel_fbank(
            padded.to(self.device), lengths.to(self.device), spec=self.frontend, backend=backend
        )
        # As the parameters, since a network in half or double precision takes no other type.
        kinds = (parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())
        features = features.to(next(kinds, features.dtype))
        # fp32 means fp32: cuDNN's convolutions would use TF32 by default.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.model(features, frame_lengths).float().cpu()


def _batches(lengths: list[int], most: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _is_file(audio: Any) -> bool:
    return isinstance(audio, str | os.PathLike) or hasattr(audio, "read")


def _mono(audio: Any, name: str) -> np.ndarray:
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        audio = audio.float() if audio.is_floating_point() else audio  # numpy has no bfloat16
    samples = np.asarray(audio)
    if np.issubdtype(samples.dtype, np.signedinteger):
        scale = np.float32(1 / -float(np.iinfo(samples.dtype).min))
    elif np.issubdtype(samples.dtype, np.floating):
        scale = np.float32(1)
    else:
        raise InputError(f"{name}: samples must be floating or signed integers, got {samples.dtype}")
    if samples.ndim not in (1, 2):
        raise InputError(f"{name}: samples must have shape (S,) or (channels, S), got {samples.shape}")
    samples = samples.astype(np.float32) * scale
    if samples.ndim == 2:
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    if not np.isfinite(samples).all():
        raise InputError(f"{name}: holds NaN or infinite samples")
    return samples


def _device(device: str | torch.device | None, net: nn.Module) -> torch.device:
    if device is None:
        return next((tensor.device for tensor in net.state_dict().values()), torch.device("cpu"))
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r}: torch finds {torch.cuda.device_count()} CUDA devices here")
    return found


def is_own(source: Path) -> bool:
    """Whether a path leads to a model of spkfast, whole or not; other toolkits have files of the same names.

    Raises:
        InputError: If there is nothing at the path.
    """
    if not source.exists():
        raise InputError(
            f"{source}: no such model; name a folder written by 'spkfast train' or SpeakerEncoder.save, or another "
            "toolkit's checkpoint, that is there: nothing is downloaded"
        )
    if source.is_file() and source.name not in (_CONFIG, _WEIGHTS):
        return False
    folders = (source.parent,) if source.is_file() else (source, source / "model")
    return any(_has_format_version(folder / _CONFIG) or _has_metadata(folder / _WEIGHTS) for folder in folders)


def _not_own(folder: Path) -> list[str]:
    """Which of the two files another toolkit wrote; with a config.yaml of spkfast, damaged weights count as its own."""
    if (folder / _CONFIG).exists():
        return [] if _has_format_version(folder / _CONFIG) else [_CONFIG]
    return [_WEIGHTS] if (folder / _WEIGHTS).exists() and not _has_metadata(folder / _WEIGHTS) else []


def _has_metadata(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return _METADATA in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False


def _has_format_version(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return any(line.startswith("format_version") for line in file)


def _model_folder(source: Path) -> Path:
    if source.is_file():
        source = source.parent
    for folder in (source, source / "model"):
        found = [name for name in (_CONFIG, _WEIGHTS) if (folder / name).is_file()]
        if len(found) == 2:
            return folder
        if found:
            missing = _WEIGHTS if found == [_CONFIG] else _CONFIG
            raise InputError(f"{folder / missing}: no such file, but {found[0]} is there")
    raise InputError(f"{source}: not a model folder: holds no {_CONFIG} with {_WEIGHTS}")


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # what YAML's own types meet in a bad value is not always an error of YAML
        raise InputError(f"{path}: damaged: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or "format_version" not in config:
        raise InputError(f"{path}: not the config of a model: holds no format_version")
    if config["format_version"] not in _READ_VERSIONS:
        raise InputError(
            f"{path}: format version {config['format_version']!r}, this spkfast reads versions up to {FORMAT_VERSION}"
        )
    for key in ("model", "frontend", "frontend_hash"):
        if key not in config:
            raise InputError(f"{path}: damaged: holds no {key!r}")
    shapes: dict[str, tuple[type, ...]] = {"model.name": (str,), "model.config": (dict,), "frontend": (dict,)}
    if "threshold" in config:
        shapes |= {"threshold.value": (int, float), "threshold.list": (str,)}
    for key, kind in shapes.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise InputError(f"{path}: damaged: {key} is {value!r}")
    return config


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged: {' '.join(str(error).split())}") from error
    version = metadata.get("format_version")
    if version not in _READ_VERSIONS:
        raise InputError(f"{path}: format version {version!r}, this spkfast reads versions up to {FORMAT_VERSION}")
    if version == 1:
        tensors = {current_name(name): value for name, value in tensors.items()}
    return tensors, metadata


def _spec(fields: dict[str, Any], path: Path) -> FrontendSpec:
    try:
        return FrontendSpec.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: front-end: {error}") from error


def _stored_frontend(metadata: dict[str, Any], path: Path) -> FrontendSpec:
    if not isinstance(metadata.get("frontend"), dict):
        raise InputError(f"{path}: damaged: no front-end in its metadata")
    spec = _spec(metadata["frontend"], path)
    if spec.hash != metadata.get("frontend_hash"):
        raise InputError(f"{path}: frontend_hash is {metadata.get('frontend_hash')}, its fields give {spec.hash}")
    return spec


def _fill(net: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    expected = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in expected | found:
        if expected.get(name) != found.get(name):
            raise InputError(
                f"{path}: tensor {name!r} has shape {found.get(name, 'none')}, the model of {_CONFIG} has "
                f"{expected.get(name, 'none')}"
            )
    net.load_state_dict(tensors)
