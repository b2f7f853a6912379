"""Parquet results: what they hold, who reads them, and that memory does not grow with them."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

parquet = pytest.importorskip("pyarrow.parquet")

from detpost import Detector  # noqa: E402
from detpost.command.cli import app  # noqa: E402
from detpost.runs import merge as merging  # noqa: E402
from detpost.runs.detect import detect  # noqa: E402
from detpost.runs.merge import merge  # noqa: E402
from detpost.runs.parquet import (  # noqa: E402
    TableWriter,
    about,
    name_of,
    rows_of,
    schema,
    sort_key,
    table_of,
    tables_of,
)
from detpost.zoo import SAMPLES, sample_images  # noqa: E402

COLUMNS = [
    *("file_name", "image_id", "width", "height"),
    *("boxes", "scores", "labels", "label_names", "masks", "error"),
]
KNOWN = {"version": "0", "class_names": {"0": "cat", "1": "dog"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over the samples, a broken file and odd names, in every format."""
    images = tmp_path_factory.mktemp("images")
    for number, name in enumerate(
        ["b.png", "größe 数字.png", "a/new\nline.png", "Z.png", os.fsdecode(b"x\xff.png"), r"x\xff.png"]
    ):
        (images / name).parent.mkdir(exist_ok=True)
        shutil.copy(sample_images()[number % 4], images / name)
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    Image.new("L", (40, 30)).save(images / "nothing.png")
    out = tmp_path_factory.mktemp("out")
    detect([images], out, formats=("coco", "jsonl", "csv", "parquet"), device="cpu", threshold=0.3)
    return out


def some_rows(count, seed=0, prefix=""):
    """Make rows of any kind, sorted by name."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        row = {"file_name": f"{prefix}{number:06}.png", "image_id": number + 1}
        if random.random() < 0.1:
            rows.append({**row, "error": "the file is empty"})
            continue
        found = int(random.integers(0, 9))
        boxes = random.random((found, 4), dtype=np.float32)
        row |= {"width": 640, "height": 480, "boxes": boxes.tolist(), "scores": boxes[:, 0].tolist()}
        row |= {"labels": (boxes[:, 1] > 0.5).astype(int).tolist()}
        row |= {"names": [KNOWN["class_names"][str(label)] for label in row["labels"]]}
        if random.random() < 0.3:
            row["masks"] = [{"size": [480, 640], "counts": "x" * int(random.integers(1, 99))} for _ in range(found)]
        rows.append(row)
    return rows


def write(path, rows, known=KNOWN):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = TableWriter(path, schema(known))
    writer.add(table_of(rows))
    writer.close()
    return path


def read(path):
    with parquet.ParquetFile(path) as file:
        return [row for table in tables_of(file) for row in rows_of(table)]


class TestColumns:
    def test_a_row_an_image_sorted_by_name_with_what_the_other_formats_hold(self, run):
        table = parquet.read_table(run / "detections.parquet")
        assert table.schema.names == COLUMNS
        assert about(table.schema)["class_names"]["7"] == "7"
        rows = table.to_pylist()
        names = [row["file_name"] for row in rows]
        assert names == sorted(names, key=str.encode)
        assert names[-2:] == [r"x\x5cxff.png", r"x\xff.png"]  # the latter of a byte
        lines = [json.loads(line) for line in (run / "detections.jsonl").read_text().splitlines()]
        assert [sort_key(line["file_name"]).decode() for line in lines] == names
        for row, line in zip(rows, lines, strict=True):
            assert row["image_id"] == line["image_id"]
            assert row["error"] == line.get("error")
            assert row["masks"] is None
            if "error" in line:
                assert row["boxes"] is row["scores"] is row["labels"] is row["label_names"] is row["width"] is None
                continue
            assert (row["width"], row["height"]) == (line["width"], line["height"])
            found = line["detections"]
            assert row["boxes"] == [each["box"] for each in found]
            assert row["scores"] == [each["score"] for each in found]
            assert row["labels"] == [each["label"] for each in found]
            assert row["label_names"] == [each["label_name"] for each in found]
        assert sum(len(row["scores"] or ()) for row in rows) > 10
        assert {row["file_name"]: row["scores"] for row in rows}["nothing.png"] == []

    def test_pandas_and_pycocotools_read_it(self, tmp_path):
        pandas = pytest.importorskip("pandas")
        coco = pytest.importorskip("pycocotools.mask")
        mask = np.zeros((480, 640), np.uint8, order="F")
        mask[10:20, 30:50] = 1
        encoded = coco.encode(mask)
        row = {**some_rows(1, seed=1)[0], "boxes": [[30, 10, 50, 20]], "scores": [0.5], "labels": [1], "names": ["dog"]}
        row["masks"] = [{"size": encoded["size"], "counts": encoded["counts"].decode()}]
        frame = pandas.read_parquet(write(tmp_path / "x.parquet", [row]))
        assert (coco.decode({**frame["masks"][0][0], "size": [*frame["masks"][0][0]["size"]]}) == mask).all()
        assert np.stack(frame["boxes"][0]).tolist() == [[30, 10, 50, 20]]

    def test_duckdb_reads_it(self, run):
        duckdb = pytest.importorskip("duckdb")
        found = duckdb.sql(
            f"select label_name, count(*) from (select unnest(label_names) as label_name "
            f"from '{run / 'detections.parquet'}') group by 1"
        ).fetchall()
        expected = [row["category_id"] for row in json.loads((run / "detections.json").read_text())]
        assert dict(found) == {str(label): expected.count(label) for label in set(expected)}

    def test_bytes_depend_on_the_rows_and_not_on_how_they_come(self, monkeypatch):
        monkeypatch.setattr("detpost.runs.parquet._GROUP_BYTES", 400_000)
        rows = some_rows(9000)

        def written(step):
            file = io.BytesIO()
            writer = TableWriter(file, schema(KNOWN))
            for start in range(0, len(rows), step):
                writer.add(table_of(rows[start : start + step]))
            writer.close()
            return file.getvalue()

        whole = written(9000)
        assert written(7) == written(1000) == whole
        file = parquet.ParquetFile(io.BytesIO(whole))
        assert file.metadata.num_row_groups > 1
        assert [row for table in tables_of(file) for row in rows_of(table)] == rows

    def test_a_missing_package_is_one_line(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ImportError, match=r"Parquet needs pyarrow: pip install 'detpost\[parquet\]'"):
            detect([SAMPLES], tmp_path, formats=["parquet"])


def test_every_name_is_written_in_a_way_of_its_own_and_read_back():
    random = np.random.default_rng(0)
    names = {os.fsdecode(bytes(random.choice([*b"\\xf5c\xff\xc3\xa9"], random.integers(1, 8)))) for _ in range(20_000)}
    written = {name: sort_key(name).decode() for name in names}
    assert len({*written.values()}) == len(names)
    assert all(name_of(text) == name for name, text in written.items())
    assert sort_key("a\\b/größe.png").decode() == "a\\b/größe.png"


class TestMerge:
    def test_the_formats_are_those_of_the_run_itself(self, run, tmp_path):
        result = CliRunner().invoke(
            app, ["merge", str(run), "--out", str(tmp_path), *(f"--format={name}" for name in ("coco", "jsonl", "csv"))]
        )
        assert result.exit_code == 0, result.output
        for name in ("detections.json", "images.json", "detections.jsonl", "detections.csv", "skipped.csv"):
            assert (tmp_path / name).read_bytes() == (run / name).read_bytes(), name
        assert "8 images, 1 of them skipped; " in result.output

    @pytest.mark.parametrize("parts", [2, 7, 75])
    def test_any_number_of_files_in_any_order_gives_one(self, tmp_path, parts):
        rows = some_rows(3000)
        order = np.random.default_rng(0).permutation(len(rows))
        files = [
            write(tmp_path / f"{part}" / "detections.parquet", [rows[place] for place in sorted(order[part::parts])])
            for part in range(parts)
        ]
        merged = merge(files, tmp_path / "out", formats=["csv", "parquet"])
        assert (merged.images, len(merged.skipped)) == (3000, sum("error" in row for row in rows))
        whole = write(tmp_path / "whole.parquet", rows)
        assert (tmp_path / "out" / "detections.parquet").read_bytes() == whole.read_bytes()
        with (tmp_path / "out" / "detections.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == merged.detections
        assert not merge(files, tmp_path / "out", formats=["csv", "parquet"]).changed
        assert not list((tmp_path / "out").glob(".*"))

    def test_ids_of_one_source_stay_and_annotations_give_others(self, tmp_path):
        rows = [{**row, "image_id": row["image_id"] * 7} for row in some_rows(20)]
        source = write(tmp_path / "in" / "detections.parquet", rows)
        merge([source], tmp_path / "out", formats=["coco", "parquet"])
        assert read(tmp_path / "out" / "detections.parquet") == rows
        truth = {
            "images": [{"id": 1000 - n, "file_name": row["file_name"]} for n, row in enumerate(rows)],
            "categories": [{"id": 70, "name": "dog"}, {"id": 80, "name": "cat"}],
        }
        (tmp_path / "gt.json").write_text(json.dumps(truth))
        merge([source], tmp_path / "given", annotations=tmp_path / "gt.json")
        assert [row["image_id"] for row in read(tmp_path / "given" / "detections.parquet")] == [*range(1000, 980, -1)]
        results = json.loads((tmp_path / "given" / "detections.json").read_text())
        assert [row["category_id"] for row in results] == [
            {"dog": 70, "cat": 80}[name] for row in rows for name in row.get("names", ())
        ]

    def test_the_same_row_counts_once_and_two_different_ones_are_an_error(self, tmp_path):
        rows = some_rows(50)
        sources = [write(tmp_path / f"{part}.parquet", rows[start:]) for part, start in enumerate((0, 20, 49))]
        assert merge(sources, tmp_path / "out").images == 50
        other = write(tmp_path / "other.parquet", [{**rows[30], "error": "gone"}])
        with pytest.raises(ValueError, match=r"two sources have different rows for '000030.png'"):
            merge([*sources, other], tmp_path / "out")

    @pytest.mark.parametrize(
        ("make", "pattern"),
        [
            (lambda folder: write(folder / "x.parquet", some_rows(9)[::-1]), "is not sorted by file_name"),
            (lambda folder: write(folder / "x.parquet", some_rows(9), {"class_names": {"0": "x"}}), "other classes"),
            (lambda folder: folder / "missing", "no detections.parquet at .*missing"),
            (lambda folder: shutil.copy(sample_images()[0], folder / "x.parquet"), "is not a|Parquet magic"),
        ],
    )
    def test_what_cannot_be_merged_is_one_line(self, tmp_path, make, pattern):
        first = write(tmp_path / "first.parquet", some_rows(3, prefix="z"))
        with pytest.raises((ValueError, OSError), match=pattern) as caught:
            merge([first, make(tmp_path)], tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out" / "detections.parquet").exists()

    def test_a_full_disk_leaves_what_was_there(self, tmp_path, monkeypatch):
        files = [write(tmp_path / f"{part}.parquet", some_rows(9, prefix=part)) for part in "ab"]
        merge(files, tmp_path / "out")
        before = (tmp_path / "out" / "detections.parquet").read_bytes()

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(merging.TableWriter, "close", full)
        with pytest.raises(OSError, match="No space left"):
            merge([files[0], write(tmp_path / "c.parquet", some_rows(9, prefix="c"))], tmp_path / "out")
        assert (tmp_path / "out" / "detections.parquet").read_bytes() == before
        assert not list((tmp_path / "out").glob(".*"))

    @pytest.mark.slow
    def test_memory_does_not_grow_with_the_rows(self, tmp_path):
        script = (
            "import resource, sys; from detpost.runs.merge import merge; merge(sys.argv[2:], sys.argv[1]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        peaks = []
        for count in (2_000, 40_000):
            files = []
            for part in range(2):
                path = tmp_path / f"{count}-{part}.parquet"
                writer = TableWriter(path, schema(KNOWN))
                block = some_rows(1000)
                for start in range(part, count, 2000):
                    renamed = [{**row, "file_name": f"{start:08}-{n:04}"} for n, row in enumerate(block)]
                    writer.add(table_of(renamed))
                writer.close()
                files.append(str(path))
            ran = subprocess.run(
                [sys.executable, "-c", script, str(tmp_path / "out"), *files],
                capture_output=True, text=True, check=True, timeout=300,
            )  # fmt: skip
            peaks.append(int(ran.stdout))
        assert peaks[1] - peaks[0] < 100_000  # KiB; all rows of the larger one as objects take several times as many


def test_predict_gives_the_same_rows(run):
    found = Detector.load("tiny", device="cpu", threshold=0.3).predict(sample_images()[3])[0]
    row = {row["file_name"]: row for row in read(run / "detections.parquet")}["Z.png"]
    assert np.abs(np.array(row["boxes"]) - found["boxes"].numpy()).max() < 1e-3
    assert row["labels"] == found["labels"].tolist()
