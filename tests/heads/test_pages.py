"""Every Python example of docs/heads.md and docs/nms.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["heads", "nms"])
def test_the_examples_of_the_page_run(page):
    names = {
        "logits": torch.randn(2, 9, 2),
        "boxes": torch.rand(2, 9, 4),
        "image_sizes": torch.tensor([[30, 40], [25, 20]]),
        "image_ids": [7, 8],
        "mask_logits": torch.randn(2, 9, 8, 8),
        "keypoints": torch.rand(2, 9, 34, 7),
        "pose_keypoints": torch.rand(2, 9, 34),
        "oriented": torch.rand(2, 9, 5),
    }
    examples = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(examples) >= 3
    for example in examples:
        exec(compile(example, f"{page}.md", "exec"), names)
    if page == "heads":
        assert len(names["results"]) == len(names["rows"]) > 0
    else:
        assert bool((names["keep"] <= names["found"].valid).all())
