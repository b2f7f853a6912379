"""The rules of the purity checker: one code, one reason and one rewrite each, for its static and dynamic halves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Rule:
    """One thing that a compiler, an exporter or autograd trips over.

    Attributes:
        code: stable identifier, ``DP001`` and so on.
        title: what was found, in a few words.
        why: what goes wrong because of it.
        rewrite: what to write instead.
    """

    code: str
    title: str
    why: str
    rewrite: str


_WRITE = "the old value is gone for autograd, for other views of the same memory and for the caller"

_ALL = (
    Rule("DP001", "augmented assignment on a tensor", f"`+=` and its kin write in place: {_WRITE}", "x = x + y"),
    Rule(
        "DP002",
        "subscript assignment on a tensor",
        f"`x[...] = value` writes in place: {_WRITE}",
        "x = torch.where(mask, value, x), torch.cat or torch.stack of the parts, or x.index_put / x.scatter",
    ),
    Rule(
        "DP003",
        "in-place method or function",
        f"a trailing underscore writes in place: {_WRITE}",
        "the same name without the underscore: x = x.add(y)",
    ),
    Rule(
        "DP004",
        "out= argument",
        "out= writes into memory that exists, and autograd refuses it",
        "use the returned tensor: z = torch.add(x, y)",
    ),
    Rule("DP005", "inplace=True", f"the layer or function overwrites its input: {_WRITE}", "inplace=False"),
    Rule(
        "DP006",
        ".data",
        "the alias hides reads and writes from autograd, so a wrong gradient raises nothing",
        "x.detach() to read; to change a value, make a new tensor",
    ),
    Rule(
        "DP007",
        "a tensor changed without a visible operator",
        "something outside PyTorch's operators (NumPy, an extension) wrote into its memory",
        "work on a copy: x.detach().clone(), or stay with tensor operators",
    ),
    Rule(
        "DP008",
        "running statistics updated",
        "normalisation in training mode writes its buffers on each call: two calls differ, and a replay counts twice",
        "call .eval() where the statistics should stay; expected while training",
    ),
    Rule(
        "DP010",
        "host synchronisation",
        "the host waits for the device, and a compiler or a CUDA graph cannot go past it",
        "keep the value in a tensor; read it on the host after the whole step",
    ),
    Rule(
        "DP011",
        "branch on a tensor's value",
        "Python needs the value to choose the branch: a synchronisation, a graph break and a failed export",
        "torch.where(condition, a, b), or torch.cond",
    ),
    Rule(
        "DP020",
        "data-dependent output shape",
        "the result's shape depends on values: compilers specialise or break, exported graphs turn dynamic",
        "keep the shape and carry a mask (torch.where), or take a fixed number with top-k",
    ),
    Rule(
        "DP030",
        "graph break",
        "Dynamo leaves the graph here, so what stands before and after is not optimised or exported as one",
        "express the line with tensor operators, or move it out of the compiled region",
    ),
    Rule(
        "DP031",
        "recompiles",
        "the compiled graph is thrown away when the function is called again, each time for seconds",
        "do not read changing Python state or sizes as constants",
    ),
    Rule(
        "DP040",
        "torch.export refuses it",
        "no ONNX, AOTInductor or OpenVINO file can be made from it",
        "see the reason; it is usually one of the lines named above",
    ),
    Rule(
        "DP050",
        "backward fails",
        "training with it raises",
        "see the reason; for an in-place write, make a new tensor instead",
    ),
    Rule(
        "DP051",
        "gradcheck fails",
        "the gradient differs from a finite difference",
        "mend the backward pass, or test away from a kink",
    ),
    Rule(
        "DP052",
        "gradient checkpointing changes the gradient",
        "the recomputed forward pass differs from the first one",
        "no writes to inputs or state, no randomness outside PyTorch's generators",
    ),
    Rule(
        "DP053",
        "a gradient is not finite",
        "one NaN or infinity reaches every weight before it",
        "guard the argument, not the result: torch.where inside the square root, the logarithm or the division",
    ),
    Rule(
        "DP060",
        "cannot be captured in a CUDA graph",
        "the launch overhead stays, and captured pipelines cannot contain it",
        "remove synchronisations and allocations that depend on data",
    ),
    Rule(
        "DP070",
        "Python state changed by the call",
        "a compiled graph guards on it or freezes it, an exported one drops it, a recomputed one repeats it",
        "return the value instead of storing it",
    ),
    Rule("DP090", "the call raises", "nothing else can be said about it", "call it with inputs that it accepts"),
)

RULES: dict[str, Rule] = {rule.code: rule for rule in _ALL}

_ALLOW = re.compile(r"#\s*detpost:\s*allow\s+(DP\d{3}(?:\s*,\s*DP\d{3})*)")


def allowed_codes(text: str) -> frozenset[str]:
    """Rule codes that a trailing comment in one line of source allows.

    Args:
        text: a line of source, or its comment alone.

    Returns:
        The codes named after ``# detpost: allow``; empty without such a comment.

    Examples:
        >>> sorted(allowed_codes("x += 1  # detpost: allow DP001, DP003"))
        ['DP001', 'DP003']
    """
    return frozenset(code.strip() for found in _ALLOW.findall(text) for code in found.split(","))
