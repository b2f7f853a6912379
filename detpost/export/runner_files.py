"""What lies beside a file or among its properties for a runner's sake: configuration, labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detpost.spec import DecodeSpec

__all__ = ["deepstream_files", "frigate_files", "ultralytics_properties"]

_NO_OBJECT = "background"


def deepstream_files(path: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Write the configuration of Gst-nvinfer and the labels, for DeepStream-Yolo's parser.

    nvinfer computes ``net-scale-factor * (pixel - offset)``. No clustering: the decode chose already.
    """
    labels, config = f"{path.stem}.labels.txt", f"config_infer_{path.stem}.txt"
    names = _labels(metadata)
    preprocessing = metadata.get("preprocessing") or {"scale": 1 / 255, "mean": [0.0] * 3, "std": [1.0] * 3}
    inside = metadata.get("preprocess_inside", False)
    scale = 1.0 if inside else preprocessing["scale"] / preprocessing["std"][0]
    offsets = [0.0] * 3 if inside else [mean / preprocessing["scale"] for mean in preprocessing["mean"]]
    lines = [
        "[property]",
        "gpu-id=0",
        f"net-scale-factor={scale:.10g}",
        *([f"offsets={';'.join(f'{offset:.10g}' for offset in offsets)}"] if any(offsets) else []),
        "model-color-format=0",
        f"onnx-file={path.name}",
        f"model-engine-file={path.stem}_b1_gpu0_fp32.engine",
        f"labelfile-path={labels}",
        "batch-size=1",
        "network-mode=0",
        f"num-detected-classes={len(names)}",
        "interval=0",
        "gie-unique-id=1",
        "process-mode=1",
        "network-type=0",
        "cluster-mode=4",
        "maintain-aspect-ratio=0",
        "parse-bbox-func-name=NvDsInferParseYolo",
        "custom-lib-path=nvdsinfer_custom_impl_Yolo/libnvdsinfer_custom_impl_Yolo.so",
        "engine-create-func-name=NvDsInferYoloCudaEngineGet",
        "",
        "[class-attrs-all]",
        f"pre-cluster-threshold={metadata['spec'].get('score_threshold') or 0.25:g}",
        f"topk={metadata['spec']['top_k']}",
    ]
    return {config: "\n".join(lines) + "\n", labels: "\n".join(names) + "\n"}


def frigate_files(path: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Write the part of Frigate's configuration that is about the model, and the label map."""
    labels = f"{path.stem}.labelmap.txt"
    height, width = metadata.get("input_size") or (640, 640)
    lines = [
        "model:",
        "  model_type: dfine",
        f"  width: {width}",
        f"  height: {height}",
        "  input_tensor: nchw",
        "  input_dtype: float",
        f"  path: /config/model_cache/{path.name}",
        f"  labelmap_path: /config/model_cache/{labels}",
    ]
    numbered = [f"{label} {name}" for label, name in enumerate(_labels(metadata))]
    return {f"{path.stem}.frigate.yml": "\n".join(lines) + "\n", labels: "\n".join(numbered) + "\n"}


def ultralytics_properties(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Give the properties that Ultralytics reads in an ONNX file, as it writes them: Python literals."""
    names = dict(enumerate(_labels(metadata)))
    size = metadata.get("input_size") or [640, 640]
    said = {"task": "detect", "stride": "32", "batch": "1", "imgsz": repr(list(size)), "names": repr(names)}
    return {**said, "end2end": "True", "channels": "3", "args": json.dumps({"nms": True})}


def _labels(metadata: Mapping[str, Any]) -> list[str]:
    """Name every label from 0 to the greatest."""
    known = {int(label): str(name) for label, name in metadata["class_names"].items()}
    count = metadata.get("num_classes") or (max(known) + 1 if known else 0)
    # The channel that means "no object" is never a label, but numbers its neighbours.
    background = DecodeSpec(**metadata["spec"]).background_channel(count)
    return [known.get(label, _NO_OBJECT if label == background else str(label)) for label in range(count)]
