"""An adapter becomes part of the weights: W' = W + (alpha / r) B A, and the way back.

    adapter/                                          base
      lora_A [r, in]   lora_B [out, r] ─► B A * s ─► + W (float16) ─► float32 sum ─► rounded once to float16
                                                       │
    merged_in_memory(model):   W kept on the CPU ◄─────┘   ... and copied back, bit by bit, when the block ends

Taking the product off again, as peft's unmerge does, leaves a rounding error in float16: W + d - d is not W. So the
original is kept. The file-by-file merge for export is in `export`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from glmhelpers.lora.adapter_files import AdapterFiles


@dataclass(frozen=True)
class Correction:
    """What an adapter adds to one matrix: scaling * b @ a.

    Attributes:
        a: [r, in] float32.
        b: [out, r] float32.
        scaling: alpha / r (alpha / sqrt(r) with rslora).
    """

    a: Tensor
    b: Tensor
    scaling: float

    def added_to(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] plus the correction: added in float32, rounded once to the weight's dtype.

        Raises:
            ValueError: the shapes do not fit, or the sum is not finite in that dtype.
        """
        if weight.shape != (self.b.shape[0], self.a.shape[1]):
            raise ValueError(
                f"a weight of {list(weight.shape)} and an adapter for {[self.b.shape[0], self.a.shape[1]]}: "
                "the adapter belongs to a model of another size"
            )
        merged = torch.addmm(weight.float(), self.b, self.a, alpha=self.scaling).to(weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(f"the sum does not fit into {weight.dtype}: the adapter's training diverged")
        return merged

    def largest_error(self, weight: Tensor, merged: Tensor) -> float:
        """How far `merged` is from weight + correction on one random input, in units of what rounding explains.

        Independent of `added_to`: here the correction is never formed, only applied. At most 1 if all is well.
        """
        x = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
        wanted = weight.float() @ x + self.scaling * (self.b @ (self.a @ x))
        # A float16 number is off by at most 2^-11 of itself (2^-25 near 0), up or down: the errors of a row add up like
        # random steps, to a few times the root of the sum of their squares; never more than 8 times for 64 columns.
        steps = 2**-11 * (merged.float().square() @ x.square()).sqrt() + 2**-25 * x.norm()
        room = 8 * steps + 1e-5 * wanted.abs().max()
        return ((merged.float() @ x - wanted).abs() / room).max().item()


def corrections(files: AdapterFiles) -> dict[str, Correction]:
    """Name of the base's weight -> what an adapter adds to it."""
    return {
        f"{layer}.weight": Correction(
            *(files.tensors[f"base_model.model.{layer}.lora_{side}.weight"].float() for side in "AB"),
            files.scaling(layer),
        )
        for layer in files.layers()
    }
