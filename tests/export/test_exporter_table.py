"""The page's table of what each of PyTorch's exporters takes is what the script that makes it finds."""

import re
from pathlib import Path

import pytest

from scripts.exporter_table import EXPORTERS, tried
from tests.detectors import FAMILIES, SEGMENTATION_FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
ROW = re.compile(r"^\| `([a-z0-9_]+)` \| ((?:yes|no)[^|]*) \| ((?:yes|no)[^|]*) \|$", re.MULTILINE)
ROWS = {family: dict(zip(EXPORTERS, cells, strict=True)) for family, *cells in ROW.findall(PAGE.read_text())}


def test_the_table_has_every_family_of_the_presets():
    assert {*FAMILIES} <= {*ROWS} <= {*FAMILIES, *SEGMENTATION_FAMILIES}


# A whole detector takes the newer exporter most of a minute: here one of each kind, the rest where the script is run.
CELLS = [("rt_detr_v2", "dynamo"), ("yolos", "dynamo"), ("yolos", "torchscript"), ("rf_detr", "torchscript")]


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize(("family", "exporter"), CELLS)
def test_a_cell_of_the_table(family, exporter):
    found, said = tried(family, exporter), ROWS[family][exporter]
    assert found.split(",")[0].split(":")[0] == said.split(",")[0].split(":")[0], found
