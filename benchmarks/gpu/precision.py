"""What is computed in: bfloat16, float32, or float32 whose products may use the 10-bit inputs of tf32."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..measure import TOLERANCES


class Precision(NamedTuple):
    """A dtype, whether matrix products and convolutions may use tf32, and the largest difference that is rounding."""

    dtype: torch.dtype
    tf32: bool
    tolerance: float

    def allow(self) -> None:
        """Set PyTorch so, for products and cuDNN's convolutions alike (by default, only the latter use tf32)."""
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32


PRECISIONS = {
    "bfloat16": Precision(torch.bfloat16, False, TOLERANCES[torch.bfloat16]),
    "tf32": Precision(torch.float32, True, 1e-2),
    "float32": Precision(torch.float32, False, TOLERANCES[torch.float32]),
}
