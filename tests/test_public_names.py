from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

import detpost

NAMES = ["DecodeSpec", "DetectionPostProcessor", "Detections", "boxes", "presets", "select_top_k"]
BOXES = ["clip", "convert", "hflip", "scale", "transform", "unletterbox", "vflip"]
HEAVY = [
    "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "kornia", "matplotlib", "torchvision", "typer",
    "supervision", "sklearn", "scipy", "PIL", "safetensors", "rich", "faster_coco_eval",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_contract_names_are_there(name):
    assert name in detpost.__all__
    assert hasattr(detpost, name)


def test_all_is_sorted_whole_and_true():
    # Capitals first, as the linter sorts them: classes, then modules and functions.
    assert detpost.__all__ == sorted(set(detpost.__all__), key=lambda name: (name[0].islower(), name))
    homes = {*detpost._MODULES, *detpost._HOMES}
    assert set(detpost.__all__) == homes
    for name in detpost.__all__:
        assert hasattr(detpost, name), name


def test_boxes_has_the_names_of_the_contract():
    assert set(BOXES) <= set(detpost.boxes.__all__)
    for name in BOXES:
        assert callable(getattr(detpost.boxes, name))


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("select_top_k", ["scores", "k"]),
        ("boxes.convert", ["boxes", "src", "dst"]),
        ("boxes.hflip", ["boxes", "width"]),
        ("boxes.vflip", ["boxes", "height"]),
        ("boxes.transform", ["boxes", "matrix"]),
        ("DetectionPostProcessor.forward", ["self", "logits", "boxes", "image_sizes"]),
        ("Detections.to_coco", ["self", "image_ids", "category_ids"]),
    ],
)
def test_arguments_have_the_names_of_the_contract(path, parameters):
    value = detpost
    for part in path.split("."):
        value = getattr(value, part)
    assert list(inspect.signature(value).parameters) == parameters


@pytest.mark.parametrize(
    ("path", "first"),
    [
        ("metrics.hausdorff_distance", ["a", "b", "percentile", "spacing"]),
        ("metrics.average_surface_distance", ["a", "b", "symmetric", "spacing"]),
        ("metrics.surface_dice", ["a", "b", "tolerance", "spacing"]),
        ("losses.signed_distance_transform", ["mask", "spacing"]),
        ("losses.BoundaryLoss.forward", ["self", "input", "target"]),
        ("losses.GeneralizedSurfaceLoss.forward", ["self", "input", "target"]),
        ("losses.HausdorffSchedule.forward", ["self", "base", "term"]),
    ],
)
def test_losses_and_metrics_begin_with_the_arguments_of_the_contract(path, first):
    space, *parts = path.split(".")
    value = importlib.import_module(f"detpost.{space}")
    for part in parts:
        value = getattr(value, part)
    assert list(inspect.signature(value).parameters)[: len(first)] == first


@pytest.mark.parametrize("name", ["boxes", "spec", "selection", "postprocess", "detections"])
def test_every_public_function_says_what_it_does(name):
    module = importlib.import_module(f"detpost.{name}")
    assert module.__doc__
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__, public
            # Its own, or the definition's, given on as it is.
            assert value.__module__ in (module.__name__, f"detpost.reference.{name}")


def test_import_brings_in_torch_and_numpy_alone():
    script = f"import sys, detpost; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"
