"""Ask a detector on Triton Inference Server: ``python client.py IMAGE...``.

Needs ``pip install 'tritonclient[grpc]' pillow``; ``client.json`` beside this file says how the model takes images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Array = NDArray[Any]


def prepare(path: str | Path, settings: Mapping[str, Any]) -> dict[str, Array]:
    """Read an image as the model takes it: a batch of one by the name of each input."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    width, height = image.size
    how = settings["preprocessing"]
    if settings["pixels"] != "full":
        image = image.resize((how["width"], how["height"]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image).transpose(2, 0, 1)[None]  # (1, 3, H, W)
    if settings["pixels"] == "normalised":
        mean, std = (np.array(how[name], np.float32)[:, None, None] for name in ("mean", "std"))
        pixels = (pixels.astype(np.float32) * np.float32(how["scale"]) - mean) / std
    inputs = {"images": np.ascontiguousarray(pixels)}
    if settings["sizes"]:
        sides = [height, width] if settings["sizes_order"] == "hw" else [width, height]
        inputs = {**inputs, settings["sizes"]: np.array([sides], np.int64)}
    return inputs


def read(outputs: Mapping[str, Array], settings: Mapping[str, Any], threshold: float) -> list[dict[str, Any]]:
    """Give the detections of one image above a threshold, best first."""
    parts = {part: outputs[name][0] for part, name in settings["outputs"].items()}
    keep = parts["scores"] > threshold
    if "valid" in parts:
        keep = keep & parts["valid"]
    if "count" in parts:
        keep = keep & (np.arange(len(keep)) < parts["count"][0])
    names = settings["class_names"]
    rows = zip(parts["labels"][keep], parts["boxes"][keep], parts["scores"][keep], strict=True)
    return [
        {"label": names.get(str(int(label)), str(int(label))), "score": float(score), "box": box.tolist()}
        for label, box, score in rows
    ]


def detect(client: Any, path: str | Path, settings: Mapping[str, Any], threshold: float) -> list[dict[str, Any]]:
    """Ask the server about one image."""
    import tritonclient.grpc as grpc
    from tritonclient.utils import np_to_triton_dtype

    inputs = []
    for name, values in prepare(path, settings).items():
        inputs.append(grpc.InferInput(name, values.shape, np_to_triton_dtype(values.dtype)))
        inputs[-1].set_data_from_numpy(values)
    wanted = [grpc.InferRequestedOutput(name) for name in settings["outputs"].values()]
    answer = client.infer(settings["model"], inputs, outputs=wanted)
    return read({name: answer.as_numpy(name) for name in settings["outputs"].values()}, settings, threshold)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line of JSON for each image."""
    parser = argparse.ArgumentParser(description="Detect on Triton Inference Server.")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--url", default="localhost:8001", help="of the server's GRPC")
    parser.add_argument("--threshold", type=float, default=0.5)
    given = parser.parse_args(arguments)
    import tritonclient.grpc as grpc

    settings = json.loads(Path(__file__).with_name("client.json").read_text(encoding="utf-8"))
    client = grpc.InferenceServerClient(given.url)
    for path in given.images:
        print(json.dumps({"image": path, "detections": detect(client, path, settings, given.threshold)}))


if __name__ == "__main__":
    main()
