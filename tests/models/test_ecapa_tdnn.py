"""ECAPA-TDNN of every dialect: numbers of the original toolkits, parameter counts, exact lengths, gradients, graphs."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spkfast
from spkfast import functional, models
from spkfast.errors import InputError
from spkfast.models.ecapa_tdnn import DIALECTS
from tests.models.golden import golden_weight

_FOLDER = Path(os.environ.get("SPKFAST_GOLDEN", ""))
_DIALECTS = [name for name in DIALECTS if name != "3dspeaker"]  # speechbrain by another name
# What keys cannot tell.
_OPTIONS: dict[str, dict[str, Any]] = {"wespeaker_ecapa_small_tstp": {"pooling": "tstp"}}


def golden_names(area: str) -> list[str]:
    """Entries of ECAPA models; one that cannot be found where there are no goldens, so that the skip has a reason."""
    names = sorted(path.stem for path in (_FOLDER / area).glob("*ecapa*.json")) if _FOLDER.parts else []
    return names or ["(none here)"]


def load_golden(folder: Path, name: str, **config: Any) -> tuple[models.SpeakerModel, dict[str, Any], Any]:
    """Model with the golden's weights in float64, its description and its arrays."""
    entry = json.loads((folder / f"{name}.json").read_text())
    arrays = np.load(folder / f"{name}.npz")
    state = {}
    for key, shape, rule in entry["state"]:
        if rule == "keep":
            if f"kept__{key}" in arrays:
                state[key] = torch.from_numpy(arrays[f"kept__{key}"])
        else:
            state[key] = torch.from_numpy(golden_weight(key, shape, rule))
    return models.from_state_dict(state, **_OPTIONS.get(name, {}), **config).double(), entry, arrays


def golden_input(golden: Path, entry: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Features in float64, and lengths where the case has some."""
    item, *rest = entry["inputs"]
    x = torch.from_numpy(np.load(golden / item["file"])[item["key"]]).double()
    if item["recipe"].startswith("waveform"):
        x = functional.log_mel_fbank(x / 32768, spec=spkfast.frontend("taoruijie"))[0]
    if not rest:
        return x, None
    if "feat_lengths" in rest[0]:
        return x, torch.tensor(rest[0]["feat_lengths"])
    relative = torch.tensor(rest[0]["lengths"], dtype=torch.float64)
    return x, (torch.arange(x.shape[1]) < relative[:, None] * x.shape[1]).sum(dim=1)


def randomized(dialect: str, seed: int = 0, **config: Any) -> models.SpeakerModel:
    """A small network with statistics that are not the trivial ones."""
    torch.manual_seed(seed)
    config = {"feature_dim": 20, "channels": 32, "embedding_dim": 24, "mfa_channels": 48, "scale": 4,
              "se_channels": 8, "attention_channels": 12, **config}  # fmt: skip
    model = models.create("ecapa_tdnn", dialect=dialect, **config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


@pytest.mark.filterwarnings("ignore:.*pass dilations")  # the goldens have the usual ones
@pytest.mark.parametrize("name", golden_names("models"))
def test_matches_the_toolkit(golden: Path, name: str) -> None:
    cases = 0
    for padding in ("exact", "batch"):
        model, entry, arrays = load_golden(golden / "models", name, padding=padding)
        for dtype in (torch.float64, torch.float32):
            model.eval().to(dtype)
            for case in entry["cases"]:
                features, lengths = golden_input(golden, case)
                if padding == "exact" and lengths is not None:
                    continue  # there the toolkit's embedding depends on the batch
                with torch.inference_mode():
                    got = model(features.to(dtype), lengths).numpy()
                want = arrays[f"{case['case']}__embedding"].reshape(got.shape)
                error = np.abs(got - want).max() / np.abs(want).max()
                floor = 10 * case["outputs"]["embedding"]["peer_float32_rel_err"]
                # In float64 nothing but the rounding of the stored numbers remains.
                assert error < (max(2e-5, floor) if dtype == torch.float32 else 1e-6), (padding, case["case"])
                cases += 1
    assert cases >= 2 * len(entry["cases"])


@pytest.mark.filterwarnings("ignore:.*pass dilations")
@pytest.mark.parametrize("name", golden_names("models_train"))
def test_training_step_matches_the_toolkit(golden: Path, name: str) -> None:
    """Output, gradients and batch-norm statistics of one forward and backward in training mode."""
    model, entry, arrays = load_golden(golden / "models_train", name, padding="batch")
    features, lengths = golden_input(golden, entry)
    features.requires_grad_()
    output = model.train()(features, lengths)
    scalar = output * torch.from_numpy(np.random.default_rng(12345).standard_normal(tuple(output.shape)))
    scalar.sum().backward()
    imported = models.import_state_dict({key: torch.zeros(shape) for key, shape, _ in entry["state"]})
    canonical = dict(imported.renamed)
    ours = {key: value.grad for key, value in model.named_parameters()}
    found = {
        "output": {"": output},
        "grad_input": {"": features.grad},
        "grad": ours,
        "after": dict(model.named_buffers()),
    }
    compared = 0
    for key in arrays:
        kind, _, theirs = key.partition("__")
        got = found[kind][canonical[theirs] if theirs else ""].detach().numpy().reshape(-1)
        stride = entry["thinned"][key]["stride"] if key in entry["thinned"] else 1
        want = arrays[key].reshape(-1)
        error = np.abs(got[::stride] - want).max()
        # A bias in front of batch norm has a gradient of rounding noise, so the bound has an absolute part.
        assert error < 2e-6 * np.abs(want).max() + 1e-6, key
        compared += kind in ("grad", "after")
    assert compared > 100


def test_parameter_counts() -> None:
    def count(**config: Any) -> int:
        return sum(p.numel() for p in models.create("ecapa_tdnn", **config).parameters())

    assert count(channels=512) == 6_190_720
    assert count(channels=1024) == 14_657_088
    assert count(channels=512, global_context=False) == 5_797_504
    assert count(channels=1024, global_context=False) == 14_263_872
    assert count(channels=1024, dialect="speechbrain") == 20_767_552
    assert count(channels=512, dialect="3dspeaker") == 6_194_048
    assert count(channels=[512, 512, 512, 512, 1536], kernel_sizes=[5, 3, 3, 3, 1], dilations=[1, 2, 3, 4, 1],
                 dialect="speechbrain") == 6_194_048  # fmt: skip
    assert count(channels=1024, dialect="espnet") == 14_658_112
    # The toolkit's 15,444,544 hold three buffers of its front-end and the weights of the 5994 classes aside.
    assert count(channels=1024, dialect="taoruijie") == 15_444_544


@pytest.mark.parametrize("dialect", _DIALECTS)
@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(5, 40))])
def test_row_of_padded_batch_equals_utterance_alone(dialect: str, seed: int) -> None:
    """200 batches of each dialect, over sizes and settings."""
    generator = np.random.default_rng(seed)
    kernel = int(generator.choice([3, 5]))
    model = randomized(
        dialect,
        seed,
        channels=[24, 32, 16, 32, 40] if seed % 3 == 0 and dialect == "speechbrain" else 32,
        mfa_channels=None if seed % 3 == 0 and dialect == "speechbrain" else 48,
        kernel_sizes=[5, kernel, kernel, 3],
        dilations=[1, *generator.integers(1, 5, 3).tolist()],
        groups=[1, 2, 2, 1] if seed % 2 else 1,
        global_context=bool(seed % 4),
        pooling=[None, "tstp", None, "mqmhastp"][seed % 4],
    )
    for _ in range(5):
        rows, frames = int(generator.integers(2, 5)), int(generator.integers(2, 70))
        lengths = torch.from_numpy(generator.integers(1, frames + 1, rows))
        lengths[int(generator.integers(rows))] = frames
        features = torch.randn(rows, frames, 20)
        for row, length in enumerate(lengths.tolist()):
            features[row, length:] = torch.nan  # whatever padding holds
        with torch.inference_mode():
            batch = model(features, lengths)
            for row, length in enumerate(lengths.tolist()):
                alone = model(features[row : row + 1, :length])[0]
                assert (batch[row] - alone).abs().max() / alone.abs().max() < 1e-5


@pytest.mark.parametrize("dialect", _DIALECTS)
def test_one_frame_and_none(dialect: str) -> None:
    model = randomized(dialect)
    features = torch.randn(3, 5, 20, requires_grad=True)
    embeddings = model(features, torch.tensor([5, 1, 0]))
    embeddings.square().sum().backward()
    assert embeddings.isfinite().all() and features.grad.isfinite().all()
    assert features.grad[1, 0].any() and not features.grad[1, 1:].any() and not features.grad[2].any()


def test_padding_at_the_end_of_the_batch_differs() -> None:
    features, lengths = torch.randn(2, 30, 20), torch.tensor([30, 20])
    for dialect in _DIALECTS:
        exact, batch = (randomized(dialect, padding=padding) for padding in ("exact", "batch"))
        with torch.inference_mode():
            assert torch.equal(exact(features), batch(features))
            assert torch.allclose(exact(features, lengths)[0], batch(features, lengths)[0], rtol=1e-5, atol=1e-6)
            assert not torch.allclose(exact(features, lengths)[1], batch(features, lengths)[1], rtol=1e-3)


@pytest.mark.parametrize("dialect", _DIALECTS)
def test_gradients(dialect: str) -> None:
    model = randomized(dialect, channels=8, mfa_channels=6, feature_dim=3, embedding_dim=4, se_channels=3,
                       attention_channels=3, dilations=(1, 2, 1, 2)).double()  # fmt: skip
    features = torch.randn(3, 9, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([9, 7, 5])
    # ReLU has a kink wherever a pre-activation is 0; none of these is near one.
    assert torch.autograd.gradcheck(lambda x: model(x, lengths), (features,), eps=1e-7, atol=1e-5, fast_mode=True)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 0.0  # else each evaluation would move the statistics
    assert torch.autograd.gradcheck(lambda x: model(x, lengths), (features,), eps=1e-7, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize(
    "dialect",
    ["speechbrain", *(pytest.param(name, marks=pytest.mark.full) for name in _DIALECTS if name != "speechbrain")],
)
def test_exports_with_dynamic_sizes(dialect: str) -> None:
    model = randomized(dialect)
    batch, frames = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("frames", min=2, max=4096)
    example = (torch.randn(3, 40, 20), torch.tensor([40, 30, 9]))
    program = torch.export.export(model, example, dynamic_shapes=({0: batch, 1: frames}, {0: batch})).module()
    with torch.no_grad():
        for rows, size in ((3, 40), (2, 7), (5, 61)):
            features, lengths = torch.randn(rows, size, 20), torch.randint(1, size + 1, (rows,))
            assert torch.allclose(program(features, lengths), model(features, lengths), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dialect", [pytest.param(name, marks=pytest.mark.full) for name in _DIALECTS])
def test_compiles_once_for_all_sizes(dialect: str) -> None:
    """With inductor; torch itself tells batches below 16 from larger ones, so these stay on one side."""
    model = randomized(dialect)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for number, (rows, size) in enumerate(((3, 40), (2, 7), (5, 61), (4, 90), (7, 33))):
            features, lengths = torch.randn(rows, size, 20), torch.randint(1, size + 1, (rows,))
            with torch._dynamo.config.patch(error_on_recompile=number >= 3):
                got = compiled(features, lengths)
            assert torch.allclose(got, model(features, lengths), rtol=1e-4, atol=1e-6)


def test_half_precision_of_long_rows() -> None:
    """Sums over many frames leave the range of float16, and lose in bfloat16, unless they are in float32."""
    features, lengths = torch.randn(2, 3000, 20), torch.tensor([3000, 2500])
    for dialect in _DIALECTS:
        model = randomized(dialect)
        with torch.no_grad():
            for i in range(1, 4):
                model.encoder.get_submodule(f"blk{i}.out.bn").bias.fill_(25)
            want = model(features, lengths)
            for dtype in (torch.float16, torch.bfloat16):
                got = copy.deepcopy(model).to(dtype)(features.to(dtype), lengths).float()
                assert nn.functional.cosine_similarity(got, want).min() > 0.99, (dialect, dtype)


def test_half_precision_is_near() -> None:
    features, lengths = torch.randn(3, 60, 20), torch.tensor([60, 31, 45])
    for dialect in _DIALECTS:
        model = randomized(dialect)
        with torch.inference_mode():
            want = model(features, lengths)
            with torch.autocast("cpu", torch.bfloat16):
                mixed = model(features, lengths).float()
            low = model.bfloat16()(features.bfloat16(), lengths).float()
        for got in (mixed, low):
            assert nn.functional.cosine_similarity(got, want).min() > 0.999


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"chanels": 64}, "did you mean 'channels'"),
        ({"channels": 63}, "multiple of scale=8"),
        ({"dialect": "wespeker"}, "did you mean 'wespeaker'"),
        ({"dilations": (1, 2)}, "must name the stem and each of the 3 blocks"),
        ({"kernel_sizes": (4, 3, 3, 3)}, "kernel_sizes must be odd"),
        ({"padding": "reflect"}, "padding must be 'exact' or 'batch'"),
        ({"pooling": "tsp"}, "did you mean 'tstp'"),
        ({"pooling": {"heads": 2}}, "pooling must be a name, or a mapping with one under 'name'"),
        ({"pooling": {"name": "mhastp", "bottleneck": 0}}, "bottleneck of pooling mhastp must be a positive integer"),
        ({"groups": 0}, "groups must be a positive integer"),
        ({"groups": 3}, "groups must divide 80 and 512 channels"),
        ({"attention_channels": 0}, "attention_channels must be a positive integer"),
        ({"pooling": {"name": "astp", "heads": 3}}, "unknown option 'heads'"),
        ({"embedding_dim": 0}, "embedding_dim must be a positive integer"),
    ],
)
def test_config_errors(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        models.create("ecapa_tdnn", **config)


def test_input_errors() -> None:
    model = randomized("wespeaker")
    with pytest.raises(InputError, match=r"features must have shape \(B, T, M\) with M = 20, got \(2, 20, 50\)"):
        model(torch.randn(2, 20, 50))
    with pytest.raises(InputError, match=r"lengths must be an int64 tensor of frames, got torch\.float32"):
        model(torch.randn(2, 50, 20), torch.tensor([1.0, 0.5]))
    with pytest.raises(InputError, match=r"features must be torch\.float32, as the weights are, got torch\.float64"):
        model(torch.randn(2, 50, 20).double())
    with pytest.raises(InputError, match="features must be a torch tensor, got ndarray"):
        model(np.zeros((2, 50, 20)))
    with pytest.raises(InputError, match="features must have at least one frame"):
        model(torch.randn(2, 0, 20))


@pytest.mark.parametrize("dialect", _DIALECTS)
@pytest.mark.parametrize("wrong", [51, -1, 160])
def test_lengths_outside_the_batch(dialect: str, wrong: int) -> None:
    with pytest.raises(InputError, match=rf"lengths must lie in 0..50, row 1 has {wrong}"):
        randomized(dialect)(torch.randn(2, 50, 20), torch.tensor([50, wrong]))


def test_weights_under_their_former_names_load() -> None:
    model = randomized("taoruijie")
    former = {}
    for name, value in model.state_dict().items():
        for old, new in (("projector.bn2.", "emb.bn."), ("projector.bn.", "post.bn."), ("projector.fc.", "emb.fc."),
                         ("pooling.", "asp."), ("encoder.", ""), (".in_.", ".in.")):  # fmt: skip
            name = name.replace(old, new)
        former[name] = value
    assert {"stem.conv.weight", "blk1.in.conv.weight", "asp.fc1.bias", "post.bn.weight", "emb.bn.bias"} <= set(former)
    other = randomized("taoruijie", seed=1)
    other.load_state_dict(former)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


def test_config_makes_the_same_network_again() -> None:
    for dialect in _DIALECTS:
        model = randomized(dialect, pooling={"name": "mhastp", "heads": 2} if dialect == "espnet" else None)
        again = models.create(model.name, **json.loads(json.dumps(model.config))).eval()
        again.load_state_dict(model.state_dict())
        features = torch.randn(2, 30, 20)
        assert again.config == model.config
        assert torch.equal(again(features), model(features))
