"""Lets pip drive CMake; everything else is in pyproject.toml."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds every library with CMake, into the package folder (editable) or the wheel's."""

    def run(self) -> None:
        # The inherited method builds elsewhere and copies back only the files it knows by name.
        self.build_extensions()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # One CMake folder per output: a shared one would leave the other output's libraries stale.
        build = ROOT / "build" / f"cmake-{hashlib.sha256(str(output).encode()).hexdigest()[:8]}"
        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        if not any(shutil.which(name.split()[0]) for name in compilers):
            sys.exit(
                f"error: spkfast needs a C++20 compiler and found none ({', '.join(compilers)}): install g++ "
                "(Debian and Ubuntu: apt install g++) or name one in CXX"
            )
        ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
        try:
            subprocess.run(
                [
                    "cmake", "-S", ROOT, "-B", build, *ninja,
                    f"-DPython_EXECUTABLE={sys.executable}",
                    f"-DSPKFAST_OUTPUT={output}",
                    f"-DSPKFAST_CUDA={os.environ.get('SPKFAST_CUDA', 'auto')}",
                ],
                check=True,
            )  # fmt: skip
            subprocess.run(["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1)], check=True)
        except FileNotFoundError:
            sys.exit("error: spkfast is built with cmake, which is not on PATH: pip install cmake ninja")
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"error: building spkfast's libraries failed (exit status {error.returncode}), see the output above"
            )


setup(ext_modules=[Extension("spkfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
