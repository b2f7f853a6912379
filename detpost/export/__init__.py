"""One decode in every runtime: ONNX, compiled, packaged, captured, and the proof that they agree.

Names are loaded when they are used: the command looks file endings up here and does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detpost.export.attachment import attach as attach
    from detpost.export.compiled import compile as compile
    from detpost.export.cuda_graph import CudaGraph as CudaGraph
    from detpost.export.front_graph import Resize as Resize
    from detpost.export.heads import KeypointHead as KeypointHead
    from detpost.export.heads import MaskHead as MaskHead
    from detpost.export.heads import OrientedHead as OrientedHead
    from detpost.export.layouts import LAYOUTS as LAYOUTS
    from detpost.export.layouts import Layout as Layout
    from detpost.export.onnx import to_onnx as to_onnx
    from detpost.export.openvino import OpenVinoModel as OpenVinoModel
    from detpost.export.openvino import open_openvino as open_openvino
    from detpost.export.openvino import to_openvino as to_openvino
    from detpost.export.packaged import OpenPackage as OpenPackage
    from detpost.export.packaged import open_package as open_package
    from detpost.export.packaged import package as package
    from detpost.export.written import WrittenFile as OnnxExport  # noqa: F401
    from detpost.export.written import WrittenFile as OpenVinoExport  # noqa: F401
    from detpost.export.written import WrittenFile as PackageExport  # noqa: F401
    from detpost.export.written import WrittenFile as WrittenFile
    from detpost.verify import VerifyReport as VerifyReport
    from detpost.verify import verify as verify

_HOMES = {
    "CudaGraph": "detpost.export.cuda_graph:CudaGraph",
    "KeypointHead": "detpost.export.heads:KeypointHead",
    "LAYOUTS": "detpost.export.layouts:LAYOUTS",
    "Layout": "detpost.export.layouts:Layout",
    "MaskHead": "detpost.export.heads:MaskHead",
    # Of version 0.1, which had a class for each format.
    "OnnxExport": "detpost.export.written:WrittenFile",
    "OpenPackage": "detpost.export.packaged:OpenPackage",
    "OpenVinoExport": "detpost.export.written:WrittenFile",
    "OpenVinoModel": "detpost.export.openvino:OpenVinoModel",
    "OrientedHead": "detpost.export.heads:OrientedHead",
    "PackageExport": "detpost.export.written:WrittenFile",
    # Stands above the formats, because it opens them; its public name stays here.
    "Resize": "detpost.export.front_graph:Resize",
    "VerifyReport": "detpost.verify:VerifyReport",
    "WrittenFile": "detpost.export.written:WrittenFile",
    "attach": "detpost.export.attachment:attach",
    "compile": "detpost.export.compiled:compile",
    "open_openvino": "detpost.export.openvino:open_openvino",
    "open_package": "detpost.export.packaged:open_package",
    "package": "detpost.export.packaged:package",
    "to_onnx": "detpost.export.onnx:to_onnx",
    "to_openvino": "detpost.export.openvino:to_openvino",
    "verify": "detpost.verify:verify",
}

__all__ = [
    "LAYOUTS",
    "CudaGraph",
    "KeypointHead",
    "Layout",
    "MaskHead",
    "OpenPackage",
    "OpenVinoModel",
    "OrientedHead",
    "Resize",
    "VerifyReport",
    "WrittenFile",
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
    if name in _HOMES:
        module, _, member = _HOMES[name].partition(":")
        return getattr(import_module(module), member)
    raise AttributeError(f"module 'detpost.export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
