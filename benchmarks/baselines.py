"""Other toolkits' implementations, called as their users call them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from spkfast.frontends import FrontendSpec


def kaldi_native_fbank(spec: FrontendSpec, waveforms: Tensor) -> Callable[[], list[np.ndarray]] | None:
    """Kaldi's features of each row by kaldi-native-fbank, one row after the other; None where it is not installed.

    The mean is not taken off, which is the caller's business there. Samples are scaled and made a list, as its Python
    binding wants them, before the clock runs; frames are fetched one by one, which is the only way it offers.
    """
    try:
        import kaldi_native_fbank as knf
    except ImportError:
        return None
    options = knf.FbankOptions()
    frame, mel = options.frame_opts, options.mel_opts
    frame.dither, frame.samp_freq, frame.window_type = 0.0, spec.sample_rate, spec.window
    frame.frame_length_ms, frame.frame_shift_ms = spec.frame_length_ms, spec.frame_shift_ms
    frame.preemph_coeff, frame.remove_dc_offset = spec.preemphasis, spec.remove_dc
    mel.num_bins, mel.low_freq, mel.high_freq = spec.n_mels, spec.f_min, spec.f_max
    options.use_energy = False
    rows = [row.tolist() for row in waveforms * spec.sample_scale]

    def run() -> list[np.ndarray]:
        features = []
        for row in rows:
            fbank = knf.OnlineFbank(options)
            fbank.accept_waveform(spec.sample_rate, row)
            fbank.input_finished()
            features.append(np.stack([fbank.get_frame(k) for k in range(fbank.num_frames_ready)]))
        return features

    return run
