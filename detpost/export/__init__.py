"""One decode in every runtime: ONNX, compiled, packaged, captured, and the proof that they agree."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from detpost.export.artifact import OnnxExport
from detpost.export.attach import attach
from detpost.export.compiled import compile
from detpost.export.cuda_graph import CudaGraph
from detpost.export.onnx import to_onnx
from detpost.export.openvino import OpenVinoExport, OpenVinoModel, open_openvino, to_openvino
from detpost.export.package import OpenPackage, PackageExport, open_package, package

if TYPE_CHECKING:
    from detpost.verify import VerifyReport as VerifyReport
    from detpost.verify import verify as verify

# Stands above the formats, because it opens them; its public name stays here, and is looked up when it is used.
_COMPARISON = ("VerifyReport", "verify")

__all__ = [
    "CudaGraph",
    "OnnxExport",
    "OpenPackage",
    "OpenVinoExport",
    "OpenVinoModel",
    "PackageExport",
    "VerifyReport",
    "attach",
    "compile",
    "open_openvino",
    "open_package",
    "package",
    "to_onnx",
    "to_openvino",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _COMPARISON:
        return getattr(import_module("detpost.verify"), name)
    raise AttributeError(f"module 'detpost.export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
