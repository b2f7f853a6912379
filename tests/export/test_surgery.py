"""Cutting and renaming leave nothing dangling and nothing behind."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from detpost.export.surgery import (
    cut_behind,
    free_name,
    held_values,
    rename_values,
    take_shape_from,
    true_inputs,
    uses_of,
    value_names,
)


def value(name, kind=TensorProto.FLOAT, shape=("n",)):
    return helper.make_tensor_value_info(name, kind, list(shape))


def weight(name):
    return numpy_helper.from_array(np.ones(3, np.float32), name)


def nested():
    """x -> a -> b; an If gives c from a and w; d is nobody's but an output's."""
    branches = [
        helper.make_graph([helper.make_node("Add", ["a", "w"], [f"sum_{name}"])], name, [], [value(f"sum_{name}")])
        for name in ("then", "else")
    ]
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Mul", ["a", "v"], ["b"]),
        helper.make_node("If", ["which"], ["c"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Own", ["y"], ["d"], domain="own"),
    ]
    graph = helper.make_graph(
        nodes,
        "nested",
        [value("x"), value("y"), value("which", TensorProto.BOOL, ()), value("unused")],
        [value("b"), value("c"), value("d")],
        [weight("v"), weight("w")],
        value_info=[value("a"), value("d_note")],
    )
    function = helper.make_function(
        "own", "Own", ["p"], ["q"], [helper.make_node("Neg", ["p"], ["q"])], [helper.make_opsetid("", 17)]
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)


def test_what_a_branch_needs_is_kept_and_the_rest_goes():
    model = nested()
    cut = cut_behind(model, ["c"])
    assert [node.op_type for node in model.graph.node] == ["Relu", "If"]
    assert [tensor.name for tensor in model.graph.initializer] == ["w"]
    assert [v.name for v in model.graph.value_info] == ["a"]
    assert not model.functions
    assert [entry.domain for entry in model.opset_import] == [""]
    assert cut.operators == {"Mul": 1, "Own": 1}
    assert cut.outputs == ("b", "d")
    assert cut.inputs == ("y",)
    assert [v.name for v in model.graph.input] == ["x", "which", "unused"]  # nobody took it before either
    assert str(cut) == "2 nodes (1 Mul, 1 Own); outputs b, d; inputs y"
    model.graph.output.append(value("c"))
    onnx.checker.check_model(model, full_check=True)


def test_functions_that_are_called_are_kept():
    model = nested()
    cut_behind(model, ["d"])
    assert [function.name for function in model.functions] == ["Own"]
    assert [v.name for v in model.graph.input] == ["y", "unused"]


def test_weights_that_old_models_list_as_inputs_go_with_their_use():
    model = nested()
    model.graph.input.extend([value("v", shape=(3,)), value("w", shape=(3,))])
    assert [v.name for v in true_inputs(model.graph)] == ["x", "y", "which", "unused"]
    cut = cut_behind(model, ["b"])
    assert [v.name for v in model.graph.input] == ["x", "unused", "v"]
    assert cut.inputs == ("y", "which")


def test_names_in_branches_are_seen_and_renamed():
    model = nested()
    assert uses_of(model.graph.node[2]) == {"which", "a", "w"}
    assert held_values(model.graph) == {"sum_then": "If", "sum_else": "If"}
    rename_values(model.graph, {"a": "alpha", "w": "omega", "sum_then": "sum"})
    names = value_names(model.graph)
    assert {"alpha", "omega", "sum"} <= names
    assert not {"a", "w", "sum_then"} & names
    onnx.checker.check_model(model, full_check=True)


def test_a_free_name_is_free():
    assert free_name("x", {"detpost_x", "detpost_x_"}) == "detpost_x__"
    assert free_name("x", set(), "source_") == "source_x"


def test_an_input_whose_shape_alone_is_read_goes_and_one_whose_values_are_read_stays():
    pairs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["B", 2]) for name in ("old", "new", "read")]
    nodes = [
        helper.make_node("Shape", ["old"], ["batch"]),
        helper.make_node("Shape", ["read"], ["other"]),
        helper.make_node("Neg", ["read"], ["value"]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in ("batch", "other", "value")]
    graph = helper.make_graph(nodes, "shapes", pairs, outputs)
    assert not take_shape_from(graph, "read", "new")
    assert not take_shape_from(graph, "new", "old"), "nothing reads it"
    assert take_shape_from(graph, "old", "new")
    assert [value.name for value in graph.input] == ["new", "read"]
    assert [list(node.input) for node in graph.node] == [["new"], ["read"], ["read"]]
