"""What is installed, what is missing, and what that means."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from detpost.spec import DecodeSpec

__all__ = ["Part", "examine", "examine_file"]

_OPTIONAL = {
    "onnx": ("onnx", "ONNX export and attach"),
    "onnxscript": ("onnx", "PyTorch's newer ONNX exporter"),
    "onnxruntime": ("onnx", "running and verifying ONNX files"),
    "openvino": ("openvino", "OpenVINO export"),
    "transformers": ("hf", "transformers detectors and the tiny detector"),
    "safetensors": ("hf", "weights of transformers detectors"),
    "supervision": ("viz", "Detections.to_supervision"),
    "matplotlib": ("viz", "plots"),
    "faster_coco_eval": ("eval", "COCO evaluation"),
    "av": ("video", "video"),
}
_CORE = ("torch", "torchvision", "numpy", "kornia", "pillow", "typer", "rich")


@dataclass(frozen=True)
class Part:
    """One line of the report.

    Args:
        name: what it is.
        present: whether it is there.
        detail: its version or state; where it is missing, what that costs and the way to get it.
    """

    name: str
    present: bool
    detail: str


def examine() -> list[Part]:
    """Look at the machine and the environment.

    Returns:
        The parts, in the order of printing.
    """
    import detpost

    cores = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    return [
        Part("detpost", True, detpost.__version__),
        Part("python", True, platform.python_version()),
        Part("platform", True, f"{platform.system()} {platform.machine()}, {cores}"),
        *(_package(name) for name in _CORE),
        _cuda(),
        _compiler(),
        *_kernels(),
        *(_optional(name, extra, purpose) for name, (extra, purpose) in _OPTIONAL.items()),
    ]


def examine_file(path: Path) -> list[Part]:
    """Look at an ``.onnx`` file of detpost's.

    Args:
        path: the file.

    Returns:
        What it is, in which bits, and whether its decode is in float32.

    Raises:
        OSError: it is missing, or no ONNX file.
        ValueError: detpost did not write it.
    """
    from detpost.export.artifact import read_metadata
    from detpost.export.rounded import decode_in_fewer_bits, decode_warning, fewer_bits
    from detpost.export.weights import read_onnx

    model = read_onnx(path).model
    said = read_metadata({entry.key: entry.value for entry in model.metadata_props}, path)
    spec = said["spec"]
    wrong = decode_in_fewer_bits(model)
    nodes = sum(not node.name.startswith("detpost/") for node in model.graph.node)
    return [
        Part("written by", True, f"detpost {said['version']}, operator set {said['opset']}"),
        Part("decode", True, f"{spec['activation']}, {spec['selection']}, {said['preset'] or 'no preset'}"),
        Part("network", True, f"{nodes} nodes, {', '.join(fewer_bits(model)) or 'float32'}"),
        Part(
            "decode in float32", not wrong, decode_warning(wrong) if wrong else "yes: labels, order and boxes are exact"
        ),
    ]


def _package(name: str) -> Part:
    try:
        return Part(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Part(name, False, f"missing: pip install {name}")


def _optional(name: str, extra: str, purpose: str) -> Part:
    if importlib.util.find_spec(name) is None:
        return Part(name, False, f"missing, so no {purpose}: pip install 'detpost[{extra}]'")
    return Part(name, True, f"{metadata.version(name.replace('_', '-'))} ({purpose})")


def _cuda() -> Part:
    if not torch.cuda.is_available():
        return Part("CUDA", False, "no device: everything runs on the CPU; CUDA graphs and GPU kernels are off")
    devices = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Part("CUDA", True, f"{torch.version.cuda}: {devices}")


def _compiler() -> Part:
    import shutil

    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if found is None:
        return Part("C++ compiler", False, "none on PATH: torch.compile's Inductor backend needs one on a CPU")
    return Part("C++ compiler", True, f"{found} (torch.compile's Inductor backend)")


def _kernels() -> list[Part]:
    from detpost.kernels.cpu import library

    reason = library.missing()
    parts = [
        Part("C++ kernels", True, f"built, {library.instructions()}")
        if reason is None
        else Part("C++ kernels", False, f"{reason}; NumPy decodes and PyTorch computes the losses meanwhile")
    ]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    try:
        serving = ", ".join(f"{device}: {_serving(device)}" for device in devices)
    except (RuntimeError, ValueError) as error:
        return [*parts, Part("kernels in use", False, str(error))]
    forced = os.environ.get("DETPOST_KERNEL")
    return [*parts, Part("kernels in use", True, serving + (f" (DETPOST_KERNEL={forced})" if forced else ""))]


def _serving(device: str) -> str:
    """Name what serves a device; where that is Triton, after trying what the commonest decode runs."""
    from detpost.kernels import dispatch

    kernel = dispatch.kernel_for(device)
    if kernel != "triton":
        return kernel
    spec = DecodeSpec.preset("rtdetr")
    single = (torch.float32, torch.float32, torch.int64, spec.top_k)
    choices = (spec.activation, spec.selection, spec.background, spec.box_format, spec.clip)
    wrong = dispatch.tried(device, "decode", *single, *choices)
    return "triton, its decode tried and right" if wrong is None else f"aten, as Triton's decode was tried: {wrong}"
