"""Quantised linear layers: which are known, and their matrices, dequantised one at a time.

What bitsandbytes keeps in memory as 8-bit or 4-bit numbers is a matrix all the same, W as the layer computes with it.
Its spectral basis and fingerprint are those of that W, which is not the matrix it was quantised from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer's weight holds the matrix itself, as ordinary floating-point numbers."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.dtype in _FLOATS and type(weight.data) is torch.Tensor


def quantised_form(layer: nn.Module) -> str | None:
    """The form of a quantised weight that :func:`dequantised` reads: ``int8``, ``nf4`` or ``fp4``; else None."""
    weight: Any = layer.weight
    match type(weight).__name__:
        case "Int8Params" if weight.dtype == torch.int8:
            return "int8"
        case "Params4bit" if getattr(weight, "quant_state", None) is not None:
            return str(weight.quant_state.quant_type)
    return None


def dequantised(layer: nn.Module) -> torch.Tensor:
    """W of a layer with a :func:`quantised_form`, a new tensor of shape (out, in)."""
    from bitsandbytes import functional

    weight: Any = layer.weight
    own: Any = layer.state if hasattr(layer, "state") else None
    with torch.no_grad():
        if quantised_form(layer) == "int8":
            # The scales move from the weight to the layer's state in its first forward pass.
            scales = weight.SCB if getattr(weight, "SCB", None) is not None else own.SCB
            w: torch.Tensor = functional.int8_vectorwise_dequant(weight.data, scales)
        else:
            w = functional.dequantize_4bit(weight.data, weight.quant_state)
    return w


def keep_form(model: nn.Module) -> None:
    """Keep 4-bit layers from changing their form while they are used.

    On CPUs with AVX512-BF16 bitsandbytes repacks a weight in its first forward pass. That rounds the scales, so it is
    another matrix from then on, and the packed product has no gradient.
    """
    for layer in model.modules():
        if hasattr(layer, "weight") and type(layer.weight).__name__ == "Params4bit":
            weight: Any = layer.weight
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                from bitsandbytes import functional

                weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(
                    weight.data, weight.quant_state
                )
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
