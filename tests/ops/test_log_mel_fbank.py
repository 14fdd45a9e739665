"""log_mel_fbank: independent oracles, parity of each backend, gradients, registration, awkward input, messages."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import spkfast
from spkfast import ops, reference
from spkfast.reference.log_mel_fbank import fbank_tables
from tests.parity import assert_parity

WESPEAKER = spkfast.frontend("wespeaker")
SPECS = {
    "wespeaker": WESPEAKER,
    "kaldi": spkfast.frontend("kaldi"),
    "3dspeaker": spkfast.frontend("3dspeaker"),
    "8k": spkfast.frontend("kaldi", sample_rate=8000, n_mels=40, window="hann"),
    "bare": spkfast.frontend("kaldi", preemphasis=0.0, remove_dc=False, window="rectangular", n_mels=23),
    "long": spkfast.frontend("wespeaker", frame_length_ms=50.0, frame_shift_ms=12.5, n_mels=128),
}
# 26 samples a frame, 9 a shift: small enough for numerical differentiation.
TINY = spkfast.frontend("kaldi", sample_rate=1000, frame_length_ms=26.0, frame_shift_ms=9.0, n_mels=5)


def voice(batch: int, samples: int, seed: int = 0) -> Tensor:
    """Harmonics under a slow envelope with some noise, float64 (B, S), within [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(samples, dtype=torch.float64) / 16000
    f0 = 90 + 120 * torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    x = sum(torch.sin(2 * math.pi * f0 * k * t + k * k) / k for k in range(1, 20))
    x = 0.1 * x * (1 + torch.sin(2 * math.pi * 3 * t))
    return (x + 0.01 * torch.randn(batch, samples, generator=generator, dtype=torch.float64)).clamp(-1, 1)


def arguments(spec: spkfast.FrontendSpec, waveforms: Tensor, lengths: Tensor) -> tuple:
    """Arguments of the op below the public function."""
    window, mel = (table.to(waveforms) for table in fbank_tables(spec))
    return (
        waveforms, lengths, window, mel, spec.frame_shift, spec.fft_size, spec.sample_scale, spec.preemphasis,
        spec.remove_dc, spec.log_floor, spec.mean_norm,
    )  # fmt: skip


# Parity -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_matches_reference(backend, device, name):
    lengths = torch.tensor([2000, 1333], device=device)
    assert_parity(ops.log_mel_fbank, (voice(2, 2000).to(device), lengths), backend=backend, spec=SPECS[name])


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 401, 559, 560, 1000])
def test_matches_reference_at_edge_lengths(backend, device, samples):
    lengths = torch.tensor([samples, samples // 2, 0], device=device)
    assert_parity(ops.log_mel_fbank, (voice(3, samples).to(device), lengths), backend=backend, spec=WESPEAKER)


def test_matches_reference_without_rows(backend, device):
    features, frame_lengths = ops.log_mel_fbank(torch.zeros(0, 800, device=device), spec=WESPEAKER, backend=backend)
    assert features.shape == (0, 3, 80) and frame_lengths.shape == (0,)


@pytest.mark.parametrize("content", ["square", "impulse", "quiet"])
def test_matches_reference_on_extreme_signals(backend, device, content):
    x = torch.zeros(1, 1600, dtype=torch.float64)
    if content == "square":
        x[:] = torch.where(torch.arange(1600) % 80 < 40, 1.0, -1.0)
    elif content == "impulse":
        x[0, 700] = 1
    else:
        x = voice(1, 1600) * 2.0**-15
    lengths = torch.tensor([1600], device=device)
    spec = spkfast.frontend("wespeaker", mean_norm=False)
    assert_parity(ops.log_mel_fbank, (x.to(device), lengths), backend=backend, spec=spec)


@pytest.mark.parametrize("content", ["silence", "dc", "denormal"])
def test_signals_without_energy_give_the_floor(backend, device, content):
    value = {"silence": 0.0, "dc": 0.25, "denormal": 1e-40}[content]
    x = torch.full((1, 1600), value, device=device)
    features, _ = ops.log_mel_fbank(x, spec=spkfast.frontend("3dspeaker", mean_norm=False), backend=backend)
    torch.testing.assert_close(features, torch.full_like(features, math.log(2**-23)), atol=1e-5, rtol=0)


def test_row_alone_equals_row_in_batch(backend, device):
    x = voice(2, 2000).float().to(device)
    lengths = torch.tensor([2000, 1333], device=device)
    features, frame_lengths = ops.log_mel_fbank(x, lengths, spec=WESPEAKER, backend=backend)
    for row, length in enumerate(lengths.tolist()):
        alone, frames = ops.log_mel_fbank(x[row : row + 1, :length], spec=WESPEAKER, backend=backend)
        assert frames.item() == frame_lengths[row].item() == alone.shape[1]
        assert torch.equal(alone[0], features[row, : alone.shape[1]])
        assert (features[row, alone.shape[1] :] == 0).all()


def test_non_contiguous_input(backend, device):
    x = voice(2, 1000).float().to(device)
    lengths = torch.tensor([[1000, 0], [900, 0]], device=device)[:, 0]
    want = ops.log_mel_fbank(x, lengths.contiguous(), spec=WESPEAKER, backend=backend)
    got = ops.log_mel_fbank(x.T.contiguous().T, lengths, spec=WESPEAKER, backend=backend)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_samples_past_the_end_do_not_count(backend, device):
    x = voice(2, 2000).float().to(device)
    lengths = torch.tensor([2000, 1111], device=device)
    dirty = x.clone()
    dirty[1, 1111:] = math.nan
    found = []
    for waveforms in (x, dirty):
        waveforms.requires_grad_()
        features, _ = ops.log_mel_fbank(waveforms, lengths, spec=WESPEAKER, backend=backend)
        found.append((features.detach(), *torch.autograd.grad(features.square().sum(), waveforms)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert (found[0][1][1, 1111:] == 0).all()


def test_int16_is_divided_by_32768(backend, device):
    samples = (voice(2, 1000) * 32000).round().to(torch.int16).to(device)
    got, _ = ops.log_mel_fbank(samples, spec=WESPEAKER, backend=backend)
    want, _ = ops.log_mel_fbank(samples.float() / 32768, spec=WESPEAKER, backend=backend)
    assert torch.equal(got, want)


def test_autocast_changes_nothing(device):
    x = voice(1, 2000).float().to(device)
    for backend in ("auto", "reference"):
        found = []
        for enabled in (False, True):
            waveforms = x.clone().requires_grad_()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
                features, _ = ops.log_mel_fbank(waveforms, spec=WESPEAKER, backend=backend)
            found += [features, *torch.autograd.grad(features.square().sum(), waveforms)]
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


# Independent oracles ------------------------------------------------------------------------------------------------


def kaldi_native_fbank(spec: spkfast.FrontendSpec, samples: np.ndarray) -> Tensor:
    knf = pytest.importorskip("kaldi_native_fbank", reason="kaldi-native-fbank is not installed")
    options = knf.FbankOptions()
    frame, mel = options.frame_opts, options.mel_opts
    frame.dither, frame.samp_freq, frame.window_type = 0.0, spec.sample_rate, spec.window.replace("hann", "hanning")
    frame.frame_length_ms, frame.frame_shift_ms = spec.frame_length_ms, spec.frame_shift_ms
    frame.preemph_coeff, frame.remove_dc_offset = spec.preemphasis, spec.remove_dc
    mel.num_bins, mel.low_freq, mel.high_freq = spec.n_mels, spec.f_min, spec.f_max
    options.use_energy = False
    fbank = knf.OnlineFbank(options)
    fbank.accept_waveform(spec.sample_rate, (samples * spec.sample_scale).tolist())
    fbank.input_finished()
    return torch.from_numpy(np.stack([fbank.get_frame(k) for k in range(fbank.num_frames_ready)]))


@pytest.mark.parametrize("name", ["wespeaker", "kaldi", "3dspeaker", "8k", "bare"])
def test_definition_matches_kaldi_native_fbank(name):
    spec = spkfast.FrontendSpec.from_dict({**SPECS[name].to_dict(), "mean_norm": False})
    x = voice(1, 16000).float()
    for implementation in ("reference", "auto"):
        features, _ = ops.log_mel_fbank(x, spec=spec, backend=implementation)
        want = kaldi_native_fbank(spec, x[0].numpy())
        torch.testing.assert_close(features[0], want, atol=3e-4, rtol=0)


def test_real_speech_matches_kaldi_native_fbank(speech):
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    path = sorted(speech.rglob("*.flac"))[0]
    samples, rate = soundfile.read(path, dtype="float32")
    spec = spkfast.frontend("wespeaker", mean_norm=False, sample_rate=rate)
    features, _ = ops.log_mel_fbank(torch.from_numpy(samples)[None], spec=spec)
    want = kaldi_native_fbank(spec, samples)
    loud = want.mean(dim=1) > math.log(1e3)  # in silent frames both are rounding noise
    assert loud.sum() > 50
    torch.testing.assert_close(features[0][loud], want[loud], atol=3e-4, rtol=0)


GOLDENS = [
    "kaldi_fbank23_default", "kaldi_fbank23_unscaled", "kaldi_fbank40", "kaldi_fbank40_20ms", "kaldi_fbank40_8k",
    "kaldi_fbank40_lowhigh", "kaldi_fbank40_nopow2", "kaldi_fbank80_20_7600", "kaldi_wespeaker_fbank60_cmn",
    "kaldi_wespeaker_fbank80_cmn", "kaldi_wespeaker_fbank80_edge", "wespeaker_processor_fbank80_var0",
    "3dspeaker_fbank80_mean0", "3dspeaker_fbank80_mean1",
]  # fmt: skip


def golden_spec(name: str, config: dict) -> spkfast.FrontendSpec:
    """Their options in our words; an option that is not listed here is an error, not a silent difference."""
    ours = {
        "num_mel_bins": "n_mels", "n_mels": "n_mels",
        "frame_length": "frame_length_ms", "frame_shift": "frame_shift_ms",
        "sample_frequency": "sample_rate", "window_type": "window", "low_freq": "f_min", "high_freq": "f_max",
        "scale": "sample_scale", "cmn": "mean_norm", "mean_nor": "mean_norm", "use_energy": "use_energy",
        "round_to_power_of_two": "round_to_power_of_two", "dither": "dither",
    }  # fmt: skip
    preset = name.split("_")[0]
    fields = {"n_mels": 23} if preset == "kaldi" else {}
    for key, value in config.items():
        if key not in ("energy_floor", "norm_var"):  # of the energy, which no golden here has; checked to be off
            fields[ours[key]] = int(value) if key == "sample_frequency" else value
    assert not config.get("norm_var")
    return spkfast.frontend(preset, **fields)


def golden_input(folder: Path, entry: dict) -> Tensor:
    recipes = {"1600 zeros": lambda x: x, "1600 times 0.25": lambda x: x + 0.25}
    if entry["recipe"] in recipes:
        return recipes[entry["recipe"]](torch.zeros(1, 1600))
    if "impulse" in entry["recipe"] or "1.0 at index 700" in entry["recipe"]:
        return torch.zeros(1, 1600).index_fill(1, torch.tensor([700]), 1.0)
    samples = np.load(folder / entry["file"])[entry["key"]].reshape(1, -1)
    return torch.from_numpy(samples[:, slice(*entry.get("slice", (None,)))]).float() / 32768


@pytest.mark.parametrize("name", GOLDENS)
def test_matches_goldens(golden, name):
    about = json.loads((golden / "frontends" / f"{name}.json").read_text())
    arrays = np.load(golden / "frontends" / f"{name}.npz")
    spec = golden_spec(name, about["config"])
    for case in about["cases"]:
        x = golden_input(golden, case["inputs"][0])
        for implementation in ("reference", "auto"):
            features, _ = ops.log_mel_fbank(x, spec=spec, backend=implementation)
            for output in case["outputs"]:
                if name.startswith("wespeaker") and output == "fbank":
                    continue  # before their mean is taken off; `cmvn` is what comes out of the front-end
                want = torch.from_numpy(arrays[f"{case['case']}__{output}"])
                assert features[0].shape == want.shape, (case["case"], output)
                # The two implementations behind the goldens differ by as much, in the bins of lowest energy.
                torch.testing.assert_close(features[0], want, atol=3e-4, rtol=0)


# Gradients ----------------------------------------------------------------------------------------------------------


class Formula(torch.autograd.Function):
    """The definition with its gradient formula, so that gradcheck looks at the formula."""

    @staticmethod
    def forward(ctx, *args):
        ctx.args = args
        return reference.log_mel_fbank(*args)

    @staticmethod
    def backward(ctx, grad, _):
        return (reference.log_mel_fbank_backward(grad, *ctx.args), *[None] * 10)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mean_norm": True, "sample_scale": 3.0},
        {"remove_dc": False, "preemphasis": 0.0, "round_to_power_of_two": False},
        {"n_fft": 27, "round_to_power_of_two": False, "mean_norm": True},
    ],
    ids=str,
)
def test_gradient_formula(fields):
    spec = spkfast.FrontendSpec.from_dict({**TINY.to_dict(), "sample_scale": 1.0, **fields})
    x = torch.randn(2, 44, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    args = arguments(spec, x.detach(), torch.tensor([44, 35]))
    assert torch.autograd.gradcheck(lambda x: Formula.apply(x, *args[1:])[0], (x,))


def test_gradient_below_the_floor_is_zero(backend, device):
    x = torch.zeros(1, 800, device=device, requires_grad=True)
    features, _ = ops.log_mel_fbank(x, spec=WESPEAKER, backend=backend)
    features.sum().backward()
    assert (x.grad == 0).all()


def test_second_derivative_is_refused(backend, device):
    x = voice(1, 400).float().to(device).requires_grad_()
    features, _ = ops.log_mel_fbank(x, spec=SPECS["kaldi"], backend=backend)
    (gradient,) = torch.autograd.grad(features.square().sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="no second derivative here: use backend='reference'"):
        gradient.sum().backward()


# Registration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(backend, device, transposed):
    x = voice(2, 60).float().to(device)
    x = x.T.contiguous().T if transposed else x
    lengths = torch.tensor([60, 40], device=device)
    op = torch.ops.spkfast.log_mel_fbank if backend == "native" else torch.ops.spkfast.log_mel_fbank_triton
    args = arguments(TINY, x, lengths)
    torch.library.opcheck(op, args)
    torch.library.opcheck(op, (x.detach().requires_grad_(), *args[1:]))
    grad = torch.randn(2, 4, 5, device=device)
    torch.library.opcheck(torch.ops.spkfast.log_mel_fbank_backward, (grad, *args))


def test_schemas_repeat_the_definition():
    for name in ("log_mel_fbank", "log_mel_fbank_backward"):
        schema = torch._C._get_schema(f"spkfast::{name}", "")
        inferred = torch._C.parse_schema(
            name + torch.library.infer_schema(getattr(reference, name), mutates_args=()).replace("SymInt", "int")
        )
        have = [(a.name, str(a.type)) for a in schema.arguments]
        assert have == [(a.name, str(a.type)) for a in inferred.arguments]
        assert [str(r.type) for r in schema.returns] == [str(r.type) for r in inferred.returns]


def test_compiles_and_exports_whole():
    layer = spkfast.nn.Fbank(WESPEAKER)
    x, lengths = voice(2, 4000).float(), torch.tensor([4000, 3000])
    compiled = torch.compile(layer, fullgraph=True)
    found = []
    for function in (layer, compiled):
        waveforms = x.clone().requires_grad_()
        features, frames = function(waveforms, lengths)
        found.append((features.detach(), frames, *torch.autograd.grad(features.square().sum(), waveforms)))
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager)

    batch, samples = torch.export.Dim("batch"), torch.export.Dim("samples", min=560)
    program = torch.export.export(layer, (x, lengths), dynamic_shapes=({0: batch, 1: samples}, {0: batch}))
    x, lengths = voice(3, 5123).float(), torch.tensor([5123, 5000, 399])
    for have, want in zip(program.module()(x, lengths), layer(x, lengths), strict=True):
        assert torch.equal(have, want)


# Messages -----------------------------------------------------------------------------------------------------------


def bad(waveforms: Tensor, lengths: list[int] | Tensor | None = None, match: str = "", **options) -> None:
    if isinstance(lengths, list):
        lengths = torch.tensor(lengths)
    with pytest.raises(spkfast.InputError, match=match):
        ops.log_mel_fbank(waveforms, lengths, **{"spec": WESPEAKER, **options})


def test_error_messages():
    x = torch.zeros(2, 800)
    bad(x[0], match=r"waveforms must have shape \(B, S\), got \(800,\)")
    bad(x.half(), match="waveforms must be float32, float64 or int16, got torch.float16")
    bad(x, torch.ones(2), match="lengths must be int64 counts of samples, got torch.float32")
    bad(x, [800], match=r"lengths must have shape \(B,\) = \(2,\), got \(1,\)")
    bad(x, [800, 801], match=r"lengths must lie in 0\.\.800, row 1 has 801")
    bad(x, [-1, 800], match=r"lengths must lie in 0\.\.800, row 0 has -1")
    bad(x, backend="fast", match="backend must be one of auto, reference, native, triton, got 'fast'")
    bad(x.double(), backend="native", match="cannot run log_mel_fbank on cpu: it computes in float32")
    odd = spkfast.frontend("wespeaker", round_to_power_of_two=False)
    bad(x, spec=odd, backend="native", match="FFT sizes that are powers of two, the front-end has 400")
    bad(x, spec=spkfast.frontend("wespeaker", log="db"), match="computes log='ln' only, the front-end asks for 'db'")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_samples_are_named(value):
    x = torch.zeros(3, 800)
    x[1, 77] = value
    bad(x, match="waveforms row 1 holds a NaN or infinite value at sample 77")
    features, _ = ops.log_mel_fbank(x, spec=WESPEAKER, validate=False)
    assert not features[1, 0].isfinite().all() and features[[0, 2]].isfinite().all()


def test_sums_that_overflow_are_no_bad_samples():
    features, _ = ops.log_mel_fbank(torch.full((1, 800), 3e38), spec=SPECS["3dspeaker"], backend="reference")
    assert features.shape == (1, 3, 80)


def test_kernel_checks_its_arguments():
    args = list(arguments(WESPEAKER, torch.zeros(2, 800), torch.tensor([800, 800])))
    wrong = {
        1: (torch.tensor([800, 801]), r"lengths must lie in 0\.\.800, row 1 has 801"),
        2: (torch.zeros(600), "window must have 1 to fft_size = 512 samples, got 600"),
        3: (torch.zeros(80, 256), r"mel must have shape \(any, 257\), got \(80, 256\)"),
        4: (0, "frame_shift must be positive, got 0"),
        5: (400, r"mel must have shape \(any, 201\), got \(80, 257\)"),
    }
    for position, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            torch.ops.spkfast.log_mel_fbank(*args[:position], value, *args[position + 1 :])
    with pytest.raises(ValueError, match="waveforms must be Float, got Double"):
        torch.ops.spkfast.log_mel_fbank(args[0].double(), *args[1:])


def test_other_fft_sizes_run_on_the_reference():
    spec = spkfast.frontend("wespeaker", round_to_power_of_two=False)
    x = voice(1, 2000).float()
    assert torch.equal(ops.log_mel_fbank(x, spec=spec)[0], ops.log_mel_fbank(x, spec=spec, backend="reference")[0])
