"""The workloads of gpu_check for pooling: right by their own measure, and peers are timed beside a kernel."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from benchmarks import gpu_check

OPS = ("attentive_stats_pool", "attentive_stats_pool_from_hidden", "se_res2net_block", "tdnn_layer")


@pytest.mark.parametrize("op", OPS)
def test_the_definition_passes_and_a_wrong_result_does_not(op, monkeypatch):
    module = importlib.import_module(f"benchmarks.gpu.{op}")
    right = module.cases(torch.device("cpu"))
    wrong = [dataclasses.replace(case, run=lambda backend, case=case: 1.001 * case.run(backend)) for case in right]
    monkeypatch.setattr(module, "cases", lambda device: [*right, *wrong])
    loads = gpu_check._benchmark(f"{op}:reference", "cpu")["workloads"]
    assert [load["within_bound"] for load in loads] == [True] * len(right) + [False] * len(wrong)
    assert len({load["name"] for load in loads[: len(right)]}) == len(right)


@pytest.mark.parametrize("op", OPS)
def test_peers_are_timed_and_shown(op, monkeypatch):
    module = importlib.import_module(f"benchmarks.gpu.{op}")
    (case, *_) = module.cases(torch.device("cpu"))
    case = dataclasses.replace(case, peers={"itself": lambda: case.run("reference")})
    monkeypatch.setattr(module, "cases", lambda device: [case])
    (load,) = gpu_check._benchmark(f"{op}:reference", "cpu")["workloads"]
    assert load["peers_ms"]["itself"] > 0
    load |= {"median_ms": 2.0, "peers_ms": {"itself": 5.0}}
    kernel = gpu_check.Kernel(op, "native")
    tests = dict.fromkeys(("passed", "failed", "skipped"), 0)
    shown = gpu_check._summary(kernel, {"tests": tests, "verified": True, "error": "", "workloads": [load]})
    assert shown.endswith(", 2.50x itself")
