"""Two versions of one graph, and any mixture of them: some nodes as in the reference, all others as in the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from detpost.export.graph import import_onnx
from detpost.export.rounded import ROUNDED, is_decode, value_types, written_out
from detpost.export.surgery import cut_behind, in_order
from detpost.export.weights import inner_graphs

if TYPE_CHECKING:
    import onnx

__all__ = ["Mixture", "module_of"]

KEPT = "kept/"
"""Begins the names of the nodes and values that a mixture takes from the reference."""

_PASSING = frozenset(("QuantizeLinear", "DequantizeLinear", "Cast", "Identity"))
# How ONNX Runtime's quantisers name the value before, or in, fewer bits.
_RAW_SUFFIX = "_QuantizeLinear_Input"


class Mixture:
    """A reference graph and a version of it in fewer bits, matched by the names of their values.

    Quantisers and half converters keep the names of values; what they add (QuantizeLinear and DequantizeLinear, casts)
    is passed through to find what a value is before it is rounded. A node that is kept computes on values before their
    rounding, with the reference's weights, and its readers take what it gives without rounding.

    Args:
        reference: the float model; weights inside.
        other: the version in fewer bits; weights inside.

    Raises:
        ValueError: graphs that have no values in common, or half values where they cannot be followed.
    """

    def __init__(self, reference: onnx.ModelProto, other: onnx.ModelProto) -> None:
        self.reference = reference
        self.other = written_out(other)
        self._types = value_types(reference)
        self._nodes = {node.output[0]: node for node in reference.graph.node if node.output}
        self._makers = {name: node for node in reference.graph.node for name in node.output if name}
        self._weights = {tensor.name: tensor for tensor in reference.graph.initializer}
        self._inputs = {value.name for value in reference.graph.input} - set(self._weights)
        self._other_makers = {name: node for node in self.other.graph.node for name in node.output if name}
        self._other_weights = {tensor.name: tensor for tensor in self.other.graph.initializer}
        self._other_inputs = {value.name for value in self.other.graph.input} - set(self._other_weights)
        computed = [name for name, node in self._makers.items() if not self._is_constant(node)]
        self._raw = {name: raw for name in (*computed, *self._inputs) if (raw := self._before_rounding(name))}
        self._views = self._views_of_raw()
        self.candidates = tuple(name for name, node in self._named_nodes() if self._differs(node))
        if not self._raw.keys() & self._makers.keys():
            raise ValueError(
                "the two graphs have no values in common: diagnose needs a file and the one that it was made from"
            )

    def node(self, name: str) -> onnx.NodeProto:
        """Give a node of the reference."""
        return next(node for key, node in self._named_nodes() if key == name)

    def module(self, name: str) -> str:
        """Name the module of the original network that a node belongs to."""
        written = any(entry.key == "detpost.exporter" and entry.value != '"attach"' for entry in self.properties)
        return module_of(self.node(name), wrapped=written)

    @property
    def properties(self) -> list[onnx.StringStringEntryProto]:
        """The metadata of the reference."""
        return list(self.reference.metadata_props)

    def raw_value(self, name: str) -> str | None:
        """Name what in the other graph is a value of the reference, before it is rounded."""
        return self._raw.get(name)

    def views(self, name: str) -> set[str]:
        """Name what in the other graph is a value of the reference, rounded or not."""
        return self._views.get(name, set())

    def build(self, kept: Iterable[str], outputs: Iterable[str] = ()) -> onnx.ModelProto:
        """Make the other graph with some nodes as in the reference.

        Args:
            kept: names among ``candidates``.
            outputs: values of the reference that become outputs beside those that there are, under their own names with
                ``seen/`` in front.

        Returns:
            The model; values and nodes from the reference have ``kept/`` in front of their names.
        """
        names = set(kept)
        taken = [node for name, node in self._named_nodes() if name in names]
        given = {name for node in taken for name in node.output if name}
        seen = {f"seen/{name}": KEPT + name if name in given else self._raw[name] for name in outputs}
        return self._assemble(self._emit(taken), given, seen)

    def build_with(self, value: str) -> onnx.ModelProto:
        """Make the other graph with one value taken from the reference, and all that this value comes from."""
        return self._assemble(self._emit(self._before(value)), {value}, {})

    def watched(self, values: Iterable[str], taken: str | None = None) -> onnx.ModelProto:
        """Make the other graph with values of it as outputs, before they are rounded and as their readers take them.

        Args:
            values: names in the reference.
            taken: a value taken from the reference, with all that this value comes from; ``None`` takes none.

        Returns:
            The model, with outputs ``before/NAME`` and ``after/NAME`` beside those that there are.
        """
        outputs: dict[str, str] = {}
        for name in values:
            raw = self._raw[name]
            rounded = sorted(view for view in self._views.get(name, ()) if view != raw and not self._is_low(view))
            outputs |= {f"before/{name}": raw, f"after/{name}": rounded[0] if rounded else raw}
        before = [] if taken is None else self._before(taken)
        return self._assemble(self._emit(before), set() if taken is None else {taken}, outputs)

    def _before(self, value: str) -> list[onnx.NodeProto]:
        """List the reference's nodes that a value comes from, in order."""
        before: list[onnx.NodeProto] = []
        waiting, seen = [value], set[str]()
        while waiting:
            node = self._makers.get(waiting.pop())
            if node is not None and node.output[0] not in seen:
                seen.add(node.output[0])
                before.append(node)
                waiting.extend(name for name in node.input if name)
        order = {node.output[0]: place for place, node in enumerate(self.reference.graph.node) if node.output}
        return sorted(before, key=lambda node: order[node.output[0]])

    def _named_nodes(self) -> list[tuple[str, onnx.NodeProto]]:
        return [(node.name or first, node) for first, node in self._nodes.items()]

    def _before_rounding(self, name: str) -> str | None:
        """Find a value of the reference in the other graph, and pass back through what rounds it."""
        there = self._other_makers.keys() | self._other_inputs
        found = next((each for each in (name + _RAW_SUFFIX, f"{ROUNDED}raw/{name}", name) if each in there), None)
        while found in self._other_makers:
            node = self._other_makers[found]
            own = found in self._makers and self._makers[found].op_type == node.op_type
            if node.op_type not in _PASSING or own or node.input[0] in self._other_weights:
                return found
            if node.input[0] in self._own_inputs(name):
                return found
            before = self._other_makers.get(node.input[0])
            if node.op_type == "DequantizeLinear" and (before is None or before.op_type != "QuantizeLinear"):
                return found  # an operator of whole numbers made it: there is no float value before
            found = node.input[0]
        return found

    def _is_constant(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Constant" or (node.op_type == "Identity" and node.input[0] in self._weights)

    def _own_inputs(self, name: str) -> set[str]:
        """Name the inputs of the reference's own node: a cast or copy of the reference's is no rounding."""
        node = self._makers.get(name)
        return set() if node is None or node.op_type not in _PASSING else set(node.input)

    def _views_of_raw(self) -> dict[str, set[str]]:
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.other.graph.node:
            for name in node.input[:1]:
                readers.setdefault(name, []).append(node)
        owned = set(self._raw.values())
        found: dict[str, set[str]] = {}
        for name, raw in self._raw.items():
            views, waiting = {raw}, [raw]
            while waiting:
                for node in readers.get(waiting.pop(), []):
                    out = node.output[0]
                    if node.op_type in _PASSING and out not in owned and out not in views:
                        views.add(out)
                        waiting.append(out)
            found[name] = views
        return found

    def _is_low(self, name: str) -> bool:
        """Tell whether a value is in fewer bits itself: what reads it goes on to, from what was kept."""
        maker = self._other_makers.get(name)
        if maker is None or maker.op_type not in ("QuantizeLinear", "Cast"):
            return False
        kinds = import_onnx().TensorProto
        to = next((a.i for a in maker.attribute if a.name == "to"), kinds.FLOAT)
        return maker.op_type == "QuantizeLinear" or to in (kinds.FLOAT16, kinds.BFLOAT16)

    def _differs(self, node: onnx.NodeProto) -> bool:
        """Tell whether a node of the network's arithmetic is another in the other graph."""
        first = node.output[0]
        if is_decode(node) or first not in self._raw or inner_graphs(node) or node.op_type == "Constant":
            return False
        float_type = import_onnx().TensorProto.FLOAT
        if self._types.get(first, float_type) != float_type or not any(node.input):
            return False
        maker = self._other_makers.get(self._raw[first])
        if maker is None:
            return False
        if maker.op_type != node.op_type or len(self._views[first]) > 1 or len(maker.input) != len(node.input):
            return True
        return any(self._input_differs(mine, theirs) for mine, theirs in zip(node.input, maker.input, strict=True))

    def _input_differs(self, mine: str, theirs: str) -> bool:
        if mine in self._raw:
            return theirs != self._raw[mine]
        if mine in self._weights:
            same = self._other_weights.get(theirs)
            return same is None or not _equal(self._weights[mine], same)
        return mine != theirs and mine in self._makers and self._makers[mine].op_type != "Constant"

    def _emit(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Copy nodes of the reference, and those constants and shapes before them that the other graph lacks."""
        chosen = {name for node in nodes for name in node.output if name}
        emitted: dict[str, onnx.NodeProto] = {}

        def source(name: str) -> str:
            if not name:
                return ""
            if name in chosen or name in self._weights:
                return KEPT + name
            if name in self._raw and (name in self._inputs or self._makers[name].op_type != "Constant"):
                return self._raw[name]
            if name in self._makers:
                put(self._makers[name])
            return KEPT + name

        def put(node: onnx.NodeProto) -> None:
            if node.output[0] in emitted:
                return
            inputs = [source(name) for name in node.input]
            copy = import_onnx().NodeProto()
            copy.CopyFrom(node)
            copy.name = KEPT + (node.name or node.output[0])
            del copy.input[:], copy.output[:]
            copy.input.extend(inputs)
            copy.output.extend(KEPT + name if name else "" for name in node.output)
            emitted.update({node.output[0]: copy})

        for node in nodes:
            put(node)
        return list(emitted.values())

    def _assemble(self, emitted: list[onnx.NodeProto], replaced: set[str], seen: Mapping[str, str]) -> onnx.ModelProto:
        onnx = import_onnx()
        model = onnx.ModelProto()
        model.CopyFrom(self.other)
        graph = model.graph
        renamed = {
            view: KEPT + name for name in replaced for view in self._views.get(name, ()) if not self._is_low(view)
        }
        for node in graph.node:
            inputs = [renamed.get(name, name) for name in node.input]
            del node.input[:]
            node.input.extend(inputs)
        wanted = [value.name for value in graph.output]
        own = [copy for value in graph.output for copy in [onnx.ValueInfoProto()] if not copy.CopyFrom(value)]
        nodes = [*graph.node, *emitted]
        for name in set(wanted) & renamed.keys():  # an output of the file: what made it gives way
            nodes = [node for node in nodes if name not in node.output]
            nodes.append(onnx.helper.make_node("Identity", [renamed[name]], [name], f"{KEPT}{name}/out"))
        nodes += [onnx.helper.make_node("Identity", [value], [name], name) for name, value in seen.items()]
        ordered = in_order(nodes)
        del graph.node[:]
        graph.node.extend(ordered)
        used = {name for node in emitted for name in node.input}
        for name, tensor in self._weights.items():
            if KEPT + name in used:
                graph.initializer.add().CopyFrom(tensor)
                graph.initializer[-1].name = KEPT + name
        del graph.value_info[:]
        cut_behind(model, [*wanted, *seen])
        graph.output.extend(own)
        for name in seen:
            graph.output.add(name=name)
        return model


def _equal(first: onnx.TensorProto, second: onnx.TensorProto) -> bool:
    import numpy as np

    to_array = import_onnx().numpy_helper.to_array
    one, other = to_array(first), to_array(second)
    return one.shape == other.shape and one.dtype == other.dtype and bool(np.array_equal(one, other, equal_nan=True))


def module_of(node: onnx.NodeProto, wrapped: bool) -> str:
    """Name the module of the original network that a node belongs to, as PyTorch's exporters leave it.

    Args:
        node: of the float graph.
        wrapped: whether detpost exported it, with the network as ``model`` of a module around it.

    Returns:
        As ``model.decoder.layers.0.self_attn``; empty where nothing says so.
    """
    import ast

    said = {entry.key: entry.value for entry in node.metadata_props}
    if "pkg.torch.onnx.name_scopes" in said:
        try:
            scopes = ast.literal_eval(said["pkg.torch.onnx.name_scopes"])
        except (SyntaxError, ValueError):
            scopes = []
        path = scopes[-2] if len(scopes) > 1 else ""
    elif "namespace" in said:
        scopes = [part.split(": ")[0] for part in said["namespace"].split("/")]
        path = scopes[-2] if len(scopes) > 1 else ""
    else:  # the older exporter: /model/decoder/layers.0/self_attn/MatMul
        path = ".".join(node.name.strip("/").split("/")[:-1])
    parts = path.split(".") if path else []
    return ".".join(parts[1:] if wrapped and parts[:1] == ["model"] else parts)
