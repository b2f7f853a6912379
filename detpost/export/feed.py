"""How images become the inputs of a detector's graph: found out at attaching, recorded, and followed when it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detpost.export.beside import preprocessing_beside
from detpost.export.layouts import recorded_layout
from detpost.images import Preprocessing
from detpost.spec import normalisation_of

if TYPE_CHECKING:
    import onnx

__all__ = [
    "Feed",
    "ImageInput",
    "InputKind",
    "find_image_input",
    "record_feed",
    "recorded_preprocessing",
    "stated_preprocessing",
]

# Shape, None where a dimension is free, and dtype of an input.
InputKind = tuple[tuple[int | None, ...], torch.dtype]

_PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_USUAL_SIDE = 640
# A mask of the pixels that are no padding: images are resized to the whole input, so there is none.
_MASK_WORD = "mask"


@dataclass(frozen=True)
class Feed:
    """The inputs of a detector's graph by what they are for.

    Args:
        images: name and kind of the image input, (B, 3, H, W).
        image_sizes: name of the image sizes, (B, 2), where the file takes them.
        kinds: shape and dtype of each.
        width_first: whether sizes are (width, height).
        ones: inputs that are 1 throughout: masks of the pixels that are no padding.
    """

    images: str
    image_sizes: str | None
    kinds: Mapping[str, InputKind]
    ones: tuple[str, ...] = ()
    width_first: bool = False

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, Any], kinds: Mapping[str, InputKind]) -> Feed:
        """Read what a file records, and hold it to the inputs that the file has.

        Raises:
            ValueError: a post-processor alone, or inputs that nobody here can fill.
        """
        layout = recorded_layout(metadata)
        recorded = metadata.get("feed", {"images": "images", "image_sizes": layout.sizes, "ones": []})
        known = {recorded["images"], recorded["image_sizes"], *recorded["ones"]}
        if recorded["images"] not in kinds or not known >= set(kinds):
            raise ValueError(f"{path} is not a whole detector of images alone: its inputs are {', '.join(kinds)}")
        width_first = layout.sizes_order == "wh"
        return cls(recorded["images"], recorded["image_sizes"], kinds, tuple(recorded["ones"]), width_first)

    @property
    def batch(self) -> int | None:
        """The batch size where it is fixed."""
        return self.kinds[self.images][0][0]

    def __call__(self, images: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
        """Give tensors by name: images (B, 3, H, W) as they were prepared, image sizes (B, 2), and the masks."""
        batch, _, height, width = images.shape
        free = (batch, height, width)
        masks = {
            name: torch.ones([free[axis] if size is None else size for axis, size in enumerate(shape)], dtype=dtype)
            for name, (shape, dtype) in ((name, self.kinds[name]) for name in self.ones)
        }
        given = {self.images: images.to(self.kinds[self.images][1]), **masks}
        if self.image_sizes is not None:
            sizes = image_sizes.flip(1) if self.width_first else image_sizes
            given |= {self.image_sizes: sizes.to(self.kinds[self.image_sizes][1])}
        return given


@dataclass(frozen=True)
class ImageInput:
    """The image input of someone else's graph: its name, whether it is uint8, and its fixed sizes."""

    name: str
    is_uint8: bool
    height: int | None
    width: int | None


def find_image_input(inputs: list[onnx.ValueInfoProto]) -> ImageInput | None:
    """Find the one input (B, 3, H, W) of a type that holds pixels."""
    from onnx import TensorProto

    found = []
    for value in inputs:
        kind = value.type.tensor_type
        sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
        pixels = kind.elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8)
        if pixels and len(sizes) == 4 and sizes[1] in (3, None):
            found.append(ImageInput(value.name, kind.elem_type == TensorProto.UINT8, sizes[2], sizes[3]))
    return found[0] if len(found) == 1 else None


def record_feed(
    inputs: list[onnx.ValueInfoProto],
    sizes: str | None,
    said: tuple[Preprocessing, str] | None,
    presets: Sequence[str],
    image_size: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Give the metadata that says how images become a graph's inputs, and what the caller should know of it.

    Args:
        inputs: the graph's.
        sizes: name of the image sizes among them; ``None`` where there are none.
        said: the preprocessing and who says so; ``None`` assumes what the preset's detectors were trained on.
        presets: the detector's family, or all that it may be of, of which the first is assumed.
        image_size: (height, width) where the graph leaves it free.

    Returns:
        Metadata, and notes. A note alone where no input takes images.
    """
    image = find_image_input([value for value in inputs if value.name != sizes])
    others = [value.name for value in inputs if image and value.name not in (image.name, sizes)]
    unknown = [name for name in others if _MASK_WORD not in name.lower()]
    if image is None or unknown:
        reason = f"what its input {unknown[0]!r} wants is not known" if image else "no input is images (B, 3, H, W)"
        return {}, [f"`detpost detect` and `verify` cannot feed this file: {reason}"]
    mean, std = normalisation_of(presets[0])
    found, who = said or (Preprocessing(_USUAL_SIDE, _USUAL_SIDE, mean=mean, std=std), None)
    height, width = image_size or (found.height, found.width)
    preprocessing = replace(found, height=image.height or height, width=image.width or width)
    record = {
        "feed": {"images": image.name, "image_sizes": sizes, "ones": others},
        "input_size": [image.height, image.width] if image.height and image.width else None,
        "preprocessing": preprocessing.to_dict(),
        "preprocessing_assumed": who is None,
        "preprocess_inside": image.is_uint8,
    }
    how = f"{preprocessing.height}x{preprocessing.width}, {_in_words(preprocessing, image.is_uint8)}"
    if who is None:
        others = [name for name in presets if normalisation_of(name) != (mean, std)]
        way_out = f"{', '.join(others)} decode alike and were trained otherwise: name the preset, or " if others else ""
        way_out = f"{way_out}say so where the detector was trained otherwise"
        return record, [f"images are assumed to be {how}, as for {presets[0]}: {way_out}"]
    return record, [f"images are {how}, as {who} says"]


def stated_preprocessing(source: Path, before: Mapping[str, Any]) -> tuple[Preprocessing, str] | None:
    """Give the preprocessing of someone else's file and who says it: the file itself, else what lies beside it.

    Args:
        source: the file.
        before: what detpost recorded in it, if it wrote it.
    """
    recorded = None if before.get("preprocessing_assumed", False) else recorded_preprocessing(before)
    return (recorded, "the source") if recorded else preprocessing_beside(source)


def recorded_preprocessing(metadata: Mapping[str, Any]) -> Preprocessing | None:
    """Read the preprocessing that a file records, whole, wherever it is done; ``None`` where there is none."""
    recorded = metadata.get("preprocessing")
    if recorded is None:
        return None
    mean, std = tuple(recorded["mean"]), tuple(recorded["std"])
    return Preprocessing(recorded["height"], recorded["width"], recorded["scale"], mean, std)


def _in_words(preprocessing: Preprocessing, inside: bool) -> str:
    if inside:
        return "uint8"
    mean, std = (tuple(round(value, 3) for value in values) for values in (preprocessing.mean, preprocessing.std))
    scale = "scaled to 0..1" if abs(preprocessing.scale * 255 - 1) < 1e-6 else f"times {preprocessing.scale:g}"
    return f"{scale}, " + ("not normalised" if (mean, std) == _PLAIN else f"mean {mean}, std {std}")
