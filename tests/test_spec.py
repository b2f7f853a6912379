from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from detpost import DecodeSpec, presets
from tests.mixin import one_line

FAMILIES = {
    "rtdetr": DecodeSpec(),
    "rfdetr": DecodeSpec(clip=True),
    "lwdetr": DecodeSpec(),
    "deformable_detr": DecodeSpec(top_k=100),
    "conditional_detr": DecodeSpec(top_k=100),
    "dab_detr": DecodeSpec(top_k=100),
    "detr": DecodeSpec(activation="softmax", background="last", selection="per_query"),
    "yolos": DecodeSpec(activation="softmax", background="last", selection="per_query"),
    "table_transformer": DecodeSpec(activation="softmax", background="last", selection="per_query"),
}


def test_defaults_are_the_contract():
    assert dataclasses.asdict(DecodeSpec()) == {
        "activation": "sigmoid",
        "selection": "flat",
        "top_k": 300,
        "score_threshold": None,
        "background": "none",
        "box_format": "cxcywh",
        "clip": False,
    }


def test_a_spec_is_frozen_and_a_value():
    spec = DecodeSpec()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.top_k = 5
    assert spec == DecodeSpec()
    assert len({spec, DecodeSpec(), DecodeSpec(top_k=5)}) == 2
    assert eval(repr(spec)) == spec


def test_the_presets_are_the_families_of_the_contract():
    assert list(presets()) == list(FAMILIES)
    for name, spec in FAMILIES.items():
        assert DecodeSpec.preset(name) == spec


@pytest.mark.parametrize("name", FAMILIES)
def test_a_preset_changes_only_what_it_is_told(name):
    changed = DecodeSpec.preset(name, score_threshold=0.25, top_k=7)
    assert changed == dataclasses.replace(FAMILIES[name], score_threshold=0.25, top_k=7)
    assert DecodeSpec.preset(name) == FAMILIES[name], "an override must not stay"


def test_one_caller_cannot_change_the_presets_of_another():
    with pytest.raises((TypeError, AttributeError)):
        presets()[0] = "mine"
    with pytest.raises((TypeError, AttributeError)):
        presets().append("mine")


@pytest.mark.parametrize("threshold", [None, 0, 0.0, 0.5, 1, 1.0, np.float64(0.3)])
def test_thresholds_within_bounds_are_taken(threshold):
    assert DecodeSpec(score_threshold=threshold).score_threshold == threshold


@pytest.mark.parametrize(
    ("fields", "kind", "pattern"),
    [
        ({"activation": "relu"}, ValueError, "activation must be one of sigmoid, softmax; got 'relu'"),
        ({"activation": None}, ValueError, "activation must be one of"),
        ({"activation": ["sigmoid"]}, ValueError, "activation must be one of"),
        ({"selection": "all"}, ValueError, "selection must be one of flat, per_query; got 'all'"),
        ({"background": "middle"}, ValueError, "background must be one of none, first, last; got 'middle'"),
        ({"background": None}, ValueError, "background must be one of none"),
        ({"box_format": "yxyx"}, ValueError, "box_format must be one of cxcywh, xyxy, xywh; got 'yxyx'"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1; got 0"),
        ({"top_k": -1}, ValueError, "top_k must be at least 1; got -1"),
        ({"top_k": 3.0}, TypeError, "top_k must be an int; got 3.0"),
        ({"top_k": True}, TypeError, "top_k must be an int; got True"),
        ({"top_k": None}, TypeError, "top_k must be an int; got None"),
        ({"score_threshold": 1.01}, ValueError, r"within \[0, 1\]; got 1.01"),
        ({"score_threshold": -0.01}, ValueError, r"within \[0, 1\]; got -0.01"),
        ({"score_threshold": float("nan")}, ValueError, r"within \[0, 1\]; got nan"),
        ({"score_threshold": float("inf")}, ValueError, r"within \[0, 1\]; got inf"),
        ({"score_threshold": "0.5"}, TypeError, "score_threshold must be a float or None; got '0.5'"),
        ({"score_threshold": False}, TypeError, "score_threshold must be a float or None; got False"),
        ({"clip": 1}, TypeError, "clip must be True or False; got 1"),
        ({"clip": None}, TypeError, "clip must be True or False; got None"),
    ],
)
def test_a_wrong_field_is_one_clear_line(fields, kind, pattern):
    for make in (DecodeSpec, lambda **given: DecodeSpec.preset("detr", **given)):
        with pytest.raises(kind, match=pattern) as error:
            make(**fields)
        one_line(error)


def test_an_unknown_field_names_the_known_ones():
    for make in (DecodeSpec, lambda **given: DecodeSpec.preset("rtdetr", **given)):
        with pytest.raises(TypeError, match="treshold") as error:
            make(treshold=0.5)
        one_line(error)
    assert "score_threshold" in str(error.value)


@pytest.mark.parametrize("name", ["RTDETR", "rt_detr", "", "yolo", None, 3])
def test_an_unknown_preset_names_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown preset.*rtdetr.*table_transformer") as error:
        DecodeSpec.preset(name)
    assert repr(name) in one_line(error)
