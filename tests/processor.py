"""Which instructions and which kernels compute in this process, and which its environment asks for.

Four variables lower what a processor would use by itself. Each is read once, when its library starts, so every level
needs a process of its own: `make test-processors` makes them.
"""

import re
from collections.abc import Callable, Mapping

import torch

from detpost import select_top_k
from detpost.kernels.cpu import library

# What each variable can be set to, from the least instructions to the most; "" leaves the choice to the library.
LEVELS = {
    "DETPOST_NATIVE": ("baseline", "avx2", "avx512", ""),
    "DETPOST_KERNEL": ("native", "numpy", "aten", ""),
    "ONEDNN_MAX_CPU_ISA": ("SSE41", "AVX2", ""),
    "ATEN_CPU_CAPABILITY": ("default", ""),
}
WIDTHS = ("baseline", "avx2", "avx512")
_NATIVE = {"baseline": "baseline instructions", "avx2": "AVX2", "avx512": "AVX-512"}
_ATEN = {"baseline": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
_ONEDNN = {"baseline": "sse41", "avx2": "avx2", "avx512": "avx512_core"}
_ONEDNN_ASKS = {"SSE41": "baseline", "AVX2": "avx2", "": "avx512"}


def widest() -> str:
    """Name the widest of WIDTHS that this processor has."""
    if torch.cpu._is_avx512_supported():
        return "avx512"
    return "avx2" if torch.cpu._is_avx2_supported() else "baseline"


def expected(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Say what ought to compute in a process with such an environment; ``None`` where that part is not there."""
    native_asked = environment.get("DETPOST_NATIVE") or "avx512"
    aten_asked = "baseline" if environment.get("ATEN_CPU_CAPABILITY") == "default" else "avx512"
    onednn_asked = _ONEDNN_ASKS[environment.get("ONEDNN_MAX_CPU_ISA", "")]
    built = library.missing() is None
    on_x86 = torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported()
    return {
        "C++ kernels": _NATIVE[_least(native_asked)] if built else None,
        "form of the kernels": environment.get("DETPOST_KERNEL") or ("native" if built else "numpy"),
        "oneDNN": _ONEDNN[_least(onednn_asked)] if on_x86 else None,
        "PyTorch's operators": _ATEN[_least(aten_asked)] if on_x86 else None,
    }


def _least(asked: str) -> str:
    return min(asked, widest(), key=WIDTHS.index)


def in_use(printed: Callable[[], str]) -> dict[str, str | None]:
    """Find out what does compute in this process, by asking each library or by watching it compute.

    Args:
        printed: gives what the process has printed on its standard output since it was last asked.

    Returns:
        As :func:`expected`.
    """
    on_x86 = torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported()
    return {
        "C++ kernels": library.instructions() if library.missing() is None else None,
        "form of the kernels": _form(),
        "oneDNN": _onednn(printed) if on_x86 else None,
        "PyTorch's operators": torch.backends.cpu.get_cpu_capability() if on_x86 else None,
    }


def _form() -> str:
    """Tell the form of the kernels by what a selection runs."""
    scores = torch.rand(2, 5000)
    select_top_k(scores, 10)  # the first call looks for a library
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        select_top_k(scores, 10)
    ran = {event.name for event in profile.function_events}
    if any(name.startswith("detpost::native") for name in ran):
        return "native"
    return "aten" if ran & {"aten::topk", "aten::sort"} else "numpy"


def _onednn(printed: Callable[[], str]) -> str | None:
    """Tell oneDNN's instructions by the convolution that it says it ran."""
    printed()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        torch.nn.functional.conv2d(torch.rand(4, 16, 64, 64), torch.rand(16, 16, 3, 3))
    found = re.search(r",convolution,\w+:(sse41|avx2|avx512_core)", printed())
    return found[1] if found else None


def skipped(variable: str, value: str) -> str | None:
    """Say why a level is not worth a run on this machine; ``None`` where it is one of its own."""
    asked = {variable: value}
    if value in WIDTHS and WIDTHS.index(value) > WIDTHS.index(widest()):
        return f"this processor has no {_NATIVE[value]}"
    if (variable == "DETPOST_NATIVE" or value == "native") and (reason := library.missing()) is not None:
        return f"the C++ kernels are {reason}"
    if expected(asked) == expected({}):
        return "the same as it is"
    return None
