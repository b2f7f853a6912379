"""The proof must fail where it should."""

import json
from dataclasses import replace

import pytest
import torch

from detpost import DecodeSpec, DetectionPostProcessor, Detector
from detpost.export import package, to_onnx, to_openvino
from detpost.export.heads import HEADS, columns_of
from detpost.verify import verify
from detpost.verify.compare import raw_cases
from scripts.same_answer import PlainTopK


class Wrong(DetectionPostProcessor):
    """A post-processor with one planted fault."""

    def __init__(self, fault):
        super().__init__(DecodeSpec())
        self.fault = fault

    def forward(self, logits, boxes, image_sizes=None):
        found = super().forward(logits, boxes, image_sizes)
        return {
            "labels": lambda: found._replace(labels=torch.where(found.labels == 3, 4, found.labels)),
            "scores": lambda: found._replace(scores=found.scores + 1e-4),
            "boxes": lambda: found._replace(boxes=found.boxes[..., [1, 0, 3, 2]]),
            "valid": lambda: found._replace(valid=found.valid & (found.scores > 0.9)),
            "queries": lambda: found._replace(queries=found.queries + 1),
            "shape": lambda: type(found)(*(part[:, :-1] for part in found)),
        }[self.fault]()


@pytest.mark.parametrize("fault", ["labels", "scores", "boxes", "valid", "queries", "shape"])
def test_every_planted_fault_is_found(fault):
    report = verify(Wrong(fault), "rtdetr", num_queries=30, num_classes=20)
    assert not report.ok
    assert "NOT the same answer" in str(report)


def test_a_runtimes_ties_are_found_and_the_exact_ones_pass():
    assert not verify(PlainTopK(DecodeSpec()), "rtdetr", num_queries=300, num_classes=20).ok
    assert verify(DetectionPostProcessor(DecodeSpec()), "rtdetr", num_queries=30, num_classes=20).ok


def test_given_raw_outputs_are_compared_too():
    spec = DecodeSpec()
    raw = (torch.randn(2, 30, 20), torch.rand(2, 30, 4), torch.tensor([[10, 20], [30, 40]]))
    report = verify(DetectionPostProcessor(spec), "rtdetr", raw=[raw], num_queries=30, num_classes=20)
    assert report.checks[-1].name == "given 0"
    assert report.checks[-1].compared == 2 * 300


def test_a_fixed_batch_is_fed_in_parts(tmp_path):
    post = DetectionPostProcessor(DecodeSpec())
    to_onnx(post, tmp_path / "one.onnx", num_queries=30, num_classes=20, dynamic_batch=False)
    report = verify(tmp_path / "one.onnx", "rtdetr")
    assert report.ok, str(report)
    assert all(check.compared == 300 for check in report.checks)


def test_the_report_as_json_says_the_same():
    report = verify(Wrong("labels"), "rtdetr", num_queries=30, num_classes=20)
    said = json.loads(report.to_json())
    assert said["ok"] is report.ok is False
    assert len(said["checks"]) == len(report.checks) == len(list(raw_cases(30, 20)))


def test_generated_cases_hold_what_they_promise():
    cases = dict(raw_cases(40, 30))
    batches = {len(logits) for logits, _, _ in cases.values()}
    assert {1, 8} <= batches
    assert cases["all NaN"][0].isnan().all()
    assert cases["infinities and both zeros"][0].isinf().any()
    assert cases["quarter steps"][0].unique().numel() < 100
    assert any(len(sizes.unique(dim=0)) > 1 for _, _, sizes in cases.values())
    again = dict(raw_cases(40, 30))
    assert all(torch.equal(cases[name][1], again[name][1]) for name in cases)


def test_detectors_are_compared_by_matching_and_their_decode_to_the_bit(tmp_path):
    to_onnx("tiny", tmp_path / "tiny.onnx", keep_raw=True)
    report = verify(tmp_path / "tiny.onnx", "tiny")
    assert report.ok, str(report)
    assert sum(check.compared for check in report.checks if "decode" not in check.name) > 10
    assert any("decode of its own raw outputs" in check.name for check in report.checks)


def test_another_detector_is_not_the_same(tmp_path):
    to_onnx("tiny", tmp_path / "clipped.onnx", DecodeSpec(top_k=3))
    assert not verify(tmp_path / "clipped.onnx", "tiny", threshold=0.3).ok


def test_a_detector_is_not_compared_with_a_post_processor(tmp_path):
    with pytest.raises(ValueError, match=r"cannot compare a detector \(tiny\) with a post-processor"):
        verify("tiny", "rtdetr")
    post = DetectionPostProcessor(DecodeSpec())
    for name, queries in (("a", 10), ("b", 20)):
        to_onnx(post, tmp_path / f"{name}.onnx", num_queries=queries, num_classes=5)
    with pytest.raises(ValueError, match=r"\(10, 5\).*\(20, 5\)"):
        verify(tmp_path / "a.onnx", tmp_path / "b.onnx")
    to_onnx(post, tmp_path / "c.onnx", num_queries=10, num_classes=5, io="rtdetr")
    assert verify(tmp_path / "c.onnx", "rtdetr").ok


def test_packages_and_openvino_files_are_verified_too(tmp_path):
    post = DetectionPostProcessor(DecodeSpec(top_k=50))
    example = (torch.zeros(2, 30, 20), torch.zeros(2, 30, 4))
    package(post, example, tmp_path / "post.pt2", kind="export")
    to_openvino(post, tmp_path / "post.xml", num_queries=30, num_classes=20)
    for name in ("post.pt2", "post.xml"):
        report = verify(tmp_path / name, post)
        assert report.ok, str(report)
        assert report.checks[0].compared == 50
        assert not verify(tmp_path / name, Wrong("labels")).ok


def with_more(what, values, change=0.0, column=0):
    """Give the tiny detector something beside its boxes, one column of it off by ``change``."""
    plain = Detector.load("tiny", device="cpu", threshold=0.0)
    columns = columns_of(what)
    off = torch.tensor([change * (place == column) for place in range(len(columns))])

    def find(images, sizes, mask):
        found = plain.find(images, sizes, mask)
        queries = found.detections.queries.clamp(min=0)
        value = values[queries] + (off if len(columns) > 1 else off[0])
        return replace(found, beside={what: value})

    return Detector(plain.run, plain.prepare, plain.class_names, plain.device, 0.0, spec=plain.spec, find=find)


# In the unit of each kind of number: below what two runtimes may differ by, and above it; images are up to 640 wide.
CHANGES = {"x": (0.01, 5.0), "y": (0.01, 5.0), "score": (1e-4, 0.01), "angle": (1e-4, 0.01)}
NUMBERS = [(what, place) for row in HEADS for what, columns in row.columns.items() for place in range(len(columns))]


@pytest.mark.parametrize(("what", "column"), NUMBERS)
def test_each_number_beside_the_boxes_is_compared_in_its_own_unit(what, column):
    count = len(columns_of(what))
    shape = (300, 4, count) if count > 1 else (300,)
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    within, beyond = CHANGES[columns_of(what)[column]]
    for change, ok in ((within, True), (beyond, False)):
        report = verify(with_more(what, values, change, column), with_more(what, values))
        checks = [check for check in report.checks if check.name.endswith(what)]
        assert sum(check.compared for check in checks) > 5
        assert report.ok is ok, str(report)
        assert {check.ok for check in report.checks} - {check.ok for check in checks} <= {True}


def test_an_angle_next_to_a_quarter_turn_may_come_as_the_other():
    values = torch.tensor([3.0, 4.0, 9.0, 5.0, torch.pi / 2 - 1e-6]).expand(300, 5)
    turned = verify(with_more("oriented_boxes", values, 2e-6 - torch.pi, 4), with_more("oriented_boxes", values))
    assert turned.ok, str(turned)


def test_numbers_and_shapes_that_are_no_numbers_and_shapes_of_the_other_differ():
    values = torch.rand(300, 4, 3)
    for other in (values * torch.nan, values[:, :3]):
        assert not verify(with_more("keypoints", values), with_more("keypoints", other)).ok
    assert verify(with_more("keypoints", values * torch.nan), with_more("keypoints", values * torch.nan)).ok


def test_what_one_side_alone_gives_is_said():
    report = verify(with_more("keypoint_scores", torch.rand(300)), "tiny")
    assert "only one side gives keypoint_scores, which is not compared" in str(report)
