"""YOLO text: what a line says, which file is whose, and that names lead nowhere else."""

import os

import pytest

from detpost.runs.detect import detect
from detpost.runs.merge import merge
from detpost.runs.yolo import write_labels
from detpost.zoo import SAMPLES


def row(name, **changes):
    found = {"boxes": [[10.0, 20.0, 30.0, 60.0]], "scores": [0.75], "labels": [7], "names": ["seven"]}
    return {"file_name": name, "image_id": 1, "width": 40, "height": 80, **found, **changes}


def texts(folder):
    labels = folder / "yolo" / "labels"
    return {path.relative_to(labels).as_posix(): path.read_text() for path in labels.rglob("*.txt")}


LINE = "7 0.5 0.5 0.5 0.5 0.75\n"


def test_a_line_is_a_label_a_box_in_units_of_the_image_and_a_score(tmp_path):
    rows = [
        row("a/b.jpg"),
        row("empty.png", boxes=[], scores=[], labels=[], names=[]),
        {"file_name": "x", "error": "?"},
    ]
    assert write_labels(rows, tmp_path, {7: 'se"ven', 1: "größe"})
    assert texts(tmp_path) == {"a/b.txt": LINE, "empty.txt": ""}
    data = (tmp_path / "yolo" / "data.yaml").read_text()
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(data) == {"names": {1: "größe", 7: 'se"ven'}}


def test_names_that_differ_by_their_ending_have_files_of_their_own(tmp_path):
    rows = [row("a.jpg"), row("a.png"), row("a.png.jpg"), row("a.tif"), row("b.jpg")]
    with pytest.warns(UserWarning, match="3 images have another's name but for its ending"):
        write_labels(rows, tmp_path, {})
    assert set(texts(tmp_path)) == {"a.txt", "a.png.txt", "a.png.jpg.txt", "a.tif.txt", "b.txt"}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("../../outside.jpg", "outside.txt"),
        ("/etc/passwd", "etc/passwd.txt"),
        ("s3://bucket/x.jpg", "s3:/bucket/x.txt"),
        ("..", "_.txt"),
        ("nul\0.jpg", "nul_.txt"),
        (os.fsdecode(b"x\xff.jpg"), os.fsdecode(b"x\xff.txt")),
    ],
)
def test_no_name_leads_elsewhere(tmp_path, name, file):
    inside = tmp_path / "deep" / "er"
    write_labels([row(name)], inside, {})
    assert [*texts(inside)] == [file]
    assert [path for path in tmp_path.rglob("*.txt") if inside not in path.parents] == []


def test_the_same_again_changes_nothing_and_what_is_gone_goes(tmp_path):
    rows = [row("a.jpg"), row("b.jpg")]
    assert write_labels(rows, tmp_path, {7: "seven"})
    assert not write_labels(rows, tmp_path, {7: "seven"})
    assert write_labels(rows[:1], tmp_path, {7: "seven"})
    assert [*texts(tmp_path)] == ["a.txt"]
    assert write_labels(rows[:1], tmp_path, {7: "eight"})

    def fails():
        yield rows[1]
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_labels(fails(), tmp_path, {})
    assert [*texts(tmp_path)] == ["a.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["yolo"]


def test_a_run_and_a_merge_write_the_same(tmp_path):
    pytest.importorskip("pyarrow")
    found = detect([SAMPLES], tmp_path / "run", formats=("parquet", "yolo"), device="cpu", threshold=0.3)
    assert tmp_path / "run" / "yolo" in found.files
    merge([tmp_path / "run"], tmp_path / "merged", formats=("yolo",))
    assert texts(tmp_path / "merged") == texts(tmp_path / "run")
    assert sum(text.count("\n") for text in texts(tmp_path / "run").values()) == found.detections > 10
    assert not detect([SAMPLES], tmp_path / "run", formats=("parquet", "yolo"), device="cpu", threshold=0.3).changed
