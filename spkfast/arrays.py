"""Features of numpy arrays without torch: of whole utterances, and of audio that arrives in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spkfast import backends, frontend_tables
from spkfast.errors import InputError
from spkfast.frontends import FrontendSpec, require_spec


class NumpyFbank:
    """Features of numpy arrays, without torch: the same C++ kernel as that of :func:`spkfast.functional.log_mel_fbank`.

    Args:
        spec: The front-end. ``dither`` is for training and is left out here.

    Raises:
        InputError: If the compiled module is missing.
    """

    def __init__(self, spec: FrontendSpec) -> None:
        require_spec(spec)
        self.spec = spec
        self._fbank: Any = _made("Fbank", spec)

    def __call__(self, samples: ArrayLike) -> NDArray[np.float32]:
        """Features (T, D) of samples (S,), floats in [-1, 1] or int16; T is a multiple of ``spec.pad_frames_to``.

        One thread computes them; several may call at the same time.

        Raises:
            InputError: If the samples have another shape or type, or one is NaN or infinite.
        """
        try:
            return self._fbank.compute(samples)
        except ValueError as error:
            raise InputError(str(error)) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return NumpyFbank, (self.spec,)

    def __repr__(self) -> str:
        return f"NumpyFbank({self.spec.output_size} values, hash={self.spec.hash})"


class StreamingFbank:
    """Features of one utterance after another as their samples arrive, in pieces of any size.

    The frames are those of :func:`spkfast.functional.log_mel_fbank` on the CPU to the last bit, each as soon as its
    last sample is there. What is kept between two calls does not grow. Needs numpy, and no torch.

    Args:
        spec: The front-end; nothing in it may need the whole utterance: ``mean_norm``, ``std_norm``, ``top_db`` and
            ``waveform_norm`` must be off. ``dither`` is for training and is left out here, as is ``pad_frames_to``.

    Raises:
        InputError: If the spec needs the whole utterance, or the compiled module is missing.
    """

    def __init__(self, spec: FrontendSpec) -> None:
        require_spec(spec)
        whole = [name for name in ("mean_norm", "std_norm") if getattr(spec, name)]
        whole += ["top_db"] * (spec.top_db is not None) + ["waveform_norm"] * (spec.waveform_norm != "none")
        if whole:
            raise InputError(f"a stream cannot compute what needs the whole utterance: {', '.join(whole)}")
        self.spec = spec
        self._stream: Any = _made("FbankStream", spec)

    def __reduce__(self) -> tuple[Any, ...]:
        raise InputError("a stream cannot be copied or pickled: make one from its spec")

    def __repr__(self) -> str:
        return f"StreamingFbank({self.spec.output_size} values, hash={self.spec.hash})"

    def push(self, samples: ArrayLike) -> NDArray[np.float32]:
        """The frames (t, D) that become complete with these samples.

        Args:
            samples: The next samples (n,), floats in [-1, 1] or int16; any n. Torch tensors on the CPU will do.

        Raises:
            InputError: If they have another shape or type, or a value in the frames is NaN or infinite: the stream then
                starts again.
        """
        try:
            return self._stream.push(samples)
        except ValueError as error:
            raise InputError(str(error)) from None

    def flush(self) -> NDArray[np.float32]:
        """The frames (t, D) that lie over the end of the utterance; the next samples start another one."""
        try:
            return self._stream.flush()
        except ValueError as error:
            raise InputError(str(error)) from None

    def reset(self) -> None:
        """Forgets what has come, so that the next samples start another utterance."""
        self._stream.reset()


def _made(name: str, spec: FrontendSpec) -> Any:
    settings, tables = frontend_tables.settings(spec), frontend_tables.tables(spec)
    try:
        return getattr(backends.compiled_module(), name)(
            settings.integers, settings.floats, tables.window, tables.mel, tables.cosines
        )
    except ValueError as error:  # of SPKFAST_CPU_LEVEL
        raise InputError(str(error)) from None
