"""One decode in every runtime: ONNX, compiled, packaged, captured, and the proof that they agree."""

from detpost.export.artifact import OnnxExport
from detpost.export.attach import attach
from detpost.export.compiled import compile
from detpost.export.cuda_graph import CudaGraph
from detpost.export.onnx import to_onnx
from detpost.export.openvino import OpenVinoExport, OpenVinoModel, open_openvino, to_openvino
from detpost.export.package import OpenPackage, PackageExport, open_package, package
from detpost.export.verify import VerifyReport, verify

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
