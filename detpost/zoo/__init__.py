"""The embedded tiny detector: where its directory and its sample images lie.

`TINY` is a plain transformers RT-DETRv2 directory that finds the handwritten digits 0-9; its `README.md` is the model
card. `SAMPLES` holds four pictures composed from digits that training has not seen, and `ground_truth.json` (COCO).
"""

from pathlib import Path

__all__ = ["SAMPLES", "TINY", "sample_images"]

TINY = Path(__file__).parent / "tiny"
SAMPLES = Path(__file__).parent / "samples"


def sample_images() -> list[Path]:
    """List the sample images, sorted by name.

    Returns:
        The paths of four PNG files.

    Example:
        >>> [path.suffix for path in sample_images()]
        ['.png', '.png', '.png', '.png']
    """
    return sorted(SAMPLES.glob("*.png"))
