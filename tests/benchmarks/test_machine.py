"""A record tells generations of processors of one name apart."""

from __future__ import annotations

import platform

import pytest

from benchmarks.machine import cpu_name, describe_machine


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\n"
            "processor\t: 1\ncpu family\t: 6\nmodel\t\t: 1\nmodel name\t: Other\n",
            "AMD EPYC, family 25 model 17",
        ),
        ("processor\t: 0\nmodel name\t: ARMv8\n", "ARMv8"),
    ],
    ids=["first of two", "no family"],
)
def test_cpu_name_has_family_and_model(text, name, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    assert cpu_name(cpuinfo) == name


def test_cpu_name_without_cpuinfo(tmp_path):
    assert cpu_name(tmp_path / "none") == platform.processor()


def test_record_has_it():
    assert describe_machine()["cpu"] == cpu_name()
