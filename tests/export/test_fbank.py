"""The front-end as a graph: equal to the op on every front-end, plain operators alone, and the same in onnxruntime."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import spkfast
from spkfast.export import FbankGraph
from spkfast.functional import log_mel_fbank
from tests.parity import FACTOR

PRESETS = (
    "kaldi", "wespeaker", "3dspeaker", "speechbrain", "taoruijie", "clova_l", "clova_v2", "vgg", "thin", "redimnet",
    "redimnet2", "titanet", "mfcc",
)  # fmt: skip
VARIANTS = {
    "centred hops": ("wespeaker", {"snip_edges": False}),
    "centred long hops": ("kaldi", {"snip_edges": False, "frame_shift_ms": 60.0, "drop_last_frame": True}),
    "raw energy": ("kaldi", {"use_energy": True}),
    "raw energy of padded frames": ("redimnet2", {"use_energy": True, "pad_mode": "reflect", "pad_samples": 300}),
    "energy after the window": ("kaldi", {"use_energy": True, "raw_energy": False, "htk_compat": True}),
    "energy of an odd DFT": ("clova_l", {"n_fft": 405, "use_energy": True, "raw_energy": False}),
    "cepstra with energy": ("mfcc", {"use_energy": True}),
    "odd DFT": ("wespeaker", {"n_fft": 401, "round_to_power_of_two": False, "center": True}),
    "means of zero-padded frames": ("wespeaker", {"center": True, "pad_mode": "constant", "drop_last_frame": True}),
    "centred without padding": ("kaldi", {"center": True, "pad_mode": "none", "n_fft": 600}),
    "hops past the frame": ("kaldi", {"frame_shift_ms": 40.0}),
    "instance norm": ("titanet", {"waveform_norm": "instance"}),
    "deviation without mean": ("wespeaker", {"mean_norm": False, "std_norm": True, "std_eps": 1.0}),
    "energy and floor": ("speechbrain", {"use_energy": True, "top_db": 20.0}),
    "no mean to hide one sample": ("taoruijie", {"mean_norm": False}),
    "frames in eights": ("wespeaker", {"pad_frames_to": 8}),
    "dither, which is left out": ("wespeaker", {"dither": 1.0}),
}
SPECS = {name: spkfast.frontend(name) for name in PRESETS}
SPECS |= {name: spkfast.frontend(preset, **fields) for name, (preset, fields) in VARIANTS.items()}
FORMS = ("conv", "matmul")
# What TensorRT reads without a plugin and onnxruntime runs on every device, as of ONNX opset 20.
OPERATORS = {
    "Abs", "Add", "And", "Cast", "Clip", "Concat", "Conv", "Div", "Equal", "Expand", "Gather", "GatherElements",
    "Greater", "Less", "LessOrEqual",
    "Log", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Pad", "Range", "ReduceMax", "ReduceMean",
    "ReduceSum", "Reshape", "Shape", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


def voice(batch: int, samples: int) -> Tensor:
    """Harmonics under a slow envelope with some noise, float64 (B, S), within [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(samples, dtype=torch.float64) / 16000
    f0 = 90 + 120 * torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    x = sum(torch.sin(2 * math.pi * f0 * k * t + k * k) / k for k in range(1, 20))
    x = 0.1 * x * (1 + torch.sin(2 * math.pi * 3 * t))
    return (x + 0.01 * torch.randn(batch, samples, generator=generator, dtype=torch.float64)).clamp(-1, 1)


def exact(waveforms: Tensor, lengths: Tensor | None, spec: spkfast.FrontendSpec) -> tuple[Tensor, Tensor]:
    return log_mel_fbank(waveforms.double(), lengths, spec=spec, backend="reference")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SPECS)
def test_is_the_op_in_float64(name, form):
    spec = SPECS[name]
    graph = FbankGraph(spec, form=form, dtype=torch.float64)
    for samples in {graph.min_samples, graph.min_samples + 1, 1501, 4000}:
        if samples < graph.min_samples:
            continue
        x = voice(6, samples)
        lengths = torch.tensor([samples, 0, 1, 2, (samples + 1) // 2, 401]).clamp_max(samples)
        dirty = x.masked_fill(torch.arange(samples) >= lengths[:, None], math.nan)
        for have, want in ((graph(dirty, lengths), exact(x, lengths, spec)), (graph(x), exact(x, None, spec))):
            torch.testing.assert_close(have, want, rtol=1e-8, atol=1e-8)


def unit(spec: spkfast.FrontendSpec) -> float:
    """One neper in units of the features."""
    return 10 / math.log(10) if spec.log == "db" else 1.0


@pytest.mark.parametrize("name", PRESETS)
def test_rounded_constants_cost_less_than_1e_4(name):
    x, lengths = voice(3, 16000), torch.tensor([16000, 9000, 2345])
    want, _ = exact(x, lengths, SPECS[name])
    have, _ = FbankGraph(SPECS[name]).double()(x, lengths)
    assert 0 < (have - want).abs().max() < 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PRESETS)
def test_float32_errs_by_less_than_1e_4(name, form):
    x, lengths = voice(3, 16000).float(), torch.tensor([16000, 9000, 2345])
    want, _ = exact(x, lengths, SPECS[name])
    have, _ = FbankGraph(SPECS[name], form=form)(x, lengths)
    assert have.dtype == torch.float32
    # The last thousandth holds bins far quieter than their frames, to which a product of float32 adds its rounding.
    assert (have - want).abs().quantile(0.999) < 1e-4 * unit(SPECS[name])
    if SPECS[name].num_ceps:
        return
    spec = dataclasses.replace(SPECS[name], mean_norm=False, std_norm=False, top_db=None)
    have, want = FbankGraph(spec, form=form)(x, lengths)[0].double(), exact(x, lengths, spec)[0]
    roundings = math.sqrt(spec.frame_length)  # of a sum of as many products
    if spec.log != "none":
        have, want = have / unit(spec), want / unit(spec)
        roundings += float(want.abs().max())  # of the logarithm
        have, want = have.exp(), want.exp()
    bound = torch.finfo(torch.float32).eps * roundings * want.amax(dim=-1, keepdim=True)
    assert ((have - want).abs() <= bound).all()


@pytest.mark.parametrize("name", PRESETS)
def test_float32_on_real_speech(name, speech):
    from spkfast.data.audio import read_audio

    files = sorted(speech.rglob("*.flac"))[::200]
    audio = [torch.from_numpy(read_audio(file)[0])[:32000] for file in files]
    lengths = torch.tensor([len(samples) for samples in audio])
    x = torch.nn.utils.rnn.pad_sequence(audio, batch_first=True)
    want, _ = exact(x, lengths, SPECS[name])
    plain = (log_mel_fbank(x, lengths, spec=SPECS[name], backend="reference")[0] - want).abs()
    error = (FbankGraph(SPECS[name])(x, lengths)[0] - want).abs()
    for part in (0.999, 1.0):
        assert error.quantile(part) <= FACTOR * plain.quantile(part)


def test_a_constant_beside_the_speech_costs_nothing():
    x = 0.01 * voice(1, 8000).float() + 0.5
    want, _ = exact(x, None, SPECS["kaldi"])
    assert (FbankGraph(SPECS["kaldi"])(x)[0] - want).abs().max() < 1e-3


def test_holds_nothing_but_constants():
    graph = FbankGraph(SPECS["wespeaker"])
    assert not graph.state_dict() and not list(graph.parameters())


def test_refuses_what_it_cannot_take():
    with pytest.raises(spkfast.InputError, match="form must be 'conv' or 'matmul', got 'fft'"):
        FbankGraph(SPECS["wespeaker"], form="fft")
    with pytest.raises(spkfast.InputError, match=r"dtype must be float32 or float64, got torch\.float16"):
        FbankGraph(SPECS["wespeaker"], dtype=torch.float16)
    graph = FbankGraph(SPECS["wespeaker"])
    assert graph.min_samples == 400
    for wrong in (torch.zeros(800), torch.zeros(1, 399), torch.zeros(1, 800, dtype=torch.float64)):
        with pytest.raises(spkfast.InputError, match=r"waveforms must be torch\.float32 of shape \(B, S\), S at least"):
            graph(wrong)


def dynamic_shapes(graph: FbankGraph, ragged: bool) -> tuple[dict[int, torch.export.Dim], ...]:
    batch = torch.export.Dim("batch", min=1, max=4096)
    # Two frames at least: torch.export takes sizes of 1 for constants. ONNX keeps no such bound.
    samples = torch.export.Dim("samples", min=graph.min_samples + graph.spec.frame_shift, max=10**7)
    return ({0: batch, 1: samples}, {0: batch}) if ragged else ({0: batch, 1: samples},)


@pytest.mark.parametrize("ragged", [True, False], ids=["lengths", "equal"])
@pytest.mark.parametrize("name", ["wespeaker", "taoruijie", "titanet"])
def test_exports_with_any_batch_and_length(name, ragged):
    graph = FbankGraph(SPECS[name])
    example = (voice(3, 3001).float(), torch.tensor([3001, 900, 2000]))[: 1 + ragged]
    program = torch.export.export(graph, example, dynamic_shapes=dynamic_shapes(graph, ragged))
    namespaces = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert "aten" in namespaces and "spkfast" not in namespaces
    x, lengths = voice(2, 5000).float(), torch.tensor([5000, 123])
    inputs = (x, lengths)[: 1 + ragged]
    torch.testing.assert_close(program.module()(*inputs), graph(*inputs))


# Everyday, one of each mechanism; each export takes seconds.
ONNX = [("wespeaker", "conv"), ("speechbrain", "conv"), ("taoruijie", "matmul"), ("redimnet2", "conv")]
ONNX += [
    pytest.param(name, form, marks=pytest.mark.full) for name in SPECS for form in FORMS if (name, form) not in ONNX
]


@pytest.mark.parametrize(("name", "form"), ONNX)
def test_onnxruntime(name, form):
    spec = SPECS[name]
    graph = FbankGraph(spec, form=form)
    for ragged in (True, False):
        session, model = onnx_session(graph, ragged)
        assert {node.op_type for node in model.graph.node} <= OPERATORS
        assert all(tensor.data_type != 11 for tensor in model.graph.initializer), "float64"
        shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.output]
        assert shapes[0][0] == "batch" and "samples" in shapes[0][1] and shapes[0][2] == spec.output_size
        for batch, samples in ((1, max(graph.min_samples, 2)), (2, 4001), (4, 16000)):
            x = voice(batch, samples).float()
            inputs = (x, torch.tensor([samples, samples // 2, 401, 0])[:batch].clamp_max(samples))[: 1 + ragged]
            have = [torch.from_numpy(array) for array in run(session, inputs)]
            want = exact(x, inputs[1] if ragged else None, spec)
            assert torch.equal(have[1], want[1]) and have[0].shape == want[0].shape
            assert (have[0] - want[0]).abs().quantile(0.999) < 1e-4 * unit(spec)


@pytest.mark.parametrize("name", ["wespeaker", "redimnet2"])
def test_onnxruntime_in_float64_is_the_module(name):
    # The convolution has no kernel of float64 there.
    graph = FbankGraph(SPECS[name], form="matmul", dtype=torch.float64)
    inputs = (voice(4, 8000), torch.tensor([8000, 4321, 401, 0]))
    features, frame_lengths = run(onnx_session(graph, ragged=True)[0], inputs)
    want = graph(*inputs)
    np.testing.assert_allclose(features, want[0], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(frame_lengths, want[1])


def onnx_session(graph: FbankGraph, ragged: bool):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    example = (voice(3, 5001).to(graph._mel.dtype), torch.tensor([5001, 900, 2000]))[: 1 + ragged]
    model = torch.onnx.export(
        graph.eval(),
        example,
        dynamo=True,
        dynamic_shapes=dynamic_shapes(graph, ragged),
        input_names=["waveforms", "lengths"][: 1 + ragged],
        output_names=["features", "frame_lengths"],
        verbose=False,
    ).model_proto
    onnx.checker.check_model(model, full_check=True)
    return runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]), model


def run(session, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    return session.run(None, {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs, strict=True)})
