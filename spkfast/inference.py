"""SpeakerEncoder: file or waveform in, embedding out; and the folder in which a model is kept."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from spkfast import backends, functional, models
from spkfast.backends import Backend
from spkfast.data.audio import read_audio, resample
from spkfast.errors import BatchSizeError, InputError, check_name, nearest
from spkfast.frontends import FrontendSpec, require_spec
from spkfast.frontends import frontend as preset
from spkfast.models.checkpoint_files import fitting_preset, import_checkpoint
from spkfast.models.ecapa_tdnn import current_name
from spkfast.nn.inference import (
    calibrate,
    evaluation_mode,
    inference_layers,
    input_ranges,
    set_input_ranges,
    set_precision,
)
from spkfast.ops._packing import PRECISIONS, Range
from spkfast.reference import Precision

# Goes up where a folder would be read wrongly without knowing why, not where a key is added that may be passed over.
FORMAT_VERSION = 2
_READ_VERSIONS = (1, 2)
_CONFIG, _WEIGHTS, _METADATA = "config.yaml", "model.safetensors", "spkfast"
_KEYS = ("format_version", "model", "frontend", "frontend_hash", "threshold", "input_ranges")
# Most audio in one batch.
_BATCH_SECONDS = 60.0
# Of files that another runtime computes.
GRAPHS = (".onnx", ".engine", ".plan", ".pt2")
# Type of the only device that has products of a precision.
_ONLY_ON = {"int8": "cpu", "fp16": "cuda"}


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

    Attributes:
        model: The network.
        frontend: Settings of the features.
        threshold: Decision threshold, or None.
        device: Where the network was put.
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
        self._unknown: dict[str, Any] = {}

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
        """A model that comes with the package, is kept in a folder, in a checkpoint of another toolkit, or exported.

        Args:
            source: Folder written by :meth:`save`, a file in it, or the output folder of a training run; an ECAPA-TDNN
                of wespeaker, speechbrain, 3D-Speaker, TaoRuijie or ESPnet, a file or folder, as
                :func:`spkfast.models.checkpoint_files.import_checkpoint` reads them; or, where there is no such path, a
                name of :func:`spkfast.models.bundled.list`; or a file of :mod:`spkfast.export`, ``.onnx``,
                ``.engine``, ``.plan`` or ``.pt2``, which another runtime computes. A ``.pt2`` package is code: load
                only what you trust.
            frontend: Front-end that the model is expected to have; any other is an error. For another toolkit's, the
                front-end to take in place of the one that its settings or its family tell. Either may be the name of a
                preset, which takes the number of its mel bands from the model.
            family: Toolkit of a checkpoint whose keys do not tell: ``speechbrain`` or ``3dspeaker``.
            device: ``cpu``, ``cuda``, ``cuda:1`` ...; ``auto`` takes CUDA where there is one, and a CPU for ``int8``.
            precision: See :attr:`precision`. ``int8`` needs a folder in which 'spkfast calibrate' left ranges. An
                exported file has its own; any other that is asked for, but for ``fp32``, is an error.

        Raises:
            InputError: If a file is missing, damaged, of another format version, or disagrees with the rest; if a
                checkpoint would run code when loaded, or its family or front-end cannot be told; if the precision
                cannot run on the device, or lacks calibration.

        Warns:
            UserWarning: If neither the weights of another toolkit's checkpoint nor its settings tell everything, of
                what was assumed.
        """
        if frontend is not None and not isinstance(frontend, str):
            require_spec(frontend)
        check_name("precision", precision, list(PRECISIONS))
        path = find_model(source)
        if path.suffix in GRAPHS and path.is_file():
            return cls._load_graph(path, frontend, family, device, precision)
        if device == "auto" and _ONLY_ON.get(precision) == "cpu":
            device = "cpu"
        if not is_own(path):
            found = import_checkpoint(source, family=family, frontend=frontend)
            if found.network.assumed:
                assumed = ", ".join(f"{name} {found.network.config[name]}" for name in found.network.assumed)
                warnings.warn(
                    f"{found.file}: assumed {assumed}, as neither the weights nor settings beside them tell; "
                    "'spkfast convert --option' takes others",
                    stacklevel=2,
                )
            return cls(found.network.model, found.frontend, device=device)._at(precision, source)
        if family is not None:
            raise InputError(f"{source}: is a model of spkfast, family={family!r} was asked for")
        folder = model_folder(path)
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
        if config.get("input_ranges"):
            try:
                set_input_ranges(net, config["input_ranges"])
            except InputError as error:
                raise InputError(f"{folder / _CONFIG}: damaged: input_ranges: {error}") from error
        threshold = config.get("threshold")
        encoder = cls(
            net,
            spec,
            threshold=Threshold(float(threshold["value"]), str(threshold["list"])) if threshold else None,
            device=device,
        )
        encoder._unknown = {key: value for key, value in config.items() if key not in _KEYS}
        return encoder._at(precision, source)

    @classmethod
    def _load_graph(
        cls, path: Path, frontend: FrontendSpec | str | None, family: str | None, device: str, precision: str
    ) -> SpeakerEncoder:
        from spkfast.export.runners import load_graph

        if family is not None:
            raise InputError(f"{path}: is an exported graph, family={family!r} was asked for")
        place = None if device == "auto" else _device(device, nn.Module())
        net, spec, threshold = load_graph(path, place, frontend)
        if precision not in ("fp32", net.precision):
            raise InputError(f"{path}: was exported at precision {net.precision!r}, {precision!r} was asked for")
        limit = Threshold(**threshold) if threshold else None
        return cls(net, spec, threshold=limit, device=net.device)

    def _at(self, precision: str, source: str | os.PathLike[str]) -> SpeakerEncoder:
        try:
            self.precision = precision
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        return self

    @property
    def precision(self) -> str:
        """What the products of the network multiply: ``fp32``, ``bf16``, ``int8`` (on a CPU) or ``fp16`` (on a GPU).

        At ``fp32`` a network computes in the type of its weights. It is a setting of the network, see
        :func:`spkfast.nn.set_precision`; ``mixed`` where its layers differ.

        Raises:
            InputError: When set, if the name is unknown, the device or this installation has no such products, the
                network has no layer with an inference form or one that never runs on its kernels, as with groups of
                channels, or ``int8`` lacks calibration.
        """
        own: Any = getattr(self.model, "precision", "fp32")
        found = {layer.precision for layer in inference_layers(self.model).values()} or {own}
        return found.pop() if len(found) == 1 else "mixed"

    @precision.setter
    def precision(self, precision: str) -> None:
        check_name("precision", precision, list(PRECISIONS))
        layers = inference_layers(self.model)
        if precision == self.precision and not layers:
            return
        only = _ONLY_ON.get(precision, self.device.type)
        if only != self.device.type:
            raise InputError(f"precision {precision!r} runs on {only} only, the network is on {self.device}")
        for op in {layer.op for layer in layers.values()} if precision != "fp32" else ():
            if backends.resolve(self.device, "auto", op) == "reference":
                raise InputError(
                    f"precision {precision!r} needs kernels of {op}, which are missing on {self.device.type}; "
                    "'spkfast info' tells why"
                )
        for name, layer in layers.items() if precision != "fp32" else ():
            obstacle = layer.obstacle()
            if obstacle is not None:
                raise InputError(
                    f"precision {precision!r} needs layers that run on kernels: {name or 'the network'} has {obstacle}"
                )
        set_precision(self.model, cast(Precision, precision))

    def calibrate(
        self,
        audios: Sequence[Any],
        sample_rate: int | None = None,
        *,
        backend: Backend = "auto",
        batch_seconds: float = _BATCH_SECONDS,
        max_seconds: float = 10.0,
    ) -> dict[str, dict[str, Range]]:
        """Finds the ranges that ``int8`` needs, on features as :meth:`embed_batch` makes them; the network keeps them.

        Only utterances of one length share a batch, so that no padding counts.

        Args:
            audios: Utterances like those to come, some hundred; all are held in memory. See the class.
            sample_rate: Rate of arrays in Hz; None for the rate of the front-end.
            backend: Implementation of the front-end: ``auto``, ``reference``, ``native`` or ``triton``.
            batch_seconds: Most audio in one batch; a longer utterance is a batch of its own.
            max_seconds: What is used of an utterance, from its start.

        Returns:
            Smallest and largest input by layer and product; :meth:`save` writes them.

        Raises:
            InputError: As :meth:`load_audio`; or if there is no utterance, ``max_seconds`` is shorter than a frame, or
                the network has no layer with an inference form.
        """
        self._refuse_graph()
        most = int(max_seconds * self.frontend.sample_rate)
        if most < self.frontend.frame_length:
            raise InputError(f"max_seconds must be at least that of a frame, got {max_seconds}")
        waveforms = [waveform[:most] for waveform in self._load_all(audios, sample_rate)]
        batches = _batches_of_one_length([len(w) for w in waveforms], self._samples(batch_seconds))
        with _exact_convolutions(self.device):
            return calibrate(self.model, (self._features([waveforms[i] for i in batch], backend) for batch in batches))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the folder ``path`` with config.yaml and model.safetensors, whole or not at all.

        Keys of the config.yaml that was loaded which this version does not know are written again.

        Raises:
            InputError: If ``path`` is there and is anything but such a folder, or the network is not of spkfast.models.
        """
        import yaml
        from safetensors.torch import save_file

        self._refuse_graph()
        if not (hasattr(self.model, "name") and hasattr(self.model, "config")):
            raise InputError("only networks of spkfast.models can be saved: this one has no name and config")
        target = Path(path)
        check_target(target)
        fields = self.frontend.to_dict()
        config: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": {"name": self.model.name, "config": self.model.config},
            "frontend": fields,
            "frontend_hash": self.frontend.hash,
        }
        if self.threshold is not None:
            config["threshold"] = {"value": float(self.threshold.value), "list": self.threshold.list}
        ranges = input_ranges(self.model)
        if ranges:
            config["input_ranges"] = {
                name: {key: list(bounds) for key, bounds in of_layer.items()} for name, of_layer in ranges.items()
            }
        config |= self._unknown
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

    def _refuse_graph(self) -> None:
        if hasattr(self.model, "takes_waveforms"):
            raise InputError("this is an exported graph; load the model that it was made of")

    def __repr__(self) -> str:
        name = getattr(self.model, "name", type(self.model).__name__)
        precision = "" if self.precision == "fp32" else f", {self.precision}"
        return f"SpeakerEncoder({name}, front-end {self.frontend.hash}, {self.device}{precision})"

    @property
    def fingerprint(self) -> str:
        """Hex digest of network, front-end, weights and precision: equal for encoders that give the same embeddings.

        Keywords of the network count where they differ from their defaults, so that one which is added later changes
        no digest as long as its default keeps the network as it was and is not None.
        """
        own = getattr(self.model, "fingerprint", None)
        if own is not None:  # an exported graph, which knows whose it is
            return str(own)
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
        coarse = {
            name: [layer.precision, dict(layer.input_ranges) if layer.precision == "int8" else {}]
            for name, layer in inference_layers(self.model).items()
            if layer.precision != "fp32"
        }
        if coarse:
            digest.update(json.dumps(coarse, sort_keys=True).encode())
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
        (row,) = self._rows([audio], sample_rate, backend, _BATCH_SECONDS)
        # A new tensor in either case, since those of inference mode know no gradient.
        return nn.functional.normalize(row, dim=0) if normalize else row.clone()

    def embed_batch(
        self,
        audios: Sequence[Any],
        sample_rate: int | None = None,
        *,
        normalize: bool = False,
        backend: Backend = "auto",
        batch_seconds: float = _BATCH_SECONDS,
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
        rows = self._rows(audios, sample_rate, backend, batch_seconds)
        if not rows:
            return torch.empty(0, getattr(self.model, "embedding_dim", 0))
        out = torch.stack(rows)
        return nn.functional.normalize(out, dim=1) if normalize else out

    def _rows(
        self, audios: Sequence[Any], sample_rate: int | None, backend: Backend, batch_seconds: float
    ) -> list[Tensor]:
        """Embedding of each utterance, made in inference mode; a complaint about one is an error."""
        rows = self._embed(self._load_all(audios, sample_rate), backend, batch_seconds)
        for name, row in zip(_names(audios), rows, strict=True):
            if isinstance(row, str):
                raise InputError(f"{name}: {row}")
        return cast("list[Tensor]", rows)

    def embed_files(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        backend: Backend = "auto",
        batch_seconds: float = _BATCH_SECONDS,
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
        most = self._samples(batch_seconds)
        # In training mode an embedding would depend on its batch, and batch norm would learn from it.
        with evaluation_mode(self.model):
            return self._embed_batches(waveforms, backend, most)

    def _embed_batches(self, waveforms: list[np.ndarray], backend: Backend, most: int) -> list[Tensor | str]:
        rows: dict[int, Tensor | str] = {}
        longest = getattr(self.model, "max_samples", None) or math.inf
        for i, waveform in enumerate(waveforms):
            if len(waveform) > longest:
                rate = self.frontend.sample_rate
                rows[i] = f"has {len(waveform) / rate:.3f} s, the exported graph takes {longest / rate:.3f} s at most"
        fitting = [i for i in range(len(waveforms)) if i not in rows]
        batches = [*_batches({i: len(waveforms[i]) for i in fitting}, most, getattr(self.model, "max_batch", None))]
        for batch in batches:
            try:
                embeddings = self._forward([waveforms[i] for i in batch], backend)
            except BatchSizeError as error:
                if len(batch) > 1:
                    batches += [[i] for i in batch]
                else:
                    rows[batch[0]] = str(error)
                continue
            finite = np.isfinite(embeddings.numpy()).all(axis=1).tolist()
            for i, embedding, good in zip(batch, embeddings, finite, strict=True):
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

    def _load_all(self, audios: Sequence[Any], sample_rate: int | None) -> list[np.ndarray]:
        if isinstance(audios, str | os.PathLike):
            raise InputError(f"audios must be a list of utterances, got the one path {audios}: put it into a list")
        return [
            self.load_audio(audio, sample_rate, name=None if _is_file(audio) or len(audios) == 1 else name)
            for audio, name in zip(audios, _names(audios), strict=True)
        ]

    def _samples(self, batch_seconds: float) -> int:
        if not batch_seconds > 0:
            raise InputError(f"batch_seconds must be positive, got {batch_seconds}")
        return int(batch_seconds * self.frontend.sample_rate)

    def _forward(self, waveforms: list[np.ndarray], backend: Backend) -> Tensor:
        signal, lengths = self._inputs(waveforms, backend)
        with _exact_convolutions(self.device):
            return self.model(signal, lengths).float().cpu()

    def _inputs(self, waveforms: list[np.ndarray], backend: Backend) -> tuple[Tensor, Tensor]:
        """What the network takes, padded, and its lengths."""
        if getattr(self.model, "takes_waveforms", False):
            return self._padded(waveforms)
        return self._features(waveforms, backend)

    def _padded(self, waveforms: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(w) for w in waveforms])
        if len(waveforms) == 1:
            padded = torch.from_numpy(waveforms[0])[None]
        else:
            padded = torch.zeros(len(waveforms), int(lengths.max()))
            for row, waveform in zip(padded, waveforms, strict=True):
                row[: len(waveform)] = torch.from_numpy(waveform)
        return padded.to(self.device), lengths.to(self.device)

    def _features(self, waveforms: list[np.ndarray], backend: Backend) -> tuple[Tensor, Tensor]:
        padded, lengths = self._padded(waveforms)
        features, frame_lengths = functional.log_mel_fbank(padded, lengths, spec=self.frontend, backend=backend)
        # As the parameters, since a network in half or double precision takes no other type.
        kinds = (parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())
        return features.to(next(kinds, features.dtype)), frame_lengths


def _exact_convolutions(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """fp32 means fp32: cuDNN's convolutions would use TF32 by default."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _names(audios: Sequence[Any]) -> list[str]:
    return [str(audio) if _is_file(audio) else f"audio {i}" for i, audio in enumerate(audios)]


def _batches(lengths: dict[int, int], most: int, most_rows: int | None = None) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in sorted(lengths, key=lambda i: lengths[i]):
        if batch and ((len(batch) + 1) * lengths[i] > most or len(batch) == most_rows):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _batches_of_one_length(lengths: list[int], most: int) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        by_length.setdefault(length, []).append(i)
    for length, same in by_length.items():
        size = max(1, most // length)
        yield from (same[start : start + size] for start in range(0, len(same), size))


def _is_file(audio: Any) -> bool:
    return isinstance(audio, str | os.PathLike) or hasattr(audio, "read")


def _mono(audio: Any, name: str) -> np.ndarray:
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        audio = audio.float() if audio.is_floating_point() else audio  # numpy has no bfloat16
    samples = np.asarray(audio)
    if samples.dtype.kind == "i":
        scale = np.float32(1 / -float(np.iinfo(samples.dtype).min))
    elif samples.dtype.kind == "f":
        scale = np.float32(1)
    else:
        raise InputError(f"{name}: samples must be floating or signed integers, got {samples.dtype}")
    if samples.ndim not in (1, 2):
        raise InputError(f"{name}: samples must have shape (S,) or (channels, S), got {samples.shape}")
    samples = samples.astype(np.float32)
    if scale != 1:
        samples *= scale
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


def find_model(source: str | os.PathLike[str]) -> Path:
    """Where a model is of which :meth:`SpeakerEncoder.load` is told: at this path, or in the package by this name.

    Raises:
        InputError: If there is neither.
    """
    path, names = Path(source), models.bundled.list()
    if path.exists():
        _refuse_checkpoint(path)
        return path
    name = os.fspath(source)  # as it was given: with a separator, as in ./name, it is a path
    if name in names:
        return models.bundled.folder(name)
    if path.suffix in GRAPHS:
        raise InputError(f"{source}: no such model: there is no such file")
    raise InputError(
        f"{source}: no such model{nearest(name, names)}; name one that comes with the package ({', '.join(names)}), a "
        "folder written by 'spkfast train' or SpeakerEncoder.save, or another toolkit's checkpoint, that is there: "
        "nothing is downloaded"
    )


def _refuse_checkpoint(path: Path) -> None:
    folder = path.parent if path.is_file() else path
    if (folder / "run.json").is_file() and (folder / "state.pt").is_file():
        run = folder.absolute().parent.parent
        raise InputError(
            f"{path}: is a checkpoint of training, for --resume only; the model of the run is in {run / 'model'} once "
            f"it has ended, the best ones so far are in {run / 'best'}"
        )


def is_own(source: Path) -> bool:
    """Whether a path that exists leads to a model of spkfast, whole or not; other toolkits use the same names."""
    if source.is_file() and source.name not in (_CONFIG, _WEIGHTS):
        return False
    folders = (source.parent,) if source.is_file() else (source, source / "model")
    return any(_has_format_version(folder / _CONFIG) or _has_metadata(folder / _WEIGHTS) for folder in folders)


def check_target(target: Path) -> None:
    """Refuses a path at which saving would remove anything but a model of spkfast.

    Raises:
        InputError: If it is such a path.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file; name a folder")
    foreign = [path.name for path in target.iterdir()]
    foreign = [name for name in foreign if name not in (_CONFIG, _WEIGHTS)] or _not_own(target)
    if foreign:
        raise InputError(f"{target}: holds {sorted(foreign)[0]!r}, which saving would remove; name another folder")


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


def model_folder(source: Path) -> Path:
    """The folder of a model of spkfast, of what :meth:`SpeakerEncoder.load` takes.

    Raises:
        InputError: If it is not whole.
    """
    if source.is_file():
        source = source.parent
    for folder in (source, source / "model"):
        found = [name for name in (_CONFIG, _WEIGHTS) if (folder / name).is_file()]
        if len(found) == 2:
            return folder
        # A training run has its own settings in a file of this name.
        if found and (_WEIGHTS in found or _has_format_version(folder / _CONFIG)):
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
    if "input_ranges" in config:
        shapes["input_ranges"] = (dict,)
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
