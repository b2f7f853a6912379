"""How much a boundary term counts beside a regional loss, epoch by epoch."""

from __future__ import annotations

import math

import torch
import torch.distributed
from torch import Tensor, nn

_RULES = ("ratio", "linear")


class HausdorffSchedule(nn.Module):
    """Add a boundary term to a base loss with a weight that changes from epoch to epoch.

    Two rules:

    - ``"ratio"``, of Karimi and Salcudean (2019): after each epoch the weight is set so that over that
      epoch both losses had equal means, ``weight * mean(base) / mean(term)``. They put the inverse on their Dice term;
      the sum here is theirs divided by it, so that its scale stays that of the base loss. In the first epoch, before
      anything is known, the base loss trains alone. Means are absolute values; where the term's is 0 the weight stays.
    - ``"linear"``: the weight grows from 0 in the first epoch to ``weight`` after ``warm_up`` epochs. Use it for losses
      that change sign, such as :class:`BoundaryLoss`.

    With ``"ratio"`` a ``warm_up`` ramps the weight too. Call the module in place of a sum, and :meth:`step` after
    each epoch. The state (epoch, weight, sums of the epoch so far) is in ``state_dict``. Nothing waits for the device.
    Where a process group is initialised, ``step`` averages over its processes, so that all of them have one weight:
    call it in each. Values that are not finite, of a step that a gradient scaler will drop, are left out of the means.

    Args:
        rule: ``"ratio"`` or ``"linear"``.
        weight: what the weight is multiplied with: 1 gives equal means, or the last weight of ``"linear"``.
        warm_up: epochs until the whole weight counts; 0 for at once.

    Raises:
        ValueError: an unknown rule, a weight that is not positive and finite, or a warm-up that is not a whole number
            of epochs.

    Example:
        >>> schedule = HausdorffSchedule()
        >>> dice, distance = torch.tensor(0.5), torch.tensor(20.0)
        >>> schedule(dice, distance)  # the first epoch trains the base loss alone
        tensor(0.5000)
        >>> schedule.step()
        >>> schedule.weight
        tensor(0.0250)
        >>> schedule(dice, distance)
        tensor(1.)
    """

    epoch: Tensor
    weight: Tensor
    sums: Tensor

    def __init__(self, rule: str = "ratio", weight: float = 1.0, warm_up: int = 0) -> None:
        super().__init__()
        if rule not in _RULES:
            raise ValueError(f"rule must be one of 'ratio', 'linear'; got {rule!r}")
        if not math.isfinite(weight) or weight <= 0:
            raise ValueError(f"weight must be positive and finite; got {weight}")
        if isinstance(warm_up, bool) or not isinstance(warm_up, int) or warm_up < 0:
            raise ValueError(f"warm_up must be a number of epochs, 0 or more; got {warm_up!r}")
        self.rule = rule
        self.share = float(weight)
        self.warm_up = warm_up
        at_once = rule == "linear" and warm_up == 0
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        self.register_buffer("weight", torch.tensor(self.share if at_once else 0.0, dtype=torch.float32))
        # Of the epoch so far: the base loss, the term, and the number of steps.
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float32))

    def forward(self, base: Tensor, term: Tensor) -> Tensor:
        """Add the weighted term; in training mode, take both into the epoch's means.

        Args:
            base: (), the regional loss, floating.
            term: (), the boundary term, floating, on the same device.

        Returns:
            (), ``base + weight * term``.

        Raises:
            TypeError: either is not a tensor.
            ValueError: either is not a scalar.
        """
        for name, value in (("base", base), ("term", term)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
            if value.dim() != 0:
                raise ValueError(f"{name} must be a scalar; got shape {tuple(value.shape)}: reduce it with .mean()")
        if self.weight.device != base.device:
            self.to(base.device)
        if self.training:
            with torch.no_grad():
                seen = torch.stack([base.detach().float(), term.detach().float(), torch.ones_like(base).float()])
                self.sums = self.sums + torch.where(seen.isfinite().all(), seen, 0.0)
        return base + self.weight.to(term.dtype) * term

    @torch.no_grad()
    def step(self) -> None:
        """End an epoch: set the weight of the next one and start its means.

        With a process group, every process has to call it.
        """
        sums = _over_processes(self.sums)
        base, term = sums[0].abs(), sums[1].abs()
        epoch = self.epoch + 1
        ramp = (epoch / self.warm_up).clamp(max=1.0) if self.warm_up else torch.ones_like(base)
        weight = self.share * ramp
        if self.rule == "ratio":
            weight = weight * base / term
            weight = torch.where(weight.isfinite() & (base > 0), weight, self.weight)
        self.weight = weight.float()
        self.epoch = epoch
        self.sums = torch.zeros_like(self.sums)

    def extra_repr(self) -> str:
        """Say which rule, with what."""
        return f"rule={self.rule!r}, weight={self.share}, warm_up={self.warm_up}"


def _over_processes(sums: Tensor) -> Tensor:
    """Give sum over the processes of the default group, where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums
    parts = [torch.empty_like(sums) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, sums)  # fills its own fresh tensors
    return torch.stack(parts).sum(0)
