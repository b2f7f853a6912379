"""A detector that was loaded, whatever library it is from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from detpost.images import FixedSize, Prepare, Preprocessing
from detpost.spec import DecodeSpec

__all__ = ["LoadedDetector"]


@dataclass(frozen=True)
class LoadedDetector:
    """A detector and all that running or exporting it takes.

    Args:
        model: images (B, 3, H, W) to what :func:`detpost.postprocess.raw_outputs` reads.
        spec: how its outputs are decoded.
        class_names: the name of each label.
        preprocessing: the fixed-size preprocessing, or ``None`` where the input size follows the image.
        export_preprocessing: the same scaling and normalisation at one size, for files whose input size is fixed.
        prepare: uint8 images (3, H, W) to (images, image sizes (B, 2), pixel mask or ``None``).
        gives_masks: whether its output is a mapping with ``pred_masks`` (B, Q, h, w) too.
    """

    model: nn.Module
    spec: DecodeSpec
    class_names: dict[int, str]
    preprocessing: Preprocessing | None
    export_preprocessing: Preprocessing
    prepare: Prepare
    gives_masks: bool = False

    @classmethod
    def of_one_size(
        cls, model: nn.Module, spec: DecodeSpec, class_names: dict[int, str], preprocessing: Preprocessing
    ) -> LoadedDetector:
        """Describe a detector that takes every image at one size.

        Args:
            model: as the class takes it; put in evaluation mode.
            spec: as the class takes it.
            class_names: as the class takes it.
            preprocessing: what makes its input of an image.

        Returns:
            The detector.
        """
        return cls(model.eval(), spec, class_names, preprocessing, preprocessing, FixedSize(preprocessing))
