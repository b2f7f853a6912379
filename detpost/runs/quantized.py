"""What is written in fewer bits, and the ground truth that its loss is of."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detpost.export.lowering import Precision
from detpost.verify.on_images import OnImages

if TYPE_CHECKING:
    from detpost.export.written import WrittenFile

__all__ = ["Quantized", "Truth"]


@dataclass(frozen=True)
class Quantized:
    """What :func:`quantize` wrote.

    Args:
        written: the file.
        recipe: the JSON file that repeats it.
        precision: ``"int8"``, ``"fp16"`` or ``"bf16"``.
        measure: what the loss is of: ``"AP"`` or ``"matched detections"``.
        loss: of what was written, against the float file; ``None`` where a recipe was repeated.
        all_lowered: the loss with nothing of the network kept.
        float_nodes: nodes of the network that stay float32.
        weight_nodes: with int8, nodes whose weights alone are int8.
        size: of the file as a share of the float file's.
        complete: whether the search came to its end within the budget.
    """

    written: WrittenFile
    recipe: Path
    precision: Precision
    measure: str
    loss: float | None
    all_lowered: float | None
    float_nodes: tuple[str, ...]
    weight_nodes: tuple[str, ...]
    size: float
    complete: bool = True


class Truth:
    """A ground truth of images, and the AP that detections have on it."""

    def __init__(self, path: Path, on_images: OnImages) -> None:
        from detpost.runs.coco import match_categories, read_annotations

        truth = read_annotations(path)
        by_name = {Path(image["file_name"]).name: image for image in truth["images"] if image.get("file_name")}
        known = [by_name.get(file.name) for file in on_images.images]
        lacking = [file.name for file, image in zip(on_images.images, known, strict=True) if image is None]
        if lacking:
            raise ValueError(
                f"{path} has no image {lacking[0]!r}, nor {len(lacking) - 1} others that are calibrated on"
            )
        self.ids = [image["id"] for image in known if image is not None]
        self.categories = match_categories(on_images.detector.class_names, truth["categories"])
        chosen = set(self.ids)
        rows = [row for row in truth["annotations"] if row["image_id"] in chosen]
        images = [image for image in truth["images"] if image["id"] in chosen]
        self.truth = {**truth, "images": images, "annotations": rows}

    def precision(self, found: Sequence[dict[str, Any]]) -> float:
        """Give COCO's AP."""
        from detpost.runs.evaluate import evaluate

        rows = []
        for image, each in zip(self.ids, found, strict=True):
            for score, label, box in zip(
                each["scores"].tolist(), each["labels"].tolist(), each["boxes"].tolist(), strict=True
            ):
                if label in self.categories:
                    x, y, right, bottom = box
                    area = [x, y, right - x, bottom - y]
                    category = self.categories[label]
                    rows.append({"image_id": image, "category_id": category, "bbox": area, "score": score})
        if not rows:
            return 0.0
        with tempfile.TemporaryDirectory(prefix="detpost-") as folder:
            path = Path(folder) / "truth.json"
            path.write_text(json.dumps(self.truth))
            return evaluate(path, rows).metrics["AP"]
