"""The stages of a distributed run, one after the other in this process: what comes out is what one machine finds."""

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")

from detpost.runs.detect import detect  # noqa: E402
from detpost.runs.parts import key_array, key_of, place_of  # noqa: E402
from detpost.runs.sources import Columns, Listed  # noqa: E402
from detpost.runs.stages import Decode, Detect  # noqa: E402
from detpost.runs.tiles import INPUTS_AT_ONCE, Tiling  # noqa: E402
from tests.runs.raw_outputs import given_detector, make_noise  # noqa: E402

NAMES = [f"{number}.png" for number in range(7)]


@pytest.fixture
def expected(tmp_path, monkeypatch):
    """Give a function that gives the rows of one machine."""
    monkeypatch.setattr("detpost.detector.Detector.load", lambda *_, **__: given_detector())

    def rows(tiling):
        from pyarrow import parquet

        detect([tmp_path / "images"], tmp_path / "here", formats=("parquet",), tiling=tiling, fresh=True)
        return parquet.read_table(tmp_path / "here" / "detections.parquet").drop_columns(["image_id"]).to_pylist()

    (tmp_path / "images").mkdir()
    make_noise(tmp_path / "images")
    return rows


def block_of(folder, kind):
    """Give a block as Ray gives it, and what loads its images."""
    if kind == "listed":
        keys = np.array([key_of(name) for name in NAMES], object)
        return {"name": np.array([name.encode() for name in NAMES], object), "key": keys}, lambda tiling: Listed(
            place_of(folder), 10**6, tiling
        )
    content = np.array([(folder / name).read_bytes() for name in NAMES], object)
    return {"file_name": np.array(NAMES, object), "image": content}, lambda tiling: Columns(
        None, None, lambda: key_array([]), 10**6, tiling
    )


@pytest.mark.parametrize("tiling", [None, Tiling(64, 0.3), Tiling(32, 0.2, "wbf")])
@pytest.mark.parametrize("kind", ["listed", "columns"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_rows_are_those_of_one_machine_with_tiles_and_without(tmp_path, expected, kind, tiling, batch):
    block, images = block_of(tmp_path / "images", kind)
    detector = given_detector()
    tables = [*Decode(images(tiling), detector.prepare, batch)(block)]
    found = [Detect(lambda: detector, tiling, batch)(table) for table in tables]
    rows = pa.concat_tables(found).drop_columns(["image_id", "key"]).to_pylist()
    assert rows == expected(tiling)
    assert max(detector.run.batches) <= batch
    for table in tables:
        tiles = [len(cut) for cut in table["tiles"].to_pylist()]
        assert sum(tiles[:-1]) < INPUTS_AT_ONCE * batch  # a table ends with the image that fills it
