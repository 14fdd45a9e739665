"""Fixtures of every test: data found through the environment, devices, backends, and what a machine must have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Triton reads these when it is first imported. Without a GPU its kernels run interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA

REQUIREMENTS = (
    "speech", "golden", "nvcc", "triton", "cuda", "tensorrt", "tensorrt-bindings", "openvino", "onnxruntime-cpp",
)  # fmt: skip


def required() -> list[str]:
    """What ``SPKFAST_REQUIRE`` says this machine has: a comma list of :data:`REQUIREMENTS`."""
    return [name.strip() for name in os.environ.get("SPKFAST_REQUIRE", "").split(",") if name.strip()]


def require(name: str, condition: bool, reason: str) -> None:
    """Skips the test where ``condition`` is false; fails it where ``SPKFAST_REQUIRE`` lists ``name``."""
    if condition:
        return
    if name in required():
        pytest.fail(f"SPKFAST_REQUIRE lists {name}: {reason}")
    pytest.skip(reason)


def pytest_configure(config: pytest.Config) -> None:
    unknown = [name for name in required() if name not in REQUIREMENTS]
    if unknown:
        raise pytest.UsageError(f"SPKFAST_REQUIRE knows {', '.join(REQUIREMENTS)}, got {', '.join(unknown)}")


@pytest.fixture(scope="session", autouse=True)
def _allocator_as_delivered() -> Iterator[None]:
    """What keeps freed memory does so for good, and so would all tests after it that run in the same process.

    For the whole run, since fixtures of a module come before those of its tests.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spkfast.memory._set_option", lambda option, value: None)
        yield


@pytest.fixture(name="require", scope="session")
def _require() -> Callable[[str, bool, str], None]:
    return require


@pytest.fixture(scope="session")
def speech() -> Path:
    """Folder of real speech."""
    return _folder("speech", "SPKFAST_SPEECH")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of numbers computed by other toolkits."""
    return _folder("golden", "SPKFAST_GOLDEN")


def _folder(name: str, variable: str) -> Path:
    path = os.environ.get(variable)
    require(name, bool(path), f"{variable} is not set")
    folder = Path(path or "")
    assert folder.is_dir(), f"{variable} names {folder}, which is not a folder"
    return folder


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that an op runs on."""
    if request.param == "cuda":
        require("cuda", torch.cuda.is_available(), "torch finds no CUDA device")
    return torch.device(request.param)


@pytest.fixture(params=["native", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Each fast backend of the op that the test file ``test_<op>.py`` is about."""
    from spkfast import backends, ops  # noqa: F401  ops loads the libraries

    try:
        return backends.resolve(device, request.param, request.path.stem.removeprefix("test_"))
    except ValueError as error:
        # Every machine that runs the tests has built the CPU library: its absence is a failure.
        if device.type == "cpu" and request.param == "native":
            raise
        require("triton" if request.param == "triton" else "nvcc", False, str(error))
        raise
