"""Weights of a frozen model in 8 or 4 bits, with gradients that flow through them to the prompt.

The linear layers of the body (and GPT-2's ``Conv1D``) keep their weight as integers and make it anew whenever they
run: once in the forward pass and once in the backward pass, which needs it to carry the gradient on to the prompt and
keeps nothing of it in between. Embeddings, the head, norms and biases stay as they are.

This is our own because no kept library does it on CPU and CUDA alike: torchao packs four bits on CUDA only,
bitsandbytes rounds the activations as well in eight bits, and optimum-quanto is no longer developed.

Shape letters: I inputs of a layer, O outputs, G groups of a weight.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from softprompts.errors import ConfigError, UnsupportedModelError, nearest
from softprompts.models.identity import model_fingerprint

__all__ = [
    "GROUP",
    "Original",
    "Quantization",
    "QuantizedLinear",
    "check_quantization",
    "original_of",
    "quantize_weights",
]

Quantization = Literal["int8", "int4"]
"""``int8``: one scale per output, symmetric. ``int4``: one scale and one offset per :data:`GROUP` weights."""
GROUP = 64
"""Neighbouring weights of one output that share a scale in four bits: with it, 4.5 bits per weight."""
_ORIGINAL = "_softprompts_original"
_LEAST_SHARE = 0.5
"""Share of the body's weights (embeddings not counted) that must lie in linear layers for quantizing to pay."""


@dataclass(frozen=True)
class Original:
    """What a quantized model was before: prompts belong to the model, not to the way in which it is kept."""

    quantization: Quantization
    """How it is kept now."""
    fingerprint: str
    parameter_count: int


def original_of(model: nn.Module) -> Original | None:
    """What a model was before it was quantized; ``None`` if it never was."""
    found = getattr(model, _ORIGINAL, None)
    return found if isinstance(found, Original) else None


def check_quantization(name: str | None) -> Quantization | None:
    """Narrow a setting to the quantizations that there are.

    Raises:
        ConfigError: There is no such quantization.
    """
    if name is not None and name not in get_args(Quantization):
        raise ConfigError(f"unknown quantization '{name}': {nearest(name, get_args(Quantization))}, or null for none")
    return cast("Quantization | None", name)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is kept as integers; it is never trained.

    Args:
        weight_OI: The weight to keep.
        bias: Kept as it is.
        quantization: How.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    def __init__(self, weight_OI: Tensor, bias: nn.Parameter | None, quantization: Quantization) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.quantization = quantization
        self.bias = bias
        codes, scales, offsets = _eight_bits(weight_OI) if quantization == "int8" else _four_bits(weight_OI)
        self._dtype = weight_OI.dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("offsets", offsets)

    @property
    def weight(self) -> Tensor:
        """The weight ``[O, I]`` as this layer uses it; made anew at every access, for code that looks at it."""
        return self.dequantized(self._dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Make the weight ``[O, I]``; scaled in float32, as a half would round the codes a second time."""
        if self.quantization == "int8":
            return self.codes.to(torch.float32).mul_(self.scales).to(dtype)
        assert self.offsets is not None
        steps_G2 = torch.empty(*self.codes.shape, 2, dtype=torch.float32, device=self.codes.device)
        steps_G2[..., 0] = self.codes & 15
        steps_G2[..., 1] = self.codes >> 4
        weights_GS = steps_G2.flatten(1).mul_(self.scales.float()).add_(self.offsets.float())
        count = self.out_features * self.in_features
        return weights_GS.flatten()[:count].view(self.out_features, self.in_features).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply; the gradient flows into ``input``."""
        return cast(Tensor, _Multiply.apply(input, self.bias, self))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Say what ``print(model)`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, quantization={self.quantization}"


class _Multiply(torch.autograd.Function):
    """``input @ weight.T + bias`` that keeps neither the input nor the weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        """Multiply with the weight in the type that the product is computed in."""
        device = input.device.type
        ctx.layer = layer
        autocast = torch.is_autocast_enabled(device) and input.dtype == torch.float32
        dtype = torch.get_autocast_dtype(device) if autocast else input.dtype
        return functional.linear(input.to(dtype), layer.dequantized(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Carry the gradient on to the input."""
        return gradients[0] @ ctx.layer.dequantized(gradients[0].dtype), None, None


def _eight_bits(weight_OI: Tensor) -> tuple[Tensor, Tensor, None]:
    weight_OI = weight_OI.detach().float()
    scales_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / 127
    codes = (weight_OI / scales_O1.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
    return codes, scales_O1, None


def _four_bits(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round to 16 evenly spaced values between the least and the greatest weight of each group.

    Scales and offsets are kept in bfloat16, and the codes are chosen for them as they are kept.
    """
    flat = weight_OI.detach().float().flatten()
    missing = -len(flat) % GROUP
    weights_GS = torch.cat([flat, flat.new_zeros(missing)]).view(-1, GROUP) if missing else flat.view(-1, GROUP)
    least, greatest = weights_GS.amin(dim=1, keepdim=True), weights_GS.amax(dim=1, keepdim=True)
    offsets = least.to(torch.bfloat16)
    scales = ((greatest - offsets.float()) / 15).to(torch.bfloat16)
    steps = (weights_GS - offsets.float()) / scales.float().clamp(min=torch.finfo(torch.float32).tiny)
    codes_GS = steps.round_().clamp_(0, 15).to(torch.uint8)
    return codes_GS[:, 0::2] | (codes_GS[:, 1::2] << 4), scales, offsets


@torch.no_grad()
def quantize_weights(model: PreTrainedModel, quantization: Quantization) -> None:
    """Replace the linear layers of a model by quantized ones, in place, one after the other.

    The model remembers what it was (:func:`original_of`), so its fingerprint stays that of the weights as published.

    Args:
        model: Best while it is still in the CPU's memory: only the integers then go to the GPU.
        quantization: How.

    Raises:
        ConfigError: It is quantized already.
        UnsupportedModelError: Most of its weights do not lie in linear layers, so that little would be saved.
    """
    before = original_of(model)
    if before is not None:
        raise ConfigError(
            f"the model is in {before.quantization} already; load it again to quantize it to {quantization}"
        )
    layers = _layers(model)
    inside = sum(layer.weight.numel() for layer in layers)
    whole = sum(parameter.numel() for parameter in _matrices(model))
    if inside < _LEAST_SHARE * whole:
        raise UnsupportedModelError(
            f"'{model.config.model_type}' keeps {inside:,} of its {whole:,} weights in linear layers and the rest "
            "elsewhere (experts, convolutions), which quantization does not reach; load it without quantization, in "
            "bfloat16 to halve its memory"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    setattr(model, _ORIGINAL, Original(quantization, model_fingerprint(model), parameters))
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {layer: [] for layer in layers}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child in places:
                places[child].append((parent, name))
    while layers:
        layer = layers.pop()  # and with it the last reference to its weight: both are never in memory for all layers
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        quantized = QuantizedLinear(weight, layer.bias, quantization).train(layer.training)
        for parent, name in places.pop(layer):
            setattr(parent, name, quantized)


def _layers(model: PreTrainedModel) -> list[nn.Linear | Conv1D]:
    """Find the layers to replace: all linear ones but the head and those that share their weight with another."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    head = model.get_output_embeddings()
    found = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]
    # A subclass may compute something else with its weight (a router, a normalized layer).
    return [layer for layer in found if type(layer) in (nn.Linear, Conv1D) and owners[id(layer.weight)] == 1]


def _matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """Give the weights of the body that are no vectors and no embeddings."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    left_out = {id(module.weight) for module in (*embeddings, model.get_output_embeddings()) if module is not None}
    return [parameter for parameter in model.parameters() if parameter.ndim > 1 and id(parameter) not in left_out]
