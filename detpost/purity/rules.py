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


# Three lines each: code and title, why, what to write instead. WRITES is what all writes in place have in common.
_WRITES = "writes in place: the old value is gone for autograd, for other views of the same memory and for the caller"
_TEXT = """
DP001 augmented assignment on a tensor
    `x += y` WRITES
    x = x + y
DP002 subscript assignment on a tensor
    `x[...] = value` WRITES
    x = torch.where(mask, value, x), torch.cat or torch.stack of the parts, or x.index_put / x.scatter
DP003 in-place method or function
    a trailing underscore WRITES
    the same name without the underscore: x = x.add(y)
DP004 out= argument
    out= writes into memory that exists, and autograd refuses it
    use the returned tensor: z = torch.add(x, y)
DP005 inplace=True
    the layer or function WRITES
    inplace=False
DP006 .data
    the alias hides reads and writes from autograd, so a wrong gradient raises nothing
    x.detach() to read; to change a value, make a new tensor
DP007 a tensor changed without a visible operator
    something outside PyTorch's operators (NumPy, an extension) wrote into its memory
    work on a copy: x.detach().clone(), or stay with tensor operators
DP008 running statistics updated
    normalisation in training mode writes its buffers on each call: two calls differ, and a replay counts twice
    call .eval() where the statistics should stay; expected while training
DP010 host synchronisation
    the host waits for the device, and a compiler or a CUDA graph cannot go past it
    keep the value in a tensor; read it on the host after the whole step
DP011 branch on a tensor's value
    Python needs the value to choose the branch: a synchronisation, a graph break and a failed export
    torch.where(condition, a, b), or torch.cond
DP020 data-dependent output shape
    the result's shape depends on values: compilers specialise or break, exported graphs turn dynamic
    keep the shape and carry a mask (torch.where), or take a fixed number with top-k
DP030 graph break
    Dynamo leaves the graph here, so what stands before and after is not optimised or exported as one
    express the line with tensor operators, or move it out of the compiled region
DP031 recompiles
    the compiled graph is thrown away when the function is called again, each time for seconds
    do not read changing Python state or sizes as constants
DP040 torch.export refuses it
    no ONNX, AOTInductor or OpenVINO file can be made from it
    see the reason; it is usually one of the lines named above
DP050 backward fails
    training with it raises
    see the reason; for an in-place write, make a new tensor instead
DP051 gradcheck fails
    the gradient differs from a finite difference
    mend the backward pass, or test away from a kink
DP052 gradient checkpointing changes the gradient
    the recomputed forward pass differs from the first one
    no writes to inputs or state, no randomness outside PyTorch's generators
DP053 a gradient is not finite
    one NaN or infinity reaches every weight before it
    guard the argument, not the result: torch.where inside the square root, the logarithm or the division
DP060 cannot be captured in a CUDA graph
    the launch overhead stays, and captured pipelines cannot contain it
    remove synchronisations and allocations that depend on data
DP070 Python state changed by the call
    a compiled graph guards on it or freezes it, an exported one drops it, a recomputed one repeats it
    return the value instead of storing it
DP090 the call raises
    nothing else can be said about it
    call it with inputs that it accepts
"""
_LINES = [line.strip().replace("WRITES", _WRITES) for line in _TEXT.strip().splitlines()]

RULES: dict[str, Rule] = {
    head[:5]: Rule(head[:5], head[6:], why, rewrite)
    for head, why, rewrite in zip(_LINES[::3], _LINES[1::3], _LINES[2::3], strict=True)
}

_ALLOW = re.compile(r"#\s*detpost:\s*allow\s+(DP\d{3}(?:\s*,\s*DP\d{3})*)")


def allowed_codes(text: str) -> frozenset[str]:
    """Read the rule codes that a trailing comment allows; none without ``# detpost: allow``.

    Examples:
        >>> sorted(allowed_codes("x += 1  # detpost: allow DP001, DP003"))
        ['DP001', 'DP003']
    """
    return frozenset(code.strip() for found in _ALLOW.findall(text) for code in found.split(","))
