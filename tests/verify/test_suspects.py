"""Nodes by the error that their rounding adds: what was planted comes first, whatever else is in fewer bits."""

import onnx
import pytest

from detpost.export.lowering import lower
from detpost.export.mixed import Mixture
from detpost.verify.on_images import OnImages
from detpost.verify.suspects import own_top_k, suspects
from tests import fewer_bits
from tests.fewer_bits import float_model, planted, ranges, scenes, tiny_file


@pytest.mark.parametrize(("kind", "place"), [("overflow", 1), ("saturated", 2), ("outlier channel", 2)])
def test_a_planted_fault_comes_first_with_the_whole_network_in_fewer_bits(kind, place, tmp_path, monkeypatch):
    def lower_all(model, precision, module, seen):
        return lower(model, precision, ranges=seen)

    monkeypatch.setattr(fewer_bits, "_lower_around", lower_all)
    reference, version, blamed = planted(kind)
    onnx.save(reference, tmp_path / "float.onnx")
    ranked = suspects(Mixture(reference, version), tmp_path / "float.onnx", scenes()[:2])
    assert len(ranked) > 200
    assert blamed & set(ranked[:place])


def test_each_node_that_differs_has_a_place_in_one_pass_and_in_several(monkeypatch):
    mixture = Mixture(float_model(), lower(float_model(), "int8", ranges=ranges()))
    whole = suspects(mixture, tiny_file(), scenes()[:1])
    monkeypatch.setattr("detpost.verify.suspects._MOST_BYTES", 2**21)
    parts = suspects(mixture, tiny_file(), scenes()[:1])
    assert sorted(whole) == sorted(parts) == sorted(mixture.candidates)
    assert len({*whole[:20]} & {*parts[:20]}) >= 15  # what is an output is fused otherwise


def test_rows_are_compared_with_their_own_though_queries_are_turned():
    """A version that picks its queries in another order and computes the same adds no error behind them."""
    model = float_model()
    top = own_top_k(Mixture(model, model))
    other = onnx.ModelProto.FromString(model.SerializeToString())
    place, turned = next((at, node) for at, node in enumerate(other.graph.node) if node.name == top.name)
    name = turned.output[1]
    turned.output[1] = "straight"
    other.graph.initializer.append(onnx.helper.make_tensor("turned", 7, [30], list(range(30))[::-1]))
    other.graph.node.insert(place + 1, onnx.helper.make_node("Gather", ["straight", "turned"], [name], "turn", axis=1))
    scale = next(node for node in other.graph.node if node.op_type == "LayerNormalization" and "layers.1" in node.name)
    weight = next(tensor for tensor in other.graph.initializer if tensor.name == scale.input[1])
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.5, weight.name))
    ranked = suspects(Mixture(model, other), OnImages(tiny_file(), scenes()[:1]).path, scenes()[:1])
    assert ranked[0] == scale.name


def test_a_value_that_overflowed_is_the_worst_and_what_computes_on_it_is_not_to_blame():
    import numpy as np

    from detpost.verify.suspects import _error

    exact = np.ones((4, 3), np.float32)
    broken = np.where(np.arange(12).reshape(4, 3) == 5, np.inf, exact).astype(np.float32)
    assert _error(exact, {"after/a": broken}, "after/a") == float("inf")
    assert _error(broken, {"after/a": exact}, "after/a") == 0  # the reference overflows too: nothing was added
    assert _error(exact, {}, "after/a") == 0
    large = exact * np.array([1, 1, 30], np.float32)
    assert _error(large, {"after/a": np.where(large == 1, 0, large)}, "after/a") == pytest.approx(2 / 3, abs=0.02)
