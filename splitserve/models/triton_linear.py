"""Products on GPUs: our kernels for few rows where they beat the library, the library elsewhere."""

from __future__ import annotations

from splitserve_kernels.small_linear import choose, small_gated_linear, small_linear
from splitserve_kernels.small_multiply import Activation
from splitserve_kernels.small_tiles import MAX_ROWS, TilePlan, num_processors
from torch import Tensor
from torch.nn import functional


class TritonLinear:
    """Implements `Linear` for a plain weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.contiguous()
        self.bias = bias
        self._plans: dict[tuple[int, bool], TilePlan | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        plan = self._plan(x.shape[0], gated=False)
        if plan is None:
            return functional.linear(x, self.weight, self.bias)
        return small_linear(x, self.weight, bias=self.bias, plan=plan)

    def gated(self, x: Tensor, activation: Activation) -> Tensor | None:
        """activation(gate) * up of a weight with the gate's rows on top, (rows, out / 2), in one
        launch; None where that does not pay.
        """
        plan = None if self.bias is not None else self._plan(x.shape[0], gated=True)
        if plan is None:
            return None
        return small_gated_linear(x, self.weight, activation, plan=plan)

    def _plan(self, rows: int, *, gated: bool) -> TilePlan | None:
        if rows > MAX_ROWS:
            return None
        key = (rows, gated)
        if key not in self._plans:
            (out, width), dtype = self.weight.shape, self.weight.dtype
            processors = num_processors(self.weight.device)
            self._plans[key] = choose(
                rows, out, width, dtype, num_processors=processors, gated=gated
            )
        return self._plans[key]
