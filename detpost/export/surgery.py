"""Cutting and renaming inside ONNX graphs, with the graphs that nodes hold (branches, loop bodies) taken along."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Any

from detpost.export.weights import inner_graphs

if TYPE_CHECKING:
    import onnx

__all__ = [
    "Cut",
    "cut_behind",
    "free_name",
    "held_values",
    "in_order",
    "rename_values",
    "take_shape_from",
    "true_inputs",
    "uses_of",
    "value_names",
]


@dataclass(frozen=True)
class Cut:
    """What was taken out of a graph.

    Args:
        operators: how many nodes of each operator.
        outputs: names of outputs that the graph gives no more.
        inputs: names of inputs that nothing takes any more.
    """

    operators: Mapping[str, int]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]

    def __str__(self) -> str:
        nodes = sum(self.operators.values())
        most = sorted(self.operators.items(), key=lambda item: (-item[1], item[0]))
        listed = ", ".join(f"{count} {name}" for name, count in most[:8]) + (", ..." if len(most) > 8 else "")
        parts = [f"{nodes} nodes ({listed})"] if nodes else []
        parts += [f"outputs {', '.join(self.outputs)}"] if self.outputs else []
        parts += [f"inputs {', '.join(self.inputs)}"] if self.inputs else []
        return "; ".join(parts)


def cut_behind(model: onnx.ModelProto, kept: Iterable[str]) -> Cut:
    """Take out of a model whatever the kept values do not need, its outputs included.

    Nodes, weights, notes on values, functions and those inputs go that something took before and nothing takes now.
    The graph has no outputs afterwards.

    Args:
        model: changed.
        kept: names of values of the main graph.

    Returns:
        What was taken out; outputs among the kept values do not count.
    """
    graph = model.graph
    names = set(kept)
    taken_before = {name for node in graph.node for name in uses_of(node)}
    living = _living_nodes(graph, names)
    dropped = Counter(node.op_type for place, node in enumerate(graph.node) if place not in living)
    outputs = tuple(value.name for value in graph.output if value.name not in names)
    _drop(graph.node, set(range(len(graph.node))) - living)
    needed = names | {name for node in graph.node for name in (*uses_of(node), *node.output)}
    weights = {tensor.name for tensor in graph.initializer}  # old models list them among their inputs
    unneeded = [
        value.name for value in graph.input if value.name in taken_before | weights and value.name not in needed
    ]
    _drop(graph.input, [i for i, value in enumerate(graph.input) if value.name in unneeded])
    for field in (graph.initializer, graph.value_info):
        _drop(field, [i for i, value in enumerate(field) if value.name not in needed])
    _drop(graph.sparse_initializer, [i for i, t in enumerate(graph.sparse_initializer) if t.values.name not in needed])
    marks = graph.quantization_annotation
    _drop(marks, [i for i, mark in enumerate(marks) if mark.tensor_name not in needed])
    living_functions = _living_functions(model)
    _drop(model.functions, [i for i, f in enumerate(model.functions) if (f.domain, f.name) not in living_functions])
    domains = {node.domain for nodes in (graph.node, *(f.node for f in model.functions)) for node in _all_nodes(nodes)}
    imports = model.opset_import
    _drop(imports, [i for i, entry in enumerate(imports) if entry.domain not in domains | {"", "ai.onnx"}])
    del graph.output[:]
    return Cut(dict(dropped), outputs, tuple(name for name in unneeded if name not in weights))


def in_order(nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Sort nodes so that each stands behind those that it needs."""
    listed = list(nodes)
    maker = {name: place for place, node in enumerate(listed) for name in node.output if name}
    # Sorted: the order of a set of names is another one in every process.
    needs = {
        place: sorted({maker[name] for name in uses_of(node) if name in maker}) for place, node in enumerate(listed)
    }
    return [listed[place] for place in TopologicalSorter(needs).static_order()]


def uses_of(node: onnx.NodeProto) -> set[str]:
    """Give the values that a node needs: its inputs, and what the graphs it holds take from outside."""
    return {name for name in node.input if name} | {
        name for graph in inner_graphs(node) for name in _taken_from_outside(graph)
    }


def value_names(graph: onnx.GraphProto) -> set[str]:
    """Give the name of every value, those in inner graphs too."""
    names = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    names |= {tensor.values.name for tensor in graph.sparse_initializer}
    for node in graph.node:
        names |= {*node.input, *node.output}
        for inner in inner_graphs(node):
            names |= value_names(inner)
    return names


def held_values(graph: onnx.GraphProto) -> dict[str, str]:
    """Give the values that exist in inner graphs alone, and the operator of the main graph's node that holds each."""
    main = {name for node in graph.node for name in node.output}
    main |= {value.name for value in (*graph.input, *graph.initializer)}
    return {
        name: node.op_type
        for node in graph.node
        for inner in inner_graphs(node)
        for name in value_names(inner)
        if name not in main
    }


def true_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Give the inputs that a caller fills: old models list their weights among them too."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def take_shape_from(graph: onnx.GraphProto, name: str, other: str) -> bool:
    """Read the shape of another input where an input's shape is all that is read; that input is then no longer one.

    Returns:
        Whether it was so.
    """
    users = [node for node in _all_nodes(graph.node) if name in node.input]
    if not users or any(node.op_type != "Shape" for node in users) or name in {value.name for value in graph.output}:
        return False
    for node in users:
        node.input[0] = other
    _drop(graph.input, [place for place, value in enumerate(graph.input) if value.name == name])
    return True


def free_name(name: str, taken: set[str], prefix: str = "detpost_") -> str:
    """Make a name out of another that no value bears."""
    return next(new for new in (f"{prefix}{name}{'_' * i}" for i in range(len(taken) + 1)) if new not in taken)


def rename_values(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename values wherever they stand, in inner graphs too."""
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = names.get(sparse.values.name, sparse.values.name)
    for annotation in graph.quantization_annotation:
        annotation.tensor_name = names.get(annotation.tensor_name, annotation.tensor_name)
    for node in graph.node:
        for values in (node.input, node.output):
            replaced = [names.get(name, name) for name in values]
            del values[:]
            values.extend(replaced)
        for inner in inner_graphs(node):
            rename_values(inner, names)


def _living_nodes(graph: onnx.GraphProto, names: set[str]) -> set[int]:
    """Give the places of the nodes that make the named values, and of those that they need."""
    maker = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    living: set[int] = set()
    waiting = list(names)
    while waiting:
        place = maker.get(waiting.pop())
        if place is not None and place not in living:
            living.add(place)
            waiting.extend(uses_of(graph.node[place]))
    return living


def _taken_from_outside(graph: onnx.GraphProto) -> set[str]:
    own = {value.name for value in (*graph.input, *graph.initializer)}
    own |= {tensor.values.name for tensor in graph.sparse_initializer}
    own |= {name for node in graph.node for name in node.output}
    taken = {name for node in graph.node for name in uses_of(node)} | {value.name for value in graph.output}
    return taken - own


def _living_functions(model: onnx.ModelProto) -> set[tuple[str, str]]:
    """Give domain and name of the functions that the graph calls, through one another too."""
    functions = {(function.domain, function.name): function for function in model.functions}
    living: set[tuple[str, str]] = set()
    waiting = list(_all_nodes(model.graph.node))
    while waiting:
        node = waiting.pop()
        called = (node.domain, node.op_type)
        if called in functions and called not in living:
            living |= {called}
            waiting.extend(_all_nodes(functions[called].node))
    return living


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in inner_graphs(node):
            yield from _all_nodes(graph.node)


def _drop(field: Any, doomed: Iterable[int]) -> None:
    """Take elements out of a repeated field where it lies: the weights beside them may be large."""
    for place in sorted(doomed, reverse=True):
        del field[place]
