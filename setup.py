"""The C++: a library of kernels that no Python and no PyTorch is compiled into, and an extension that calls it quickly.

All else stands in pyproject.toml.
"""

import importlib.machinery
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# Setuptools wants paths relative to this file, and the same order everywhere.
ROOT = Path(__file__).parent
KERNELS = Path("detpost/kernels")
EXTENSION = "detpost._tensors"
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / KERNELS).rglob("*.cpp"))
HEADERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / KERNELS).rglob("*.h"))

# -ffp-contract and its like are part of the answer: every instruction level is held to the same bits.
COMPILE = [
    *("-O3", "-std=c++17", "-fvisibility=hidden", "-Wno-psabi"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]
LINK = ["-pthread"]
if sys.platform == "win32":
    # GCC does not align a Windows stack to 32 bytes and moves vectors there as if it did (its bug 54412). And a wheel
    # must not look for MinGW's own libraries on the user's machine.
    COMPILE = [*COMPILE, "-Wa,-muse-unaligned-vector-move"]
    LINK = ["-static"]


class BuildLibrary(build_ext):
    """Build a plain shared library, which ctypes loads under any CPython, and an extension for all from 3.11."""

    def finalize_options(self) -> None:
        """Take MinGW's compiler on Windows: the kernels are written with GCC's vector types, which MSVC has not."""
        if sys.platform == "win32" and self.compiler is None and shutil.which("g++"):
            self.compiler = "mingw32"
        super().finalize_options()

    def get_ext_filename(self, fullname: str) -> str:
        """Leave the interpreter's tag out of the name."""
        # Of the limited interface: its suffix says so, and an interpreter that has none passes it over.
        suffixes = importlib.machinery.EXTENSION_SUFFIXES
        limited = next((suffix for suffix in suffixes if ".abi3." in suffix), suffixes[-1])
        suffix = limited if EXTENSION.endswith(fullname) else suffixes[-1]
        return str(Path(*fullname.split("."))) + suffix

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Ask the library for no ``PyInit`` function: there is none."""
        return super().get_export_symbols(ext) if ext.name == EXTENSION else ext.export_symbols

    def get_libraries(self, ext: Extension) -> list[str]:
        """Leave out the library of this one interpreter, which Windows would link: the extension takes that of all."""
        return [*ext.libraries, "python3"] if ext.name == EXTENSION and sys.platform == "win32" else ext.libraries


class PlatformWheel(bdist_wheel):
    """Tag a wheel for its platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        """Give py3-none-PLATFORM."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        # Optional: without a compiler the package installs all the same, and NumPy and PyTorch do its work.
        Extension(
            "detpost.kernels.cpu._native",
            sources=SOURCES,
            depends=HEADERS,
            language="c++",
            extra_compile_args=[*COMPILE, "-pthread"],
            extra_link_args=LINK,
            optional=True,
        ),
        # Optional again: without Python's headers the kernels are called through ctypes.
        Extension(
            EXTENSION,
            sources=["detpost/_tensors.cpp"],
            depends=HEADERS,
            language="c++",
            extra_compile_args=["-O2", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off"],
            extra_link_args=LINK,
            py_limited_api=True,
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
