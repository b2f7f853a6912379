"""What a whole detector found: detections, and what it gives beside them, read image by image on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.heads.masks import MaskStyle, masks_per_image, to_rle

__all__ = ["Found", "kept_slots"]

# So many masks are as large as the image at a time, where they are encoded.
_AT_A_TIME = 32


@dataclass(frozen=True)
class Found:
    """Detections of B images in K slots, and whatever else was predicted of each slot.

    Args:
        detections: of B images.
        masks: (B, K, h, w): of the network's size, floating; or bool, of the image's.
        style: how floating masks are read.
        beside: (B, K, ...) by name: keypoints, oriented boxes.
        content: (B, 2), which part of the masks' height and width the image fills, from the top left; ``None``: all.
        letterboxed: (height, width) of the network's input where masks are of the image with padding around it.
        at_image: whether bool masks are in pixels of the original image, padded to the greatest of the batch.
    """

    detections: Detections
    masks: Tensor | None = None
    style: MaskStyle = "rfdetr"
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    content: Tensor | None = None
    letterboxed: tuple[int, int] | None = None
    at_image: bool = True

    def first(self, count: int) -> Found:
        """Give the first images alone, on the CPU."""
        return Found(
            Detections(*(part[:count].cpu() for part in self.detections)),
            None if self.masks is None else self.masks[:count].cpu(),
            self.style,
            {name: values[:count].cpu() for name, values in self.beside.items()},
            None if self.content is None else self.content[:count].cpu(),
            self.letterboxed,
            self.at_image,
        )

    def masks_of(self, index: int, size: tuple[int, int], valid: Tensor) -> Iterator[Tensor]:
        """Give the masks of an image in its own size, a few at a time.

        Args:
            index: which image.
            size: its (height, width) in pixels.
            valid: (K,), bool: of which slots.

        Yields:
            (n, height, width), bool, on the CPU, in the order of the slots.
        """
        assert self.masks is not None
        kept = kept_slots(valid)
        for slots in torch.split(kept, _AT_A_TIME) if len(kept) else ():
            yield self._upsampled(index, size, slots)

    def beside_of(self, index: int, size: tuple[int, int], valid: Tensor, encoded: bool) -> dict[str, Any]:
        """Give what there is beside boxes of the D valid slots of an image.

        Args:
            index: which image.
            size: its (height, width) in pixels.
            valid: (K,), bool.
            encoded: whether masks come as COCO's run lengths.

        Returns:
            By name: ``masks`` (D, height, width) bool, or ``segmentations``, a list of D dicts that JSON holds;
            keypoints and oriented boxes (D, ...); nothing that the detector does not give.
        """
        found: dict[str, Any] = {name: values[index][valid] for name, values in self.beside.items()}
        if self.masks is None:
            return found
        parts = self.masks_of(index, size, valid)
        if not encoded:
            none = torch.zeros((0, *size), dtype=torch.bool)
            return {**found, "masks": torch.cat([none, *parts])}
        rows = [{**row, "counts": row["counts"].decode()} for part in parts for row in to_rle(part)]
        return {**found, "segmentations": rows}

    def _upsampled(self, index: int, size: tuple[int, int], slots: Tensor) -> Tensor:
        assert self.masks is not None
        values = self.masks[index][slots]
        if values.dtype == torch.bool:
            if self.at_image:
                return values[:, : size[0], : size[1]]
            return torch.nn.functional.interpolate(values[None].to(torch.float32), size=size)[0] > 0
        if self.content is not None:
            part = self.content[index].to(torch.float64) * torch.tensor(values.shape[1:])
            rows, columns = part.round().clamp(min=1).to(torch.int64).tolist()
            values = values[:, :rows, :columns]
        of_slots = Detections(*(each[index : index + 1, slots] for each in self.detections))
        places = torch.arange(len(slots))[None]
        masks = masks_per_image(
            of_slots._replace(queries=places, valid=torch.ones_like(of_slots.valid)),
            values[None],
            [size],
            style=self.style,
            input_size=self.letterboxed,
        )
        return masks[0][:, 0]


def kept_slots(valid: Tensor) -> Tensor:
    """Give the places of the valid slots (K,) of an image, in their order."""
    return torch.arange(len(valid), device=valid.device)[valid]
