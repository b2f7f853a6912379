"""detpost keeps its own rule: both halves of the checker over every public function, module and file of the package."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import detpost
from detpost.purity import check_paths, check_source
from detpost.purity.checker import check

NAMESPACES = ("detpost", "detpost.boxes", "detpost.losses", "detpost.metrics")
PACKAGE = Path(next(iter(detpost.__path__)))

generator = torch.Generator().manual_seed(0)
logits = torch.randn(2, 30, 8, generator=generator)
boxes = torch.rand(2, 30, 4, generator=generator) * 0.5 + 0.25
corners = torch.tensor([[[1.0, 2.0, 5.0, 7.0], [0.0, 0.0, 3.0, 4.0]]]).repeat(2, 1, 1)
sizes = torch.tensor([[480, 640], [320, 200]])
matrix = torch.tensor([[1.0, 0.0, 4.0], [0.0, 1.0, 2.0], [0.0, 0.0, 1.0]])
maps = torch.rand(2, 2, 8, 8, generator=generator).softmax(1)
volumes = torch.rand(1, 2, 5, 5, 5, generator=generator).softmax(1)
ids = (torch.rand(2, 1, 8, 8, generator=generator) > 0.5).long()
volume_ids = (torch.rand(1, 1, 5, 5, 5, generator=generator) > 0.5).long()
masks = torch.zeros(2, 1, 8, 8).index_fill(2, torch.tensor([2, 3, 4]), 1.0)


def post(**spec):
    return detpost.DetectionPostProcessor(detpost.DecodeSpec(top_k=10, **spec))


# What each public callable is checked with: subjects, each with its inputs. A class stands for what it makes.
EXAMPLES = {
    "detpost.DetectionPostProcessor": [
        (post(), (logits, boxes, sizes)),
        (post(score_threshold=0.5, clip=True, box_format="xywh"), (logits, boxes)),
        (post(activation="softmax", background="last", selection="per_query"), (logits, boxes, sizes)),
    ],
    "detpost.select_top_k": [(lambda scores: detpost.select_top_k(scores, 5), (logits.flatten(1),))],
    "detpost.boxes.clip": [(lambda b, s: detpost.boxes.clip(b, s), (corners, sizes))],
    "detpost.boxes.convert": [
        (lambda b, source=source, target=target: detpost.boxes.convert(b, source, target), (boxes,))
        for source, target in (("cxcywh", "xyxy"), ("xyxy", "cxcywh"), ("xywh", "xyxy"))
    ],
    "detpost.boxes.hflip": [(lambda b: detpost.boxes.hflip(b, 640.0), (corners,))],
    "detpost.boxes.scale": [(lambda b, s: detpost.boxes.scale(b, s), (boxes, sizes))],
    "detpost.boxes.transform": [(lambda b, m: detpost.boxes.transform(b, m), (corners, matrix))],
    "detpost.boxes.unletterbox": [(lambda b, s: detpost.boxes.unletterbox(b, s, (640, 640)), (corners, sizes))],
    "detpost.boxes.vflip": [(lambda b: detpost.boxes.vflip(b, 480.0), (corners,))],
    "detpost.losses.distance_transform_edt": [(lambda m: detpost.losses.distance_transform_edt(m), (masks,))],
    "detpost.losses.signed_distance_transform": [(lambda m: detpost.losses.signed_distance_transform(m), (masks,))],
    "detpost.losses.HausdorffSchedule": [
        (detpost.losses.HausdorffSchedule("linear"), (torch.tensor(0.5, requires_grad=True), torch.tensor(2.0))),
    ],
    "detpost.metrics.average_surface_distance": [
        (lambda a, b: detpost.metrics.average_surface_distance(a, b, use_subvoxels=True), (masks, masks.roll(1, -2))),
    ],
    "detpost.metrics.surface_dice": [
        (lambda a, b: detpost.metrics.surface_dice(a, b, 1.0), (masks, masks.roll(1, -2))),
    ],
    "detpost.metrics.hausdorff_distance": [
        (lambda a, b: detpost.metrics.hausdorff_distance(a, b), (masks, masks.flip(-1).roll(1, -2))),
        (lambda a, b: detpost.metrics.hausdorff_distance(a, b, percentile=95.0), (masks, masks.roll(1, -2))),
    ],
}
for loss, function, example in (
    ("HausdorffERLoss", "hausdorff_er_loss", (maps, ids)),
    ("HausdorffERLoss3D", "hausdorff_er_loss_3d", (volumes, volume_ids)),
    ("HausdorffDTLoss", "hausdorff_dt_loss", (maps, maps.flip(-1))),
    ("LogHausdorffDTLoss", "log_hausdorff_dt_loss", (maps, maps.flip(-1))),
    ("BoundaryLoss", "boundary_loss", (maps, maps.flip(-1))),
    ("GeneralizedSurfaceLoss", "generalized_surface_loss", (maps, maps.flip(-1))),
):
    losses = importlib.import_module("detpost.losses")
    options = {"k": 2} if "ER" in loss else {}  # every erosion is the same lines again
    EXAMPLES[f"detpost.losses.{loss}"] = [(getattr(losses, loss)(**options), example)]
    EXAMPLES[f"detpost.losses.{function}"] = [(functools.partial(getattr(losses, function), **options), example)]

# Public names that take or make no tensors in a forward pass, and why they are not run.
NOT_RUN = {
    "detpost.DecodeSpec": "settings",
    "detpost.presets": "a list of names",
    "detpost.Detections": "a container; its conversions leave tensors for the host by their purpose",
    "detpost.metrics.Metric": "a base; what it holds is below",
    "detpost.metrics.HausdorffDistance": "gathers what hausdorff_distance gives",
    "detpost.metrics.AverageSurfaceDistance": "gathers what average_surface_distance gives",
    "detpost.metrics.SurfaceDice": "gathers what surface_dice gives",
    "detpost.Detector": "images in, plain Python out, on the host by its purpose",
}


def public_callables():
    """Every public callable of the namespaces, each under the name of the first namespace that has it."""
    seen = {}
    for namespace in NAMESPACES:
        module = importlib.import_module(namespace)
        names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        listed = hasattr(module, "__all__")
        for name in names:
            value = getattr(module, name)
            home = getattr(value, "__module__", "")
            own = home.startswith("detpost") if listed else home == namespace  # what a module imports is not its own
            if callable(value) and own and not isinstance(value, types.ModuleType):
                seen.setdefault(id(value), f"{namespace}.{name}")
    return sorted(seen.values())


@pytest.mark.parametrize("name", public_callables())
def test_every_public_callable_is_pure(name):
    if name in NOT_RUN:
        assert name not in EXAMPLES
        return
    assert name in EXAMPLES, f"{name} is public and has no row in EXAMPLES: add its inputs, or a reason to NOT_RUN"
    for subject, inputs in EXAMPLES[name]:
        report = check(subject, *inputs)
        assert report.clean, str(report)


def test_the_table_names_nothing_that_is_gone():
    assert set(EXAMPLES) | set(NOT_RUN) <= set(public_callables())


def test_every_file_of_the_package_is_free_of_in_place_writes():
    reports = [report for report in check_paths([PACKAGE]) if "kernels" not in Path(report.subject).parts]
    assert len(reports) > 20
    assert "\n".join(str(report) for report in reports if not report.clean) == ""


def test_every_loss_and_post_processor_module_is_reached():
    """A module class of the package that is public must be among the subjects."""
    checked = {type(subject) for rows in EXAMPLES.values() for subject, _ in rows if isinstance(subject, nn.Module)}
    for namespace in NAMESPACES:
        for name, value in vars(importlib.import_module(namespace)).items():
            if isinstance(value, type) and issubclass(value, nn.Module) and not name.startswith("_"):
                assert value in checked, f"{namespace}.{name}"


def test_the_test_would_fail_on_a_finding():
    source = inspect.getsource(detpost.boxes) + "\n\ndef broken(boxes: Tensor) -> Tensor:\n    boxes += 1\n"
    assert [finding.source for finding in check_source(source)] == ["boxes += 1"]

    def broken(value):
        result = detpost.boxes.hflip(value, 10.0)
        result += 1
        return result

    assert not check(broken, corners).clean


def test_the_rule_codes_in_use_are_those_of_the_table():
    from detpost.purity import RULES

    assert list(RULES) == sorted(RULES)
    assert all(dataclasses.is_dataclass(rule) for rule in RULES.values())
    assert {module.name for module in pkgutil.iter_modules([str(PACKAGE / "purity")])} >= {"rules", "static", "checker"}
