"""Instruction levels of the CPU kernels: which one is chosen, and that no unit's instructions leak into another."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import spkfast
from spkfast import functional

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")
# Of AVX-512: wide registers, masks, and the upper half of the register file.
AVX512 = r"%zmm|%k[1-7]|%[xy]mm(1[6-9]|2[0-9]|3[01])"
# The rest of the x86 baseline knows no wide register at all.
WIDE = AVX512 + "|%ymm"
# Instructions that the highest level adds: products of bfloat16 numbers and of bytes.
DOTS = r"\bv(dpbf16ps|cvtne2?ps2?bf16|cvtneps2bf16|pdpbusd|pdpwssd)"
UNIT = r"_(avx2|avx512|avx512bf16)\.cpp\.o$"

# level() of a CPU that has what the variable FEATURES says.
_MAIN = """
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>
static int has(const char* feature) {
  return std::strstr(std::getenv("FEATURES"), feature) != nullptr;
}
#define __builtin_cpu_supports(feature) has(" " feature " ")
#include "cpu_level.cpp"
int main() {
  try {
    std::cout << spkfast::cpu::name(spkfast::cpu::level());
  } catch (const std::exception& error) {
    std::cout << error.what();
  }
}
"""
_AVX512 = "avx2 fma avx512f avx512bw avx512vl avx512dq"


def test_the_level_can_be_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPKFAST_CPU_LEVEL", raising=False)
    highest = spkfast.info()["cpu"]["level"]
    for level in LEVELS[: LEVELS.index(highest) + 1]:
        monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)
        assert spkfast.info()["cpu"]["level"] == level
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", "")
    assert spkfast.info()["cpu"]["level"] == highest


def test_every_level_runs_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    found = {}
    for level in LEVELS[:3]:
        monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)
        try:
            found[level] = functional.log_mel_fbank(x, spec=spkfast.frontend("kaldi"), backend="native")[0]
        except spkfast.InputError as error:
            assert "is above this CPU" in str(error)
    # Fused multiply-add and wider sums round differently; equal numbers would mean one code.
    assert "scalar" in found
    assert all(not torch.equal(found["scalar"], found[level]) for level in found if level != "scalar")


@pytest.mark.parametrize("level", ["avx1024", "AVX2", "avx", " avx2"])
def test_unknown_levels_are_refused(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setenv("SPKFAST_CPU_LEVEL", level)
    message = f"SPKFAST_CPU_LEVEL must be scalar, avx2, avx512 or avx512bf16, got '{level}'"
    with pytest.raises(spkfast.InputError, match=re.escape(message)):
        functional.log_mel_fbank(torch.zeros(1, 400), spec=spkfast.frontend("kaldi"), backend="native")


@pytest.fixture(scope="module")
def other_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("level")
    (folder / "main.cpp").write_text(_MAIN)
    command = [compiler, "-std=c++20", f"-I{ROOT / 'csrc/cpu'}", "main.cpp", "-o", "level"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "level"


@pytest.mark.parametrize(
    ("features", "highest"),
    [
        ("", "scalar"),
        ("avx2", "scalar"),  # a CPU without fused multiply-add
        ("avx2 fma", "avx2"),
        ("avx2 fma avx512f avx512dq", "avx2"),
        ("avx512f avx512bw avx512vl avx512dq", "scalar"),
        (_AVX512, "avx512"),
        (_AVX512 + " avx512bf16", "avx512"),
        (_AVX512 + " avx512bf16 avx512vnni", "avx512bf16"),
    ],
)
def test_levels_of_other_cpus(other_cpu: Path, features: str, highest: str) -> None:
    def level(wanted: str) -> str:
        env = {"FEATURES": f" {features} ", "SPKFAST_CPU_LEVEL": wanted}
        return subprocess.run([other_cpu], env=env, capture_output=True, text=True, check=True).stdout

    assert level("") == highest
    for wanted in LEVELS:
        if LEVELS.index(wanted) <= LEVELS.index(highest):
            assert level(wanted) == wanted
        else:
            assert level(wanted) == f"SPKFAST_CPU_LEVEL={wanted} is above this CPU, which has {highest}"


def objects() -> list[Path]:
    """Objects of the CPU kernels in the build folders that the install left here."""
    for tool in ("objdump", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    folders = [path.parent.parent for path in (ROOT / "build").glob("cmake-*/CMakeFiles/cpu_engines.dir/csrc")]
    found = [
        path
        for folder in folders
        for target in ("cpu_engines.dir", "_ops_cpu.dir", "_C.dir")
        for path in sorted((folder / target).rglob("*.o"))
        # Those of sources that are gone stay behind.
        if (ROOT / path.relative_to(folder / target)).with_suffix("").exists()
    ]
    if not found:
        pytest.skip("the package was built elsewhere: no objects under build/")
    return found


@functools.cache
def disassembly(path: Path) -> list[str]:
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "x86-64" not in text:
        pytest.skip("the objects are not of x86")
    return text.splitlines()


def instructions(path: Path, pattern: str) -> list[str]:
    """Instructions of an object that name one of these registers, or are of these names."""
    # Not the names of functions, which may hold anything.
    return [line for line in disassembly(path) if re.match(r"\s", line) and re.search(pattern, line.split("#")[0])]


def test_no_instruction_above_the_level_of_its_unit() -> None:
    found = {"avx2": 0, "avx512": 0, "avx512bf16": 0}
    for path in objects():
        unit = re.search(UNIT, path.name)
        if unit is None:
            assert instructions(path, WIDE) == [], path.name
            continue
        if unit[1] == "avx2":
            assert instructions(path, AVX512) == [], path.name
        if unit[1] != "avx512bf16":
            assert instructions(path, DOTS) == [], path.name
        found[unit[1]] += len(instructions(path, {"avx2": WIDE, "avx512": AVX512, "avx512bf16": DOTS}[unit[1]]))
    # Not because the search finds nothing anywhere.
    assert all(count > 100 for count in found.values()), found


def inner_loops(path: Path) -> list[tuple[str, list[str]]]:
    """Function and instructions of each loop without another jump inside."""
    found, function, lines = [], "", list[tuple[int, str]]()
    for text in disassembly(path):
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", text):
            function, lines = header[1], []
        elif match := re.match(r"\s+([0-9a-f]+):\s+(.*)$", text):
            lines.append((int(match[1], 16), match[2]))
            if jump := re.match(r"j\w+\s+([0-9a-f]+)\b", match[2]):
                body = [line for address, line in lines if address >= int(jump[1], 16)]
                if (
                    int(jump[1], 16) >= lines[0][0]
                    and body
                    and not any(re.match(r"j|call", line) for line in body[:-1])
                ):
                    found.append((function, body))
    return found


@pytest.mark.parametrize(
    ("unit", "kinds", "products"),
    [
        ("avx2", "Floats", r"vfmadd\w+ps .*%ymm"),
        ("avx512", "Floats", r"vfmadd\w+ps .*%zmm"),
        ("avx512bf16", "Floats", r"vfmadd\w+ps .*%zmm"),
        ("avx512bf16", "Bfloats", r"vdpbf16ps .*%zmm"),
        ("avx512bf16", "Bytes", r"vpdpbusd .*%zmm"),
    ],
)
def test_products_keep_their_sums_in_registers(unit: str, kinds: str, products: str) -> None:
    paths = [path for path in objects() if path.name == f"product_{unit}.cpp.o"]
    assert paths
    for path in paths:
        loops = [body for function, body in inner_loops(path) if re.search(rf"\b{kinds}\b", function)]
        sums = [(sum(bool(re.match(products, line)) for line in body), body) for body in loops]
        # The largest tile, beside others for what is left over.
        assert max((count for count, _ in sums), default=0) >= 12, f"{path.name}: no loop of {kinds} was found"
        for count, body in sums:
            if count:
                assert [line for line in body if re.search(r"%[re]?[sb]p\b", line)] == [], path.name


def test_units_of_a_level_define_nothing_that_others_could_use() -> None:
    # The linker keeps one copy of a weak symbol for all, which may be one with instructions that this CPU lacks.
    units = [path for path in objects() if re.search(r"_(scalar|avx2|avx512|avx512bf16)\.cpp\.o$", path.name)]
    assert {f"product_{level}.cpp.o" for level in LEVELS} <= {path.name for path in units}
    for path in units:
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        assert re.findall(r"^.* [WVu] .*$", symbols, re.MULTILINE) == [], path.name
