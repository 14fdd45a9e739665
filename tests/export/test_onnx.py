"""ONNX files: onnxruntime gives what PyTorch gives, at any length and precision; what they say of themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import spkfast
from spkfast import InputError, SpeakerEncoder
from spkfast.export import onnx as exporter
from spkfast.export import to_onnx
from spkfast.export.graph import EmbeddingGraph
from spkfast.export.onnx_checks import sensitive_in_half, types_of, unsupported_by_tensorrt
from spkfast.export.onnx_edit import emulated
from spkfast.reference.tdnn_layer import weight_as_multiplied
from tests.export.conftest import DIALECTS, relative_errors, voice

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

# A dialect at a size that takes seconds every day, all of them at a published size in the long run.
SIZES = [(name, 32) for name in DIALECTS] + [pytest.param(name, 512, marks=pytest.mark.full) for name in DIALECTS]
# In narrow networks less rounding averages out.
HALF = [("wespeaker", 128, "fp16"), ("speechbrain", 128, "bf16")]
HALF += [pytest.param(name, 512, kind, marks=pytest.mark.full) for name in DIALECTS for kind in ("fp16", "bf16")]
# Each of what exports differ by; every export takes seconds.
VARIANTS = [("speechbrain", {}), ("taoruijie", {}), ("espnet", {}), ("wespeaker", {"layout": "equal"})]
VARIANTS += [("wespeaker", {"layout": "ragged"}), ("wespeaker", {"inputs": "features"})]
VARIANTS += [
    pytest.param(name, options, marks=pytest.mark.full)
    for name in ("speechbrain", "taoruijie")
    for options in ({"layout": "equal"}, {"inputs": "features", "layout": "padded"}, {"precision": "fp16"})
]


def pairs(count: int, most_seconds: float, seed: int = 0) -> list[list[int]]:
    """Lengths of random batches, from the shortest legal utterance on, evenly over their logarithm."""
    rng = np.random.default_rng(seed)
    batches = [np.exp(rng.uniform(np.log(400), np.log(16000 * most_seconds), rng.integers(1, 5))) for _ in range(count)]
    found = [[int(length) for length in batch] for batch in batches]
    found[0], found[1] = [400], [int(16000 * most_seconds), 400]
    return found


def run(session, waveforms: list[np.ndarray], layout: str = "padded") -> torch.Tensor:
    rows = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in waveforms], batch_first=True)
    rows = rows.masked_fill(torch.arange(rows.shape[1]) >= torch.tensor([[len(w)] for w in waveforms]), torch.nan)
    lengths = torch.tensor([len(row) for row in waveforms])
    return torch.from_numpy(session.run(None, exporter.feed(rows, lengths, "waveform", layout))[0])


@pytest.fixture(scope="module")
def written(encoders, tmp_path_factory):
    """Each graph exported once: its report and the model."""
    made = {}

    def get(dialect: str, channels: int, **options):
        key = (dialect, channels, *((name, value) for name, value in options.items() if name != "calibration"))
        if key not in made:
            path = tmp_path_factory.mktemp("onnx") / "model.onnx"
            report = to_onnx(encoders(dialect, channels), path, validate=not options, **options)
            made[key] = report, onnx.load(path)
        return made[key]

    return get


@pytest.mark.parametrize(("dialect", "channels"), SIZES)
def test_equals_pytorch_at_any_batch_and_length(encoders, written, dialect, channels):
    report, model = written(dialect, channels)
    session = exporter.session(model)
    worst = 0.0
    for k, lengths in enumerate(pairs(40, 60)):
        waveforms = [voice(17 * k + i, length) for i, length in enumerate(lengths)]
        have, want = run(session, waveforms), encoders(dialect, channels).embed_batch(waveforms)
        assert have.isfinite().all()
        worst = max(worst, float(relative_errors(have, want).max()))
    assert worst < 1e-4
    assert report.within_bounds and report.max_error < 1e-4 and report.min_cosine > 1 - 1e-6


@pytest.mark.parametrize("options", [{"layout": "equal"}, {"inputs": "features", "layout": "equal"}, {}])
def test_frames_that_fill_up_a_multiple_do_not_count(tmp_path, options):
    spec = spkfast.frontend("titanet")
    assert spec.pad_frames_to == 16
    torch.manual_seed(0)
    network = spkfast.models.create("ecapa_tdnn", channels=16, feature_dim=spec.output_size)
    encoder = SpeakerEncoder(network, spec, device="cpu")
    path = tmp_path / "model.onnx"
    assert to_onnx(encoder, path, **options).max_error < 1e-5
    waveforms = [voice(0, 16000), voice(1, 7001)]
    have, want = SpeakerEncoder.load(path).embed_batch(waveforms), encoder.embed_batch(waveforms)
    assert relative_errors(have, want).max() < 1e-5


@pytest.mark.parametrize(("dialect", "channels", "precision"), HALF)
def test_half_precision_equals_pytorch(encoders, written, dialect, channels, precision):
    report, model = written(dialect, channels, precision=precision)
    # Runtimes on a CPU lack its products; every tensor is rounded as if it were kept so.
    session = exporter.session(emulated(model), exact=True)
    cosines = []
    for k, lengths in enumerate(pairs(40, 10)):
        waveforms = [voice(17 * k + i, length) for i, length in enumerate(lengths)]
        have, want = run(session, waveforms), encoders(dialect, channels).embed_batch(waveforms)
        assert have.isfinite().all()
        cosines += torch.cosine_similarity(have.double(), want.double()).tolist()
    # With random weights ESPnet's attention, which no tanh bounds, takes one frame for another at 8 bits.
    random_choice = (dialect, precision) == ("espnet", "bf16")
    assert 0.9995 < (np.median(cosines) if random_choice else min(cosines)) < 1 - 1e-9
    assert report.opset == (22 if precision == "bf16" else 18)
    kinds = set(report.types.values())
    assert {"fp16": "float16", "bf16": "bfloat16"}[precision] in kinds and "float32" in kinds


@pytest.mark.parametrize(("dialect", "target"), [*zip(DIALECTS, ("cpu", "tensorrt", "cpu", "tensorrt"), strict=True)])
def test_int8_multiplies_the_bytes_of_the_definition(encoders, written, dialect, target):
    audio = [voice(seed, 48000) for seed in range(200, 208)]
    model = written(dialect, 64, precision="int8", target=target, calibration=audio)[1]
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    graph = EmbeddingGraph(encoders(dialect, 64))
    for name, module in graph.network.encoder.named_modules():
        weight = f"network.encoder.{name}.weight"
        if f"{weight}/int8" not in constants:
            continue
        layer = name.removesuffix(".conv").replace(".", "/")
        found = (constants[f"network/encoder/{layer}/conv/Conv_0/{part}"] for part in ("scale", "zero"))
        scale, zero = map(float, found)
        step = constants.get(f"network/encoder/{layer}/Relu_0/scale")
        low, high = (0, 255) if target == "cpu" else (-128, 127)

        def coarse(_, inputs, scale=scale, zero=zero, low=low, high=high):
            return (((inputs[0] / scale).round() + zero).clamp(low, high) - zero) * scale

        def bounded(_, inputs, output, step=step):
            return output if step is None else (output / float(step)).round().clamp(0, 255) * float(step)

        module.register_forward_pre_hook(coarse)
        module.register_forward_hook(bounded)
        module.weight.data = weight_as_multiplied(module.weight, "int8")
    waveforms = [voice(300 + seed, 40000) for seed in range(8)]
    with torch.no_grad():
        want = graph(torch.from_numpy(np.stack(waveforms)))
    have, exact = run(exporter.session(model), waveforms), encoders(dialect, 64).embed_batch(waveforms)
    # What lies half-way between two bytes may be rounded up here and down there, and then go its own way.
    assert relative_errors(have, want).median() < relative_errors(want, exact).median() / 3


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_int8_equals_pytorch_on_speech(mini, speech, tmp_path, target):
    files = sorted(speech.rglob("*.flac"))[::30]
    report = to_onnx(mini, tmp_path / "model.onnx", precision="int8", target=target, calibration=files[::2])
    have, want = (encoder.embed_batch(files[1::2]) for encoder in (SpeakerEncoder.load(report.path), mini))
    assert 0.995 < torch.cosine_similarity(have.double(), want.double()).min() < 1 - 1e-6
    assert report.within_bounds and report.min_cosine > 0.995


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_row_of_a_ragged_batch_equals_the_utterance_alone(written, dialect):
    waveforms = [voice(seed, length) for seed, length in enumerate((400, 48000, 401, 1000, 16000, 31999))]
    session = exporter.session(written(dialect, 32)[1])
    together = run(session, waveforms)
    alone = torch.cat([run(session, [waveform]) for waveform in waveforms])
    assert relative_errors(together, alone).max() < 1e-5


def test_layouts_and_inputs_agree(encoders, written):
    encoder = encoders("wespeaker")
    waveforms = [voice(seed, 20000) for seed in range(3)]
    want = encoder.embed_batch(waveforms)
    signatures = {
        "padded": {"waveform": ("float32", ("B", "S")), "lengths": ("int64", ("B",))},
        "equal": {"waveform": ("float32", ("B", "S"))},
        "ragged": {"waveform": ("float32", ("N",)), "lengths": ("int32", ("B",)), "longest": ("float32", ("S",))},
    }
    for layout, signature in signatures.items():
        report, model = written("wespeaker", 32, layout=layout)
        assert report.inputs == signature
        assert relative_errors(run(exporter.session(model), waveforms, layout), want).max() < 1e-5
    for layout in ("equal", "padded"):
        report, model = written("wespeaker", 32, inputs="features", layout=layout)
        assert report.outputs == {"embs": ("float32", ("B", 192))}
        assert report.inputs["feats"] == ("float32", ("B", "T", 80)) and ("lengths" in report.inputs) == (
            layout == "padded"
        )
        features, counts = encoder._features(waveforms, "auto")
        fed = exporter.feed(features + 3.0, counts, "features", layout)  # means are taken in the graph, too
        have = torch.from_numpy(exporter.session(model).run(None, fed)[0])
        assert relative_errors(have, want).max() < 1e-5


def test_ragged_layout_takes_utterances_of_any_lengths(encoders, written):
    waveforms = [voice(seed, length) for seed, length in enumerate((48000, 400, 16001, 401))]
    have = run(exporter.session(written("wespeaker", 32, layout="ragged")[1]), waveforms, "ragged")
    assert relative_errors(have, encoders("wespeaker").embed_batch(waveforms)).max() < 1e-5


def test_forms_of_the_front_end_agree(encoders, written):
    waveforms = [voice(0, 20000), voice(1, 400)]
    have = run(exporter.session(written("wespeaker", 32, form="matmul")[1]), waveforms)
    assert relative_errors(have, encoders("wespeaker").embed_batch(waveforms)).max() < 1e-5


@pytest.mark.parametrize(("dialect", "options"), VARIANTS)
def test_tensorrt_has_all_operators(written, dialect, options):
    report, model = written(dialect, 32, **options)
    assert report.unsupported == ()
    # No shape depends on values, and no loop runs over time.
    assert not {"NonZero", "Unique", "Compress", "Loop", "Scan", "If", "LSTM", "GRU"} & set(report.operators)
    assert all(tensor.data_type != onnx.TensorProto.DOUBLE for tensor in model.graph.initializer)
    assert "BatchNormalization" not in report.operators


def test_int8_graphs_quantise_convolutions_alone(written):
    audio = [voice(seed, 48000) for seed in range(200, 208)]
    convolutions = 1 + 3 * 9 + 1  # stem, blocks, aggregation
    for dialect, target, kind in (("wespeaker", "cpu", "uint8"), ("speechbrain", "tensorrt", "int8")):
        report, model = written(dialect, 64, precision="int8", target=target, calibration=audio)
        quantised = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        # The input, and for a CPU what comes out of the ReLU; the weight is bytes.
        each = 2 if target == "cpu" else 1
        assert len(quantised) == each * convolutions
        assert report.operators["DequantizeLinear"] == (each + 1) * convolutions
        assert {report.types[node.output[0]] for node in quantised} == {kind}
        assert not any(part in node.name for node in quantised for part in ("/se", "pooling", "projector", "frontend"))
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for node in quantised:
            assert constants[node.input[1]].shape == () and constants[node.input[1]] > 0
            assert target == "cpu" or constants[node.input[2]] == 0
        scales = [value for name, value in constants.items() if name.endswith("conv.weight/scale")]
        assert len(scales) == convolutions and all(value.ndim == 1 and len(value) > 1 for value in scales)
        assert (report.unsupported == ()) == (target == "tensorrt") and report.metadata["target"] == target


def test_int8_is_what_the_kernels_compute(mini, speech, tmp_path):
    files = sorted(speech.rglob("*.flac"))[::40]
    encoder = SpeakerEncoder.load("ecapa-mini", device="cpu")
    encoder.calibrate(files[::2])
    to_onnx(encoder, tmp_path / "model.onnx", precision="int8", validate=False)
    have = SpeakerEncoder.load(tmp_path / "model.onnx").embed_batch(files[1::2]).double()
    exact = mini.embed_batch(files[1::2]).double()
    encoder.precision = "int8"
    kernels = encoder.embed_batch(files[1::2]).double()
    # The same bytes are multiplied; between the layers kernels keep bfloat16, the graph float32.
    far = 1 - torch.cosine_similarity(kernels, exact)
    assert (1 - torch.cosine_similarity(have, kernels)).mean() < far.mean()


def test_audit_finds_what_must_not_be_half():
    helper, half, single = onnx.helper, onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT

    def model(*nodes, result=single):
        graph = helper.make_graph(
            list(nodes),
            "g",
            [helper.make_tensor_value_info("x", single, ["B", 4])],
            [helper.make_tensor_value_info("y", result, ["B", 4])],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])

    def found(*nodes, **options):
        made = model(*nodes, **options)
        return sensitive_in_half(made, types_of(made))

    narrow, widen = (
        helper.make_node("Cast", [a], [b], f"{b}_cast", to=t) for a, b, t in (("x", "h", half), ("k", "y", single))
    )
    relu = helper.make_node("Relu", ["h"], ["k"], "network/encoder/relu")
    assert found(narrow, relu, widen) == []
    softmax = helper.make_node("Softmax", ["h"], ["k"], "network/pooling/softmax")
    assert found(narrow, softmax, widen) == ["h: Softmax network/pooling/softmax", "k: Softmax network/pooling/softmax"]
    relu.name = "network/projector/relu"
    assert len(found(narrow, relu, widen)) == 2
    log = helper.make_node("Log", ["w"], ["y"], "log")
    back = helper.make_node("Cast", ["h"], ["w"], "back", to=single)
    assert found(narrow, back, log) == ["h: comes before a logarithm"]
    relu.output[0] = "y"
    assert "y: output" in found(narrow, relu, result=half)
    mixed = helper.make_node("Add", ["x", "h"], ["y"], "mixed")
    with pytest.raises(ValueError, match="the ONNX graph is invalid"):
        found(narrow, mixed)


def test_a_sensitive_tensor_in_half_ends_the_export(encoders, tmp_path, monkeypatch):
    from spkfast.export import graph

    plain = graph._plain

    def careless(model, precision):
        network = plain(model, precision)
        network.projector.to(torch.float16)
        network.projector.register_forward_pre_hook(lambda _, inputs: inputs[0].half())
        return network

    monkeypatch.setattr(graph, "_plain", careless)
    with pytest.raises(RuntimeError, match=r"network/projector"):
        to_onnx(encoders("wespeaker"), tmp_path / "model.onnx", precision="fp16")
    assert not list(tmp_path.iterdir())


def test_operators_that_tensorrt_lacks_are_told():
    helper = onnx.helper
    nodes = [
        helper.make_node("NonZero", ["x"], ["n"], "n"),
        helper.make_node("Cast", ["x"], ["d"], "d", to=onnx.TensorProto.DOUBLE),
        helper.make_node("ReduceSum", ["x", "axes"], ["y"], "sum"),
    ]
    single, long = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    inputs = [helper.make_tensor_value_info("x", single, ["B"]), helper.make_tensor_value_info("axes", long, [1])]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", single, ["n"])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    integers = helper.make_node("MatMul", ["axes", "axes"], ["m"], "integers")
    model.graph.node.append(integers)
    assert unsupported_by_tensorrt(model, types_of(model))[-1] == "MatMul integers: int64"
    model.graph.node.remove(integers)
    assert unsupported_by_tensorrt(model, types_of(model)) == [
        "NonZero n: not in the operator table",
        "Cast d: float64",
        "ReduceSum sum: axes are no constant",
    ]


def test_emulation_rounds_as_half_precision_does():
    helper, half, single = onnx.helper, onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    weight = np.float16([1.001, -3.3, 0.1, 7.7])
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], "narrow", to=half),
        helper.make_node("Mul", ["h", "w"], ["m"], "mul"),
        helper.make_node("Add", ["m", "w"], ["a"], "add"),
        helper.make_node("Cast", ["a"], ["y"], "widen", to=single),
    ]
    value = lambda name: helper.make_tensor_value_info(name, single, ["B", 4])  # noqa: E731
    graph = helper.make_graph(nodes, "g", [value("x")], [value("y")], [onnx.numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    x = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    (have,) = exporter.session(emulated(model), exact=True).run(None, {"x": x})
    np.testing.assert_array_equal(have, (x.astype(np.float16) * weight + weight).astype(np.float32))


def test_metadata_tell_what_the_file_is(encoders, mini, written, tmp_path):
    report = to_onnx(mini, tmp_path / "mini.onnx", validate=False)
    facts = report.metadata
    stored = onnx.load(tmp_path / "mini.onnx").metadata_props
    assert {prop.key: prop.value for prop in stored} == facts
    assert spkfast.FrontendSpec.from_dict(json.loads(facts["frontend"])) == mini.frontend
    assert facts["spec_hash"] == mini.frontend.hash and facts["model_hash"] == mini.fingerprint
    assert json.loads(facts["threshold"])["value"] == mini.threshold.value
    assert (facts["sample_rate"], facts["embedding_dim"], facts["min_samples"]) == ("16000", "192", "400")
    assert (report.checked, report.max_error, report.within_bounds) == ((), None, None)
    # What sherpa-onnx ends the program without.
    for dialect, framework, scaled in (("wespeaker", "wespeaker", "0"), ("speechbrain", None, None)):
        facts = written(dialect, 32, inputs="features")[0].metadata
        assert facts.get("framework") == framework and facts.get("normalize_samples") == scaled
        assert all(facts[key] for key in ("output_dim", "sample_rate", "language"))
    assert facts["spec_hash"] == encoders("speechbrain").frontend.hash
    assert written("wespeaker", 32, inputs="features")[0].metadata["feature_normalize_type"] == "global-mean"
    assert "framework" not in written("wespeaker", 32)[0].metadata


def test_nodes_are_named_by_module_and_nothing_private_is_kept(written):
    model = written("wespeaker", 32)[1]
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert "network/encoder/blk1/res/0/conv/Conv_0" in names and any(name.startswith("frontend/Conv") for name in names)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert ".py" not in str(model.graph.node) and not model.functions
    assert model.ir_version == 8  # which onnxruntime of 2022 reads


@pytest.mark.parametrize("dialect", ["wespeaker", "taoruijie"])
def test_strange_inputs_give_finite_embeddings(written, dialect):
    session = exporter.session(written(dialect, 32)[1])
    rng = np.random.default_rng(0)
    square = np.sign(rng.standard_normal(16000)).astype(np.float32)  # full scale
    for waveform in (square, np.zeros(16000, np.float32), np.ones(16000, np.float32), square[:400]):
        assert run(session, [waveform]).isfinite().all()
    # A row without samples is defined, and leaves the others alone.
    rows, lengths = np.stack([square, square]), np.array([16000, 0])
    (both,) = session.run(None, {"waveform": rows, "lengths": lengths})
    assert np.isfinite(both).all()
    np.testing.assert_allclose(both[0], run(session, [square])[0], rtol=0, atol=1e-4 * np.abs(both[0]).max())
    # Lengths outside of the batch are the nearest inside.
    (clamped,) = session.run(None, {"waveform": rows, "lengths": np.array([10**9, -5])})
    np.testing.assert_allclose(clamped, both, rtol=0, atol=1e-5 * np.abs(both).max())
    # What is not a number spreads in its own row alone.
    rows[1, 100] = np.nan
    (nan,) = session.run(None, {"waveform": rows, "lengths": np.array([16000, 16000])})
    assert np.isfinite(nan[0]).all() and np.isnan(nan[1]).all()


@pytest.mark.full
def test_ten_minutes(encoders, written):
    waveform = voice(0, 16000 * 600)
    have = run(exporter.session(written("wespeaker", 32)[1]), [waveform])
    # Twice the bound of an export: onnxruntime sums the 60,000 frames of each bin plainly, for their mean.
    assert relative_errors(have, encoders("wespeaker").embed_batch([waveform])).max() < 2e-4


def test_report_counts_what_is_no_number(encoders, tmp_path, monkeypatch):
    class Spoilt:
        calls = 0

        def run(self, names, values):
            self.calls += 1
            found = np.array(session.run(names, values))
            return found * (np.nan if self.calls == 2 else 1)

    session, spoilt = None, Spoilt()

    def spoil(model, **options):
        nonlocal session
        session = make(model, **options)
        return spoilt

    make = exporter.session
    monkeypatch.setattr(exporter, "session", spoil)
    report = to_onnx(encoders("wespeaker"), tmp_path / "model.onnx", inputs="features")
    assert (report.max_error, report.min_cosine, report.within_bounds) == (np.inf, -1, False)


def test_calibration_on_what_is_no_speech_is_seen(mini, tmp_path):
    silence = [np.zeros(48000, np.float32)]
    report = to_onnx(mini, tmp_path / "model.onnx", precision="int8", calibration=silence)
    assert report.within_bounds is False and report.min_cosine < 0.9


def test_wrong_arguments_are_told(encoders, tmp_path):
    encoder, path = encoders("wespeaker"), tmp_path / "model.onnx"
    for options, message in (
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"inputs": "wave"}, "unknown inputs 'wave'.*waveform"),
        ({"layout": "flat"}, "unknown layout 'flat'"),
        ({"target": "gpu"}, "unknown target 'gpu'"),
        ({"inputs": "features", "layout": "ragged"}, "a ragged batch is one of waveforms"),
        ({"opset": 17}, "opset must be from 18 to 25 for precision 'fp32', got 17"),
        ({"precision": "bf16", "opset": 18}, "opset must be from 22 to 25 for precision 'bf16', got 18"),
        ({"precision": "int8", "calibration": []}, "calibration must be a list of utterances"),
        ({"calibration": ["a.wav"]}, "calibration is for precision 'int8', got 'fp32'"),
        ({"precision": "int8"}, "needs calibration: encoder.stem has no range of 'in'; give audio as calibration"),
    ):
        with pytest.raises(InputError, match=message):
            to_onnx(encoder, path, **options)
    with pytest.raises(InputError, match="is a folder, or in none that is there"):
        to_onnx(encoder, tmp_path)
    with pytest.raises(InputError, match="is a folder, or in none that is there"):
        to_onnx(encoder, tmp_path / "none" / "model.onnx")
    foreign = SpeakerEncoder(torch.nn.Linear(80, 4), "wespeaker")
    with pytest.raises(InputError, match=r"precision 'fp16' needs a network of spkfast\.models"):
        to_onnx(foreign, path, precision="fp16")
    assert not path.exists()


def test_the_encoder_stays_as_it_was(encoders, tmp_path):
    encoder = encoders("wespeaker")
    before = encoder.fingerprint, encoder.embed(voice(0, 16000))
    audio = [voice(seed, 16000) for seed in range(4)]
    for options in ({"precision": "bf16"}, {"precision": "int8", "calibration": audio}):
        to_onnx(encoder, tmp_path / "model.onnx", validate=False, **options)
    assert encoder.fingerprint == before[0] and torch.equal(encoder.embed(voice(0, 16000)), before[1])
    assert all(not layer.input_ranges for layer in spkfast.nn.inference.inference_layers(encoder.model).values())
