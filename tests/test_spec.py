from __future__ import annotations

import dataclasses
from types import SimpleNamespace

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
    "owlvit": DecodeSpec(selection="per_query", top_k=3600),
    "owlv2": DecodeSpec(selection="per_query", top_k=5184),
    "grounding_dino": DecodeSpec(selection="per_query", top_k=900),
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


OWL = {"vision_config": {"image_size": 64, "patch_size": 16}}  # 16 patches, each a query

CONFIGS = [
    ({"model_type": "rt_detr", "num_queries": 40}, DecodeSpec.preset("rtdetr", top_k=40)),
    ({"model_type": "rt_detr_v2", "num_queries": 1000}, DecodeSpec.preset("rtdetr", top_k=1000)),
    ({"model_type": "d_fine"}, DecodeSpec.preset("rtdetr")),
    ({"model_type": "deimv2", "num_queries": 300}, DecodeSpec.preset("rtdetr")),
    ({"model_type": "pp_doclayout_v2", "num_queries": 300}, DecodeSpec.preset("rtdetr")),
    ({"model_type": "pp_doclayout_v3", "num_queries": 300}, DecodeSpec.preset("rtdetr")),
    ({"model_type": "rf_detr", "num_queries": 200}, DecodeSpec.preset("rfdetr", top_k=200)),
    ({"model_type": "lw_detr", "num_queries": 100}, DecodeSpec.preset("lwdetr", top_k=100)),
    ({"model_type": "deformable_detr", "num_queries": 300}, DecodeSpec.preset("deformable_detr", top_k=100)),
    ({"model_type": "conditional_detr", "num_queries": 300}, DecodeSpec.preset("conditional_detr", top_k=100)),
    ({"model_type": "dab-detr", "num_queries": 300}, DecodeSpec.preset("dab_detr", top_k=100)),
    ({"model_type": "detr", "num_queries": 100}, DecodeSpec.preset("detr", top_k=100)),
    ({"model_type": "yolos", "num_detection_tokens": 50}, DecodeSpec.preset("yolos", top_k=50)),
    ({"model_type": "table-transformer", "num_queries": 15}, DecodeSpec.preset("table_transformer", top_k=15)),
    ({"model_type": "owlvit"} | OWL, DecodeSpec.preset("owlvit", top_k=16)),
    ({"model_type": "owlv2"} | OWL, DecodeSpec.preset("owlv2", top_k=16)),
    ({"model_type": "grounding-dino", "num_queries": 900}, DecodeSpec.preset("grounding_dino")),
    ({"model_type": "mm-grounding-dino", "num_queries": 30}, DecodeSpec.preset("grounding_dino", top_k=30)),
]


def as_object(config):
    return SimpleNamespace(**{k: as_object(v) if isinstance(v, dict) else v for k, v in config.items()})


@pytest.mark.parametrize(
    ("config", "spec"), CONFIGS, ids=lambda value: getattr(value, "get", lambda _: "")("model_type")
)
def test_a_config_picks_its_familys_spec(config, spec):
    assert DecodeSpec.from_config(config) == spec
    assert DecodeSpec.from_config(as_object(config)) == spec
    assert DecodeSpec.from_config(config, top_k=3, score_threshold=0.4) == dataclasses.replace(
        spec, top_k=3, score_threshold=0.4
    )


@pytest.mark.peers
def test_every_detr_of_transformers_has_a_spec_and_no_other_detector_has():
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    names = {**auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, **auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES}
    known = {config["model_type"] for config, _ in CONFIGS}
    assert known <= set(names)
    for model_type in set(names) - known:  # four-cornered boxes, pixel maps, overlapping boxes that need NMS
        assert model_type.startswith(("pp_doclayout_v4", "pp_ocr", "omdet")), f"a new family: {model_type}"
        with pytest.raises(ValueError, match=f"no preset for model_type '{model_type}'"):
            DecodeSpec.from_config({"model_type": model_type})


@pytest.mark.parametrize("config", [{}, {"model_type": "bert"}, None, {"model_type": None}])
def test_a_config_of_no_family_is_one_clear_line(config):
    with pytest.raises(ValueError, match=r"no preset for model_type .*rt_detr_v2.*grounding-dino") as error:
        DecodeSpec.from_config(config)
    one_line(error)


@pytest.mark.parametrize("name", ["RTDETR", "rt_detr", "", "yolo", None, 3])
def test_an_unknown_preset_names_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown preset.*rtdetr.*table_transformer") as error:
        DecodeSpec.preset(name)
    assert repr(name) in one_line(error)
