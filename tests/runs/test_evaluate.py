"""COCO's numbers, against pycocotools."""

import contextlib
import copy
import io
import json
import warnings

import numpy as np
import pytest
from typer.testing import CliRunner

from detpost.command.cli import app, main
from detpost.runs.detect import detect
from detpost.runs.evaluate import METRICS, evaluate, evaluate_model
from detpost.zoo import SAMPLES

TRUTH = SAMPLES / "ground_truth.json"
# pycocotools sums the same numbers in another order.
LAST_PLACES = {"rtol": 0, "atol": 1e-12}


def polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def rle(box, size=300):
    mask = pytest.importorskip("pycocotools.mask")
    merged = mask.merge(mask.frPyObjects(polygon(*box), size, size))
    return {"size": [size, size], "counts": merged["counts"].decode()}


def scene(seed):
    """Make a ground truth with crowds, empty images and gaps in its ids, and results with ties and strangers."""
    random = np.random.default_rng(seed)
    categories = [3, 7, 90][: 1 + seed % 3]
    images = [{"id": 5 * n + 2, "file_name": f"{n}.png", "width": 300, "height": 300} for n in range(8)]
    annotations, results = [], []
    for image in images[:7]:
        for _ in range(random.integers(0, 12)):
            box = [float(value) for value in (*random.integers(0, 150, 2), *random.choice([5, 20, 33, 70, 96, 150], 2))]
            crowd = bool(random.random() < 0.15)
            annotations.append(
                {
                    "id": len(annotations) + (0 if seed == 0 else 1),  # 0 counts as no match: pycocotools' own trap
                    "image_id": image["id"],
                    "category_id": int(random.choice(categories)),
                    "bbox": box,
                    "area": box[2] * box[3] * random.choice([1, 0.6]),
                    "iscrowd": int(crowd),
                    "segmentation": rle(box) if crowd else polygon(*box),
                }
            )
            for _ in range(random.integers(0, 4)):
                found = np.array(box) + random.integers(-4, 5, 4)
                found = [*found[:2].tolist(), *np.maximum(found[2:], 1).tolist()]
                results.append(
                    {
                        "image_id": image["id"],
                        "category_id": int(random.choice([*categories, *categories, 55])),
                        "bbox": found,
                        "segmentation": rle(found),
                        "score": float(random.integers(0, 8) / 8),
                    }
                )
    named = [{"id": category, "name": f"c{category}"} for category in [*categories, 44]]
    return {"images": images, "annotations": annotations, "categories": named}, results


def pycocotools(truth, results, iou_type="bbox", max_dets=(1, 10, 100)):
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = coco.COCO()
        loaded.dataset = copy.deepcopy(truth)
        loaded.createIndex()
        counter = COCOeval(loaded, loaded.loadRes(copy.deepcopy(results)), iou_type)
        counter.params.maxDets = list(max_dets)
        counter.evaluate()
        counter.accumulate()
        counter.summarize()
    return counter


@pytest.fixture
def write(tmp_path):
    def write(name, data):
        (tmp_path / name).write_text(data if isinstance(data, str) else json.dumps(data))
        return tmp_path / name

    return write


@pytest.mark.peers
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("max_dets", [(1, 10, 100), (1, 2, 3), (2, 50, 1000)], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_the_numbers_are_those_of_pycocotools(write, seed, max_dets, iou_type):
    truth, results = scene(seed)
    ours = evaluate(write("gt.json", truth), write("results.json", results), iou_type=iou_type, max_dets=max_dets)
    theirs = pycocotools(truth, results, iou_type, max_dets)
    numbers = list(ours.metrics.values())
    # pycocotools takes AP, and AP alone, at 100 per image, whatever max_dets says, and has none where 100 is not in it.
    start = 0 if max_dets[2] == 100 else 1
    np.testing.assert_allclose(numbers[start:], theirs.stats[start:], **LAST_PLACES)
    precision = theirs.eval["precision"]
    means = [
        values[values > -1].mean() if (values > -1).any() else -1 for values in np.moveaxis(precision, 2, 0)[..., 0, -1]
    ]
    np.testing.assert_allclose([row.ap for row in ours.classes], means, **LAST_PLACES)
    assert [row.category_id for row in ours.classes] == sorted(row["id"] for row in truth["categories"])
    assert ours.classes[[row.category_id for row in ours.classes].index(44)].ap == -1
    assert min(numbers) >= -1
    assert max(numbers) > 0.02
    strangers = sum(row["category_id"] == 55 for row in results)
    assert any(note.startswith(f"{strangers} of {len(results)} results have a category") for note in ours.notes)
    assert any("id 0" in note for note in ours.notes) == (seed == 0)


@pytest.mark.peers
def test_results_of_masks_alone_are_evaluated_on_boxes_as_pycocotools_does(write):
    truth, results = scene(4)
    for row in results:
        del row["bbox"]
    ours = evaluate(write("gt.json", truth), results)
    np.testing.assert_allclose(list(ours.metrics.values()), pycocotools(truth, results).stats, **LAST_PLACES)


@pytest.mark.peers
def test_the_shipped_detectors_numbers_are_those_of_pycocotools(tmp_path):
    found, summary = evaluate_model(TRUTH, SAMPLES, out=tmp_path, model="tiny", device="cpu")
    theirs = pycocotools(json.loads(TRUTH.read_text()), json.loads((tmp_path / "detections.json").read_text()))
    np.testing.assert_allclose(list(found.metrics.values()), theirs.stats, **LAST_PLACES)
    assert found.metrics["AP50"] > 0.9
    assert summary.images == found.images == 4
    again, summary = evaluate_model(TRUTH, SAMPLES, out=tmp_path, model="tiny", device="cpu")
    assert (again, summary.finished) == (found, 0)


def test_categories_are_found_by_name_whatever_their_ids(tmp_path, write):
    truth = json.loads(TRUTH.read_text())
    for row in truth["categories"]:
        row |= {"id": 1000 - row["id"] * 11}
    for row in truth["annotations"]:
        row |= {"category_id": 1000 - row["category_id"] * 11}
    moved, _ = evaluate_model(write("gt.json", truth), SAMPLES, model="tiny", device="cpu")
    plain, _ = evaluate_model(TRUTH, SAMPLES, model="tiny", device="cpu")
    assert moved.metrics == pytest.approx(plain.metrics, abs=1e-12)


def test_no_results_are_zero_and_not_an_error(write):
    truth, _ = scene(1)
    found = evaluate(write("gt.json", truth), write("results.json", []))
    assert found.metrics["AP"] == found.metrics["AR100"] == 0
    assert found.results == 0


def test_a_ground_truth_without_ids_areas_and_crowd_flags_is_completed(write):
    truth, results = scene(2)
    for number, row in enumerate(truth["annotations"], start=1):
        row |= {"id": number, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]}
    whole = evaluate(write("whole.json", truth), results)
    for row in truth["annotations"]:
        for name in ("id", "iscrowd", "area"):
            del row[name]
    assert evaluate(write("bare.json", truth), results).metrics == whole.metrics


BASE = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "categories": [{"id": 1, "name": "a"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}],
}
ROW = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "score": 0.5}


@pytest.mark.parametrize(
    ("truth", "results", "pattern"),
    [
        (
            BASE,
            [ROW, {**ROW, "image_id": 7}, {**ROW, "image_id": 9}],
            r"2 image ids are not in .*, the first is 7",
        ),
        (BASE, '[{"image_id": 1,', r"results.json is not JSON: .* in line 1, column"),
        ('{"images"', [ROW], r"gt.json is not JSON: .* in line 1, column 10"),
        ({**BASE, "annotations": []}, [ROW], r"gt.json has no annotations"),
        ([], [ROW], r"gt.json is not a COCO annotation file: it must be an object with a list of images"),
        ({**BASE, "categories": [{"name": "a"}]}, [ROW], r"1 of 1 categories have no whole number as id"),
        ({**BASE, "images": BASE["images"] * 2}, [ROW], r"1 ids stand more than once in images, the first is 1"),
        ({**BASE, "annotations": [{**BASE["annotations"][0], "image_id": 3}]}, [ROW], r"1 annotations are of no image"),
        ({**BASE, "annotations": [{"id": 1, "image_id": 1, "category_id": 1}]}, [ROW], r"1 annotations have no bbox"),
        (BASE, {"results": [ROW]}, r"results.json is not a COCO results file: it must be a list"),
        (BASE, [{**ROW, "bbox": [0, 0, 4]}], r"the bbox of result 1 must be x, y, width, height; got \[0, 0, 4\]"),
        (BASE, [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4]}], r"result 1 has no score; it has"),
        (BASE, [{"image_id": 1, "category_id": 1, "score": 1.0}], r"result 1 has no bbox or segmentation"),
        (BASE, '[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "score": NaN}]', r"score of result 1 must be"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_and_status_2(write, truth, results, pattern, monkeypatch, capsys):
    arguments = ["evaluate", str(write("gt.json", truth)), "--results", str(write("results.json", results))]
    monkeypatch.setattr("sys.argv", ["detpost", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(error)


def test_nesting_that_is_too_deep_is_one_line(write):
    deep = "[" * 100_000 + "]" * 100_000
    with pytest.raises(ValueError, match=r"gt.json is nested too deeply") as caught:
        evaluate(write("gt.json", '{"images": ' + deep + "}"), [ROW])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"results.json is nested too deeply"):
        evaluate(write("gt.json", BASE), write("results.json", '{"a":' * 5000))


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"iou_type": "keypoints"}, "unknown iou_type 'keypoints': take one of bbox, segm"),
        ({"iou_type": "segm"}, "result 1 has no segmentation"),
        ({"max_dets": (1, 10)}, "three ascending counts"),
        ({"max_dets": (10, 1, 100)}, "three ascending counts"),
    ],
)
def test_an_option_out_of_range_is_one_line(write, options, pattern):
    truth, results = scene(1)
    rows = [{name: row[name] for name in ROW} for row in results]
    with pytest.raises(ValueError, match=pattern):
        evaluate(write("gt.json", truth), rows, **options)


def test_an_image_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"4 of 4 images of .* are not in .*, the first is 'garden.png'"):
        evaluate_model(TRUTH, tmp_path, model="tiny")


def test_the_command_prints_the_twelve_numbers(tmp_path):
    detect([SAMPLES], tmp_path, threshold=0.1, device="cpu")
    arguments = ["evaluate", str(TRUTH), "--results", str(tmp_path / "detections.json")]
    shown = CliRunner().invoke(app, [*arguments, "--per-class", "--json", str(tmp_path / "numbers.json")])
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert tuple(found["metrics"]) == METRICS
    for name, value in found["metrics"].items():
        line = next(line for line in shown.output.splitlines() if f" {name} " in line)
        assert f"{value:.3f}" in line
    assert len(found["classes"]) == 10
    printed = CliRunner().invoke(app, [*arguments, "--json", "-"])
    assert json.loads(printed.output) == found
    model = ["evaluate", str(TRUTH), "--model", "tiny", "--images", str(SAMPLES), "--threshold", "0.1", "--json", "-"]
    assert json.loads(CliRunner().invoke(app, model).output)["metrics"] == found["metrics"]
    assert isinstance(CliRunner().invoke(app, [*arguments, "--model", "tiny"]).exception, ValueError)
    assert isinstance(CliRunner().invoke(app, ["evaluate", str(TRUTH)]).exception, ValueError)
