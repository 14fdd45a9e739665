"""What a TensorRT build decides: shapes of profiles, flags, sizes that batches are padded to, where engines may run."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest

from spkfast.errors import InputError
from spkfast.export.tensorrt_plan import (
    Bucket,
    Machine,
    Profile,
    TensorInfo,
    choose_bucket,
    differences,
    in_units,
    make_sidecar,
    parity_cases,
    parity_limit,
    plan_build,
    read_onnx,
    read_sidecar,
    shortest,
    sidecar_path,
    step_in_units,
    timing_cache_file,
    version_of,
)
from tests.fixtures import tensorrt_graphs

MACHINE = Machine("NVIDIA H100 80GB HBM3", "9.0", "11.4.0.106", "13.0", "580.1")


def info_of(tmp_path: Path, *args: Any, **kwargs: Any) -> Any:
    return read_onnx(tensorrt_graphs.write(tmp_path / "model.onnx", *args, **kwargs))[0]


def test_waveform_graph_is_read(tmp_path: Path) -> None:
    info = info_of(tmp_path)
    assert info.inputs == (TensorInfo("waveform", "float32", (-1, -1)), TensorInfo("lengths", "int64", (-1,)))
    assert info.outputs == (TensorInfo("embedding", "float32", (-1, 3)),)
    assert info.metadata["model_hash"] == "abc" and len(info.sha256) == 64


def test_profiles_are_samples_of_a_waveform_graph(tmp_path: Path) -> None:
    plan = plan_build(info_of(tmp_path), profiles=[Profile((1, 4, 8), (0, 1.5, 10))])
    assert plan.profiles == ({"waveform": ((1, 400), (4, 24000), (8, 160000)), "lengths": ((1,), (4,), (8,))},)


def test_profiles_are_frames_of_a_features_graph(tmp_path: Path) -> None:
    plan = plan_build(info_of(tmp_path, "features", lengths=False), profiles=[Profile((1, 1, 1), (0, 1.5, 10))])
    # Frames of 25 ms each 10 ms: (24000 - 400) / 160 + 1 and (160000 - 400) / 160 + 1.
    assert plan.profiles == ({"feats": ((1, 1, 80), (1, 148, 80), (1, 998, 80))},)


def test_default_profiles_serve_one_utterance_and_batches(tmp_path: Path) -> None:
    one, many = plan_build(info_of(tmp_path)).profiles
    assert one["waveform"] == ((1, 400), (1, 48000), (1, 320000))
    assert many["waveform"] == ((2, 400), (32, 48000), (64, 320000))


def test_units(tmp_path: Path) -> None:
    waveform = info_of(tmp_path).metadata
    features = info_of(tmp_path, "features").metadata
    assert (shortest(waveform), shortest(features)) == (400, 1)
    assert (step_in_units(waveform, 0.5), step_in_units(features, 0.5), step_in_units(features, 1e-4)) == (8000, 50, 1)
    assert (in_units(waveform, 0), in_units(features, 0)) == (400, 1)


def test_flags(tmp_path: Path) -> None:
    info = info_of(tmp_path, "features")
    plain = plan_build(info)
    assert (plain.set_flags, plain.clear_flags) == ((), ("TF32",))
    asked = plan_build(info, tf32=True, exact=True, version_compatible=True)
    assert set(asked.set_flags) == {"TF32", "DISTRIBUTIVE_INDEPENDENCE", "VERSION_COMPATIBLE"}
    assert asked.clear_flags == ()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"tf32": True}, "tf32 ruins the front-end"),
        ({"profiles": []}, "profiles must hold one"),
        ({"optimization_level": 6}, "optimization_level must be 0 to 5, got 6"),
        ({"optimization_level": True}, "optimization_level must be 0 to 5, got True"),
        ({"workspace_bytes": 0}, "workspace_bytes must be a positive integer or None, got 0"),
        ({"hardware_compatibility": "ampere"}, "did you mean 'ampere_plus'"),
    ],
    ids=str,
)
def test_unfit_settings_are_refused(tmp_path: Path, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        plan_build(info_of(tmp_path), **settings)


@pytest.mark.parametrize(
    ("batch", "seconds"),
    [
        ((1, 1), (0, 1, 2)),
        ((0, 1, 2), (0, 1, 2)),
        ((2, 1, 2), (0, 1, 2)),
        ((1, 1, 1.5), (0, 1, 2)),
        ([1, 1, 1], (0, 1, 2)),
        ((1, 1, 2), (0, 3, 2)),
        ((1, 1, 1), (0, 0, 0)),
        ((1, 1, 1), (0, 1, float("nan"))),
        ((1, 1, 1), (0, 1, float("inf"))),
    ],
    ids=str,
)
def test_profiles_must_rise(batch: Any, seconds: Any) -> None:
    with pytest.raises(InputError, match=r"of a profile must be \(min, opt, max\) in rising order"):
        Profile(batch, seconds)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"precision": "int8", "target": "cpu"}, "int8 graph for 'cpu'.*export it with target='tensorrt'"),
        ({"precision": "int8"}, "int8 graph for 'an unknown target'"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"batch": 1}, r"batch and length of 'waveform', and they alone, must be dynamic, got \(1, -1\)"),
    ],
    ids=str,
)
def test_graphs_that_cannot_be_built_are_refused(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        info_of(tmp_path, **changes)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tensorrt_graphs.write(tmp_path / "model.onnx")
    model = onnx.load(path)
    model.graph.input[0].name = "audio"
    onnx.save(model, path)
    with pytest.raises(InputError, match=r"inputs must be 'waveform' or 'feats'.*got audio, lengths and 1 outputs"):
        read_onnx(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(InputError, match="metadata has no 'inputs': export the model"):
        read_onnx(path)
    path.write_bytes(b"no graph")
    with pytest.raises(InputError, match="no readable ONNX file"):
        read_onnx(path)
    with pytest.raises(InputError, match="no readable ONNX file"):
        read_onnx(tmp_path / "missing.onnx")


@pytest.mark.parametrize(
    ("batch", "length", "bucket"),
    [
        (1, 400, Bucket(0, 1, 8000)),
        (1, 8001, Bucket(0, 1, 16000)),
        (1, 319999, Bucket(0, 1, 320000)),
        (2, 8000, Bucket(1, 2, 8000)),
        (33, 8000, Bucket(1, 64, 8000)),
        (64, 320000, Bucket(1, 64, 320000)),
        (65, 8000, None),
        (1, 320001, None),
    ],
)
def test_batches_are_padded_within_the_profile_that_fits_closest(
    tmp_path: Path, batch: int, length: int, bucket: Bucket | None
) -> None:
    profiles = plan_build(info_of(tmp_path)).profiles
    assert choose_bucket(profiles, batch, length, 8000) == bucket
    backwards = choose_bucket(profiles[::-1], batch, length, 8000)
    assert backwards == (None if bucket is None else bucket._replace(profile=1 - bucket.profile))


def test_lengths_below_a_profile_are_padded_to_it(tmp_path: Path) -> None:
    profiles = plan_build(info_of(tmp_path), profiles=[Profile((3, 5, 6), (1, 2, 2.3))]).profiles
    assert choose_bucket(profiles, 1, 400, 8000) == Bucket(0, 3, 16000)
    assert choose_bucket(profiles, 5, 35000, 8000) == Bucket(0, 6, 36800)


def test_without_lengths_only_rows_are_added(tmp_path: Path) -> None:
    info = info_of(tmp_path, "features", lengths=False)
    profiles = plan_build(info, profiles=[Profile((1, 4, 8), (1, 2, 3))]).profiles
    assert choose_bucket(profiles, 3, 123, 50) == Bucket(0, 4, 123)
    assert choose_bucket(profiles, 3, 97, 50) is None and choose_bucket(profiles, 3, 299, 50) is None


def test_parity_covers_the_corners_of_a_profile(tmp_path: Path) -> None:
    one, many = plan_build(info_of(tmp_path)).profiles
    assert [case.lengths for case in parity_cases(one)] == [(400,), (320000,), (48000,)]
    assert [case.lengths for case in parity_cases(many)] == [
        (400,) * 2, (320000,) * 2, (400,) * 64, (48000,) * 4, (400, 16266, 32133, 48000)
    ]  # fmt: skip
    assert parity_limit("fp32", False) < parity_limit("fp32", True) == parity_limit("fp16", False)


def test_versions_and_timing_cache_names() -> None:
    assert version_of("10.13.3.9.post1") == (10, 13, 3, 9) and version_of("11.4") > version_of("11.3.0.99")
    name = timing_cache_file("cache", MACHINE)
    assert name == Path("cache/NVIDIA_H100_80GB_HBM3-sm9.0-trt11.4.0.106-cuda13.0.timing")
    others = ({"gpu": "NVIDIA H200"}, {"capability": "8.0"}, {"tensorrt": "11.4.0.107"}, {"cuda": "12.9"})
    assert len({timing_cache_file("cache", dataclasses.replace(MACHINE, **other)) for other in others} | {name}) == 5


def facts_of(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    info = info_of(tmp_path)
    plan = plan_build(info, **settings)
    facts = make_sidecar(info, plan, MACHINE, b"plan", list(info.inputs), list(info.outputs))
    engine = tmp_path / "model.plan"
    engine.write_bytes(b"plan")
    sidecar_path(engine).write_text(json.dumps(facts))
    return read_sidecar(engine)


def test_sidecar_keeps_what_it_was_given(tmp_path: Path) -> None:
    facts, info = facts_of(tmp_path, exact=True), info_of(tmp_path)
    assert facts["inputs"] == list(info.inputs) and facts["outputs"] == list(info.outputs)
    assert facts["profiles"] == list(plan_build(info).profiles) and facts["machine"] == MACHINE
    assert facts["metadata"] == info.metadata and facts["onnx_sha256"] == info.sha256
    assert (facts["tf32"], facts["exact"], facts["precision"], facts["model_hash"]) == (False, True, "fp32", "abc")
    assert facts["spec_hash"] == tensorrt_graphs.SPEC.hash
    assert differences(facts, MACHINE, facts["engine_sha256"], info.sha256) == []


@pytest.mark.parametrize(
    ("settings", "here", "lines"),
    [
        ({}, {"gpu": "NVIDIA H200"}, ["built on NVIDIA H100 80GB HBM3, here is NVIDIA H200"]),
        ({}, {"driver": "570", "cuda": "12.8"}, []),
        ({}, {"tensorrt": "11.4.0.107"}, ["built for TensorRT 11.4.0.106, here is 11.4.0.107"]),
        ({"version_compatible": True}, {"tensorrt": "12.0"}, []),
        ({"version_compatible": True}, {"tensorrt": "11.3"}, ["built for TensorRT 11.4.0.106 or newer, here is 11.3"]),
        ({"hardware_compatibility": "same_compute_capability"}, {"gpu": "NVIDIA H200"}, []),
        (
            {"hardware_compatibility": "same_compute_capability"},
            {"capability": "8.9"},
            ["built for compute capability 9.0, here is 8.9"],
        ),
        ({"hardware_compatibility": "ampere_plus"}, {"gpu": "NVIDIA A10", "capability": "8.6"}, []),
        (
            {"hardware_compatibility": "ampere_plus"},
            {"capability": "7.5"},
            ["built for compute capability 8.0 and above, here is 7.5"],
        ),
        ({}, {"capability": "10.0", "gpu": "NVIDIA B200"}, [
            "built for compute capability 9.0, here is 10.0", "built on NVIDIA H100 80GB HBM3, here is NVIDIA B200"
        ]),
    ],
    ids=str,
)  # fmt: skip
def test_where_an_engine_may_run(
    tmp_path: Path, settings: dict[str, Any], here: dict[str, str], lines: list[str]
) -> None:
    facts = facts_of(tmp_path, **settings)
    assert differences(facts, dataclasses.replace(MACHINE, **here), facts["engine_sha256"]) == lines


def test_another_file_is_noticed(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    assert differences(facts, MACHINE, "0", "1") == [
        "the file is not the one that its .json describes", "it was built from another ONNX file"
    ]  # fmt: skip


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 1}', '{"format": 2}', "missing"])
def test_damaged_facts_are_refused(tmp_path: Path, damage: str) -> None:
    facts_of(tmp_path)
    path = sidecar_path(tmp_path / "model.plan")
    path.unlink() if damage == "missing" else path.write_text(damage)
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_sidecar(tmp_path / "model.plan")
