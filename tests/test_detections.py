from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from detpost import DecodeSpec, DetectionPostProcessor, Detections
from detpost.detections import split_by_image
from tests.mixin import assert_same, one_line


def three_images(dtype=torch.float32):
    """Two detections, none, one; the slots between are fillers."""
    return Detections(
        scores=torch.tensor([[0.75, 0.5, 0.0], [0.0, 0.0, 0.0], [0.25, 0.0, 0.0]], dtype=dtype),
        labels=torch.tensor([[2, 0, -1], [-1, -1, -1], [1, -1, -1]]),
        boxes=torch.tensor(
            [[[1, 2, 11, 22], [5, 5, 6, 9], [0] * 4], [[0] * 4] * 3, [[0, 0, 3, 4], [0] * 4, [0] * 4]], dtype=dtype
        ),
        queries=torch.tensor([[7, 3, -1], [-1, -1, -1], [0, -1, -1]]),
        valid=torch.tensor([[True, True, False], [False] * 3, [True, False, False]]),
    )


EMPTY = Detections(
    torch.zeros(0, 3),
    torch.zeros(0, 3).long(),
    torch.zeros(0, 3, 4),
    torch.zeros(0, 3).long(),
    torch.zeros(0, 3).bool(),
)
NO_SLOTS = Detections(
    torch.zeros(2, 0),
    torch.zeros(2, 0).long(),
    torch.zeros(2, 0, 4),
    torch.zeros(2, 0).long(),
    torch.zeros(2, 0).bool(),
)


def test_it_is_a_tuple_of_five_in_this_order():
    assert Detections._fields == ("scores", "labels", "boxes", "queries", "valid")
    assert isinstance(three_images(), tuple)


def test_it_passes_through_compile_as_argument_and_result():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(detections):
        return detections._replace(boxes=detections.boxes * 2)

    result = doubled(three_images())
    assert isinstance(result, Detections)
    assert_same(result, three_images()._replace(boxes=three_images().boxes * 2))


def test_it_passes_through_export_as_argument_and_result():
    class Doubled(torch.nn.Module):
        def forward(self, detections):
            return detections._replace(boxes=detections.boxes * 2)

    program = torch.export.export(Doubled(), (three_images(),))
    result = program.module()(three_images())
    assert isinstance(result, Detections)
    assert_same(result.boxes, three_images().boxes * 2)


class TestToList:
    def test_gives_the_valid_detections_of_each_image(self):
        first, second, third = three_images().to_list()
        assert list(first) == ["scores", "labels", "boxes", "queries"]
        assert {name: values.tolist() for name, values in first.items()} == {
            "scores": [0.75, 0.5],
            "labels": [2, 0],
            "boxes": [[1.0, 2.0, 11.0, 22.0], [5.0, 5.0, 6.0, 9.0]],
            "queries": [7, 3],
        }
        assert {name: tuple(values.shape) for name, values in second.items()} == {
            "scores": (0,),
            "labels": (0,),
            "boxes": (0, 4),
            "queries": (0,),
        }
        assert third["labels"].tolist() == [1]

    def test_of_nothing_is_nothing(self):
        assert EMPTY.to_list() == []
        assert [image["boxes"].shape for image in NO_SLOTS.to_list()] == [(0, 4), (0, 4)]

    def test_stays_differentiable(self):
        boxes = three_images().boxes.requires_grad_()
        three_images()._replace(boxes=boxes).to_list()[0]["boxes"].sum().backward()
        assert boxes.grad[0, :2].eq(1).all()
        assert boxes.grad[1].eq(0).all()

    def test_does_not_share_memory_with_the_slots(self):
        detections = three_images()
        detections.to_list()[0]["scores"].zero_()
        assert_same(detections, three_images())


class TestToCoco:
    def test_gives_results_that_json_reads_back(self):
        rows = three_images().to_coco([10, 11, "c"])
        assert json.loads(json.dumps(rows)) == [
            {"image_id": 10, "category_id": 2, "bbox": [1.0, 2.0, 10.0, 20.0], "score": 0.75},
            {"image_id": 10, "category_id": 0, "bbox": [5.0, 5.0, 1.0, 4.0], "score": 0.5},
            {"image_id": "c", "category_id": 1, "bbox": [0.0, 0.0, 3.0, 4.0], "score": 0.25},
        ]

    @pytest.mark.parametrize(
        "category_ids",
        [[90, 17, 5], (90, 17, 5), {0: 90, 1: 17, 2: 5}, np.array([90, 17, 5]), torch.tensor([90, 17, 5])],
        ids=lambda table: type(table).__name__,
    )
    @pytest.mark.parametrize("image_ids", [range(3), np.arange(3), torch.arange(3)], ids=lambda ids: type(ids).__name__)
    def test_translates_labels_into_plain_numbers(self, category_ids, image_ids):
        rows = json.loads(json.dumps(three_images().to_coco(image_ids, category_ids)))
        assert [(row["image_id"], row["category_id"]) for row in rows] == [(0, 5), (0, 90), (2, 17)]

    @pytest.mark.parametrize("category_ids", [[90, 17], {0: 90, 1: 17}], ids=["list", "mapping"])
    def test_a_label_without_a_category_is_one_clear_line(self, category_ids):
        with pytest.raises(ValueError, match="category_ids has no entry for label 2; it has 2 entries") as error:
            three_images().to_coco([0, 1, 2], category_ids)
        one_line(error)

    @pytest.mark.parametrize("ids", [[], [1, 2], [1, 2, 3, 4]])
    def test_another_number_of_ids_than_images_is_one_clear_line(self, ids):
        with pytest.raises(ValueError, match=f"one id for each of 3 images; got {len(ids)}") as error:
            three_images().to_coco(ids)
        one_line(error)

    def test_of_nothing_is_nothing(self):
        assert EMPTY.to_coco([]) == NO_SLOTS.to_coco([1, 2]) == []

    def test_detaches(self):
        detections = three_images()._replace(boxes=three_images().boxes.requires_grad_())
        assert len(detections.to_coco([1, 2, 3])) == 3


class TestToKornia:
    def test_gives_class_score_and_xywh(self):
        first, second, third = three_images().to_kornia()
        assert first.tolist() == [[2.0, 0.75, 1.0, 2.0, 10.0, 20.0], [0.0, 0.5, 5.0, 5.0, 1.0, 4.0]]
        assert second.shape == (0, 6)
        assert third.tolist() == [[1.0, 0.25, 0.0, 0.0, 3.0, 4.0]]

    def test_of_nothing_is_nothing(self):
        assert EMPTY.to_kornia() == []
        assert [rows.shape for rows in NO_SLOTS.to_kornia()] == [(0, 6), (0, 6)]

    def test_keeps_the_dtype_of_the_scores(self):
        assert three_images(torch.float64).to_kornia()[0].dtype == torch.float64


class TestToSupervision:
    def test_gives_one_image(self):
        supervision = pytest.importorskip("supervision")
        image = three_images().to_supervision(0)
        assert isinstance(image, supervision.Detections)
        assert image.xyxy.tolist() == [[1.0, 2.0, 11.0, 22.0], [5.0, 5.0, 6.0, 9.0]]
        assert image.confidence.tolist() == [0.75, 0.5]
        assert image.class_id.tolist() == [2, 0]
        assert image.data["query"].tolist() == [7, 3]

    @pytest.mark.parametrize("names", [["a", "b", "c"], {0: "a", 2: "c"}], ids=["list", "mapping"])
    def test_names_the_classes(self, names):
        pytest.importorskip("supervision")
        assert three_images().to_supervision(0, names).data["class_name"].tolist() == ["c", "a"]

    def test_a_label_is_its_own_name_where_none_are_given(self):
        pytest.importorskip("supervision")
        assert three_images().to_supervision(0).data["class_name"].tolist() == ["2", "0"]

    def test_supervision_merges_filters_and_writes_what_it_gets(self):
        supervision = pytest.importorskip("supervision")
        images = [three_images().to_supervision(index, ["a", "b", "c"]) for index in range(3)]
        together = supervision.Detections.merge(images)
        assert together.data["class_name"].tolist() == ["c", "a", "b"]
        assert together[together.confidence > 0.3].data["class_name"].tolist() == ["c", "a"]
        scene = np.zeros((60, 60, 3), np.uint8)
        written = supervision.LabelAnnotator().annotate(scene.copy(), images[0])
        assert (written != scene).any()

    def test_a_label_without_a_name_is_one_clear_line(self):
        pytest.importorskip("supervision")
        with pytest.raises(ValueError, match="class_names has no entry for label 2; it has 2 entries") as error:
            three_images().to_supervision(0, ["a", "b"])
        one_line(error)

    def test_an_empty_image_is_empty(self):
        pytest.importorskip("supervision")
        for detections in (three_images(), NO_SLOTS):
            image = detections.to_supervision(1, ["a", "b", "c"])
            assert len(image) == 0
            assert image.xyxy.shape == (0, 4)

    def test_takes_what_still_has_a_gradient(self):
        pytest.importorskip("supervision")
        logits = torch.randn(1, 4, 2, requires_grad=True)
        assert len(DetectionPostProcessor(DecodeSpec(top_k=3))(logits, torch.rand(1, 4, 4)).to_supervision(0)) == 3

    def test_a_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "supervision", None)
        with pytest.raises(ImportError, match=r"detpost\[viz\]") as error:
            three_images().to_supervision(0)
        one_line(error)


def test_an_exported_program_is_saved_and_loaded_with_its_detections(tmp_path):
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=5)
    inputs = (torch.randn(2, 6, 3), torch.rand(2, 6, 4), torch.tensor([[10, 20], [30, 40]]))
    torch.export.save(torch.export.export(post, inputs), tmp_path / "post.pt2")
    torch.save(inputs, tmp_path / "inputs.pt")
    program = (
        "import sys, torch, detpost\n"
        "program = torch.export.load('post.pt2').module()\n"
        "assert 'detpost.postprocess' not in sys.modules\n"  # the graph decodes, not this package
        "found = program(*torch.load('inputs.pt'))\n"
        "assert type(found) is detpost.Detections\n"
        "torch.save(tuple(found), 'found.pt')"
    )
    other = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode == 0, other.stderr
    for loaded in (torch.export.load(tmp_path / "post.pt2").module()(*inputs), torch.load(tmp_path / "found.pt")):
        for name, value, wanted in zip(Detections._fields, loaded, post(*inputs), strict=True):
            assert torch.equal(value, wanted), name


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(0, 4), (1, 0), (1, 7), (3, 5)])
def test_split_values_are_copies_of_what_a_mask_takes(share, shape):
    valid = torch.rand(shape) < share
    values = torch.randn(*shape, 4), torch.arange(valid.numel()).reshape(shape)
    before = [value.clone() for value in values]
    found = split_by_image(valid, *values)
    assert len(found) == len(valid)
    for image, kept, *rows in zip(found, valid, *before, strict=True):
        for got, all_rows in zip(image, rows, strict=True):
            assert torch.equal(got, all_rows[kept])
            got.zero_()
    assert all(torch.equal(value, same) for value, same in zip(values, before, strict=True))
