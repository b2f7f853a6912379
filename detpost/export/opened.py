"""A file of detpost's, ready to run, with one face for every format: tensors by name in, tensors by name out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.export.feed import InputKind
from detpost.export.formats import format_of
from detpost.export.heads import MaskHead, columns_of, output_names, recorded_heads
from detpost.export.layouts import recorded_layout
from detpost.heads.found import Found

__all__ = ["OpenedFile", "open_file", "open_ir", "open_onnx", "open_pt2", "opened_session"]


@dataclass(frozen=True)
class OpenedFile:
    """A file that is ready to run.

    Args:
        path: the file.
        metadata: what it says of itself.
        inputs: the kind of each input, in order.
        run: a tensor by the name of each input, on any device, to a tensor by the name of each output.
        device: where it runs.
    """

    path: Path
    metadata: dict[str, Any]
    inputs: Mapping[str, InputKind]
    run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    device: torch.device

    @property
    def is_post_processor(self) -> bool:
        """Whether it takes raw outputs and no images."""
        return "pred_logits" in self.inputs

    def detections(self, values: Mapping[str, Tensor], image_sizes: Tensor, images: Tensor | None = None) -> Detections:
        """Read the detections among what ``run`` gives.

        Args:
            values: of ``run``.
            image_sizes: (B, 2), (height, width) of each image, pixels.
            images: what was given to ``run``, (B, 3, H, W); ``None`` of a post-processor alone.
        """
        return recorded_layout(self.metadata).read(values, image_sizes, self._input_size(images))

    def found(self, values: Mapping[str, Tensor], image_sizes: Tensor, images: Tensor | None = None) -> Found:
        """Read the detections and what is given beside boxes.

        Args:
            values: of ``run``.
            image_sizes: (B, 2), (height, width) of each image, pixels.
            images: what was given to ``run``, (B, 3, H, W); ``None`` of a post-processor alone.
        """
        heads = recorded_heads(self.metadata)
        masks = next((head for head in heads if isinstance(head, MaskHead)), MaskHead())
        inside = self.metadata.get("preprocess_inside") == "full"
        letterboxed = inside and (self.metadata.get("resize") or {}).get("letterbox", False)
        preprocessing = self.metadata.get("preprocessing") or {}
        names = [name for head in heads for name in output_names(head) if name != "masks" and name in values]
        return Found(
            self.detections(values, image_sizes, images),
            values.get("masks") if heads else None,
            masks.style,
            {name: self._placed(name, values[name], image_sizes, images) for name in names},
            letterboxed=(preprocessing["height"], preprocessing["width"]) if letterboxed else None,
            at_image=inside or recorded_layout(self.metadata).sizes is not None,
        )

    def _placed(self, name: str, value: Tensor, image_sizes: Tensor, images: Tensor | None) -> Tensor:
        """Bring x and y of an output beside the boxes to pixels of the image, as the layout does those of boxes."""
        layout, columns = recorded_layout(self.metadata), columns_of(name)
        if layout.sizes is not None or not {"x", "y"} & {*columns}:
            return value
        height, width = layout.scale(image_sizes.to(value), self._input_size(images)).unbind(1)  # (B,) each
        one = torch.ones_like(width)
        factor = torch.stack([{"x": width, "y": height}.get(column, one) for column in columns], dim=1)
        return value * factor.reshape(len(value), *[1] * (value.ndim - 2), len(columns))

    def _input_size(self, images: Tensor | None) -> tuple[int, int]:
        """Give (height, width) of the network's input."""
        height, width = (self.metadata.get("input_size") or (1, 1)) if images is None else images.shape[-2:]
        return int(height), int(width)


def open_file(path: str | Path, device: str | torch.device | None = None) -> OpenedFile:
    """Open a file of detpost's of any format.

    Args:
        path: the file.
        device: where to run it; ``None`` is where the file was made for, which is the CPU of all but some ``.pt2``.

    Returns:
        The file, ready to run.

    Raises:
        ImportError: a package that the format needs is missing; the message names the extra.
        OSError: no such file.
        ValueError: an ending of no format, a file that detpost did not write, or a damaged one.
    """
    opened: OpenedFile = format_of(path).open()(Path(path), device)
    return opened


def open_onnx(path: Path, device: Any = None) -> OpenedFile:
    """Open an ``.onnx`` file in ONNX Runtime, on the CPU."""
    from detpost.export.artifact import read_metadata
    from detpost.export.runtime import onnx_session

    session = onnx_session(path)
    return opened_session(session, read_metadata(session.get_modelmeta().custom_metadata_map, path), path)


def opened_session(session: Any, metadata: dict[str, Any], path: Path) -> OpenedFile:
    """Give a session of ONNX Runtime the face of a file: ``metadata`` says how it decodes, ``path`` is its name."""
    from detpost.export.runtime import onnx_inputs

    names = [value.name for value in session.get_outputs()]

    def run(feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(names, {name: value.cpu().numpy() for name, value in feed.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return OpenedFile(path, metadata, _kinds(onnx_inputs(session)), run, torch.device("cpu"))


def open_ir(path: Path, device: Any = None) -> OpenedFile:
    """Open an OpenVINO ``.xml`` file, on the CPU."""
    from detpost.export.openvino import open_openvino

    model = open_openvino(path)

    def run(feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = model.run({name: value.cpu().numpy() for name, value in feed.items()})
        return {name: torch.from_numpy(value) for name, value in found.items()}

    kinds = {name: (shape, model.dtypes[name]) for name, shape in model.inputs.items()}
    return OpenedFile(path, model.metadata, _kinds(kinds), run, torch.device("cpu"))


def open_pt2(path: Path, device: Any = None) -> OpenedFile:
    """Open a ``.pt2`` file."""
    from detpost.export.packaged import open_package

    opened = open_package(path, device)
    names = opened.metadata["inputs"]
    (queries, classes), size = opened.metadata.get("shape") or (None, None), opened.metadata.get("input_size")
    shapes = {
        "images": (None, 3, *(size or (None, None))),
        "pred_logits": (None, queries, classes),
        "pred_boxes": (None, queries, 4),
        "image_sizes": (None, 2),
    }
    kinds = {name: (shapes[name], torch.int64 if name == "image_sizes" else torch.float32) for name in names}

    def run(feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return opened.run(*(feed[name].to(opened.device) for name in names))

    return OpenedFile(path, opened.metadata, kinds, run, opened.device)


def _kinds(kinds: Mapping[str, tuple[tuple[int | None, ...], Any]]) -> dict[str, InputKind]:
    """Give PyTorch's dtypes for NumPy's."""
    return {name: (shape, torch.from_numpy(np.empty(0, dtype)).dtype) for name, (shape, dtype) in kinds.items()}
