"""The walk of greedy suppression, several boxes a step.

It is a recursion of K steps that no parallel scheme shortens (finding the same set is P-complete), but a step need not
be one box: here it is eight, or six, looked up in tables that are made for all blocks at once. Exact for every input.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["walk_floats", "walk_words"]

_WORD = 8  # boxes per step: one byte of a mask each, so eight of them are one int64
_FLOAT_WORD = 6


def walk_words(overlaps: Tensor, free: Tensor) -> Tensor:
    """Solve keep[i] = free[i] and no kept j < i overlaps i, eight boxes a step: overlaps (B, n, n), free (B, n).

    Eight boxes are the bits of one word. Two tables hold, for each block of eight, which of them stay when a given set
    of them is dropped already (256 entries), and which boxes of the whole list a given set of them drops (256 rows of
    words). A step reads its block's word, looks up both, and drops: nothing in it depends on how long a chain of
    overlaps is.
    """
    batch, size = overlaps.shape[0], int(overlaps.shape[1])
    blocks = -(-size // _WORD)
    padding = blocks * _WORD - size
    drops = _words(F.pad(overlaps, (0, padding, 0, padding))).view(batch, blocks, _WORD, blocks)
    dropped = _words(F.pad(~free, (0, padding), value=True))  # (B, blocks)
    entry = torch.arange(2**_WORD, dtype=torch.int32, device=overlaps.device).to(torch.uint8)

    own = drops.diagonal(dim1=1, dim2=3)  # (B, 8, blocks): whom each box drops in its own block
    state, stays = entry.expand(batch, blocks, 2**_WORD), torch.zeros_like(entry)
    for bit in range(_WORD):
        stay = ((state >> bit) & 1) ^ 1
        stays = stays | (stay << bit)
        state = state | (own[:, bit].unsqueeze(-1) * stay)
    # Indices into all blocks of all images, so that a step is two plain look-ups.
    block = torch.arange(batch * blocks, dtype=torch.int32, device=overlaps.device).view(batch, blocks) * 2**_WORD
    stays = (stays + block.unsqueeze(-1)).flatten()
    effects = _unions(drops).reshape(batch * blocks * 2**_WORD, blocks)

    kept = []
    for step, first in enumerate(block.unbind(1)):
        chosen = stays.index_select(0, first + dropped[:, step])  # (B,), int32
        kept.append(chosen)
        dropped = dropped | effects.index_select(0, chosen)
    bits = torch.arange(_WORD, dtype=torch.int32, device=overlaps.device)
    found = (torch.stack(kept, dim=1).unsqueeze(-1) >> bits) & 1  # (B, blocks, 8)
    return found.view(batch, blocks * _WORD)[:, :size] == 1


def walk_floats(overlaps: Tensor, free: Tensor) -> Tensor:
    """Solve the same with float32 operators alone, for runtimes without bitwise ones.

    Args and returns as :func:`walk_words`.
    """
    batch, size = overlaps.shape[0], int(overlaps.shape[1])
    blocks = -(-size // _FLOAT_WORD)
    padding = blocks * _FLOAT_WORD - size
    # Not F.pad: ONNX pads no booleans before opset 19.
    drops = F.pad(overlaps.to(torch.float32), (0, padding, 0, padding))
    hits = F.pad((~free).to(torch.float32), (0, padding), value=1.0)  # how many kept boxes drop each one
    weights = 2.0 ** torch.arange(_FLOAT_WORD, dtype=torch.float32, device=overlaps.device)
    entry = torch.arange(2**_FLOAT_WORD, device=overlaps.device)
    stays: list[Tensor] = []  # (B, blocks, 64) for each place in a block
    own = torch.stack(
        [drops[:, i : i + _FLOAT_WORD, i : i + _FLOAT_WORD] for i in range(0, blocks * _FLOAT_WORD, _FLOAT_WORD)],
        dim=1,
    )  # (B, blocks, 6, 6)
    for bit in range(_FLOAT_WORD):
        gone = (entry // 2**bit % 2).to(torch.float32).expand(batch, blocks, -1)
        for earlier, stay in enumerate(stays):
            gone = gone + stay * own[:, :, earlier, bit].unsqueeze(-1)
        stays.append((gone == 0).to(torch.float32))
    table = torch.stack(stays, dim=-1)  # (B, blocks, 64, 6)
    kept = []
    for step in range(blocks):
        places = slice(step * _FLOAT_WORD, (step + 1) * _FLOAT_WORD)
        entry = ((hits[:, places] > 0).to(torch.float32) * weights).sum(dim=1).to(torch.int64)  # (B,)
        chosen = table[:, step].gather(1, entry.view(-1, 1, 1).expand(-1, 1, _FLOAT_WORD))  # (B, 1, 6)
        kept.append(chosen[:, 0])
        hits = hits + (chosen @ drops[:, places])[:, 0]
    return torch.cat(kept, dim=1)[:, :size] > 0


def _words(mask: Tensor) -> Tensor:
    """Pack (..., 8 n) booleans into (..., n) bytes, the first in the lowest bit."""
    # Eight bytes of 0 or 1 read as one integer; the product brings byte i to bit 56 + i, with no two in one place.
    # (Bytes first: Inductor of PyTorch 2.11 cannot read booleans as another type.)
    gathered = mask.to(torch.uint8).contiguous().view(torch.int64) * 0x0102040810204080
    return ((gathered >> 56) & 0xFF).to(torch.uint8)


def _unions(drops: Tensor) -> Tensor:
    """Union the words of every subset of each block: (B, blocks, 8, m) -> (B, blocks, 256, m)."""
    tables = drops.unsqueeze(3)  # (B, blocks, 8 groups, 1 subset without the empty one, m)
    tables = torch.cat((torch.zeros_like(tables), tables), dim=3)
    while tables.shape[2] > 1:
        lower, upper = tables[:, :, 0::2], tables[:, :, 1::2]
        tables = (upper.unsqueeze(4) | lower.unsqueeze(3)).flatten(3, 4)
    return tables[:, :, 0]
