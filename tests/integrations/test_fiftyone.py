"""FiftyOne's interface: its own classes where it is installed, and a stand-in of what its documentation says elsewhere.

The stand-in has what is called here and no more: ``fiftyone.core.models.Model``, ``Detection``, ``Detections``, and of
a dataset ``values``, ``set_values`` by ``key_field`` and the loop of ``apply_model``. A real dataset needs MongoDB.
"""

import importlib.util
import os
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from detpost import Detector
from detpost.heads.masks import to_rle
from detpost.integrations import fiftyone as subject
from detpost.runs.detect import detect
from detpost.runs.parquet import TableWriter, schema, table_of
from detpost.zoo import sample_images


class Label:
    def __init__(self, **fields):
        self.__dict__.update(fields)

    def __getitem__(self, name):
        return getattr(self, name)


@pytest.fixture(params=["installed", "stand-in"])
def fiftyone(request, monkeypatch):
    """Give FiftyOne, or something of the same interface."""
    if request.param == "installed":
        if importlib.util.find_spec("fiftyone") is None:
            pytest.skip("FiftyOne is not installed")
        return pytest.importorskip("fiftyone")
    package, core, models = (types.ModuleType(name) for name in ("fiftyone", "fiftyone.core", "fiftyone.core.models"))
    package.Detection, package.Detections, package.core, core.models = Label, Label, core, models
    models.Model = type("Model", (), {"__enter__": lambda self: self, "__exit__": lambda self, *error: None})
    for module in (package, core, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


class Dataset:
    """What is called of a dataset."""

    def __init__(self, paths):
        self.fields = {str(path): {} for path in paths}

    def values(self, field):
        assert field == "filepath"
        return list(self.fields)

    def set_values(self, field, values, key_field=None):
        assert key_field == "filepath"
        for path, value in values.items():
            self.fields[path][field] = value  # a path that is not there is an error

    def apply_model(self, model, label_field, batch_size=None):
        paths = list(self.fields)
        with model:
            for start in range(0, len(paths), batch_size or 1):
                some = paths[start : start + (batch_size or 1)]
                images = [np.asarray(Image.open(path).convert("RGB")) for path in some]
                labels = model.predict_all(images) if batch_size else [model.predict(images[0])]
                for path, label in zip(some, labels, strict=True):
                    self.fields[path][label_field] = label


def values_of(label):
    return [(each.label, each.confidence, tuple(each.bounding_box)) for each in label.detections]


@pytest.fixture
def images(tmp_path):
    for path in sample_images():
        shutil.copy(path, tmp_path)
    return tmp_path


def test_apply_model_gives_what_predict_gives(fiftyone, images):
    detector = Detector.load("tiny", device="cpu", threshold=0.3)
    dataset = Dataset(sorted(images.glob("*.png")))
    model = subject.model(detector)
    dataset.apply_model(model, "one")
    dataset.apply_model(model, "many", batch_size=3)
    assert (model.media_type, model.ragged_batches, model.transforms) == ("image", True, None)
    for path, fields in dataset.fields.items():
        found = detector.predict(path)[0]
        assert len(found["scores"]) > 0
        width, height = Image.open(path).size
        for name in ("one", "many"):
            assert [each.label for each in fields[name].detections] == found["label_names"]
            boxes = np.array([each.bounding_box for each in fields[name].detections])
            corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1) * [width, height, width, height]
            np.testing.assert_allclose(corners, found["boxes"].numpy(), atol=1e-2)
            scores = [each.confidence for each in fields[name].detections]
            np.testing.assert_allclose(scores, found["scores"].numpy(), atol=1e-4)


def test_results_become_a_field_of_the_samples(fiftyone, images, tmp_path):
    pytest.importorskip("pyarrow")
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    out = tmp_path / "out"
    detect([images], out, formats=["parquet"], device="cpu", threshold=0.3)
    paths = [*sorted(images.glob("*.*g")), images / "elsewhere.png"]
    dataset = Dataset(paths)
    assert subject.add_results(dataset, out, "found", images) == 4
    for path, fields in dataset.fields.items():
        assert ("found" in fields) == (os.path.basename(path) not in ("broken.jpg", "elsewhere.png"))
    read = dict(subject.read_results(out / "detections.parquet"))
    assert read["broken.jpg"] is None
    assert sum(len(values_of(label)) for label in read.values() if label is not None) > 10
    with pytest.raises(ValueError, match=r"no image of .* is among the samples"):
        subject.add_results(dataset, out, "found", tmp_path / "other")


def test_masks_come_back_as_they_were(fiftyone, tmp_path):
    pytest.importorskip("pyarrow")
    random = torch.Generator().manual_seed(0)
    masks = torch.rand(6, 37, 53, generator=random) > 0.5
    masks[1] = masks[2, :, :9] = False
    masks[3] = True
    encoded = [{**each, "counts": each["counts"].decode()} for each in to_rle(masks)]
    whole = {"boxes": [[0.0, 0.0, 53.0, 37.0]] * 5 + [[10.5, 4.0, 20.25, 9.5]], "scores": [0.5] * 6}
    row = {"file_name": "a.png", "image_id": 1, "width": 53, "height": 37, "masks": encoded, **whole}
    writer = TableWriter(tmp_path / "detections.parquet", schema({"class_names": {}}))
    writer.add(table_of([{**row, "labels": [0] * 6, "names": ["x"] * 6}]))
    writer.close()
    ((_, label),) = subject.read_results(tmp_path)
    for mask, each in zip(masks[:5], label.detections, strict=False):
        assert (each.mask == mask.numpy()).all()
    assert (label.detections[5].mask == masks[5, 4:10, 10:21].numpy()).all()


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(ImportError, match="FiftyOne is not installed: pip install fiftyone"):
        subject.model(None)
