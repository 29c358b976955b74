"""The seam: prompt keys and values enter through the attention interface of transformers.

One function is registered under :data:`IMPLEMENTATION`. It receives, as a keyword argument that ``model(...)`` hands
down to every layer, a :class:`Steering`: the prompt's keys and values per layer and which rows may see them. Nothing
is patched, no hook is set, no global holds the current batch.

Shape letters: B batch, T text tokens of this forward, S text tokens in the cache and of this forward, P prompt length,
N KV heads, H head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from softprompts.models.kernels import packed_attention
from softprompts.models.packing import Packing
from softprompts.types import LayerKey

__all__ = ["IMPLEMENTATION", "Seen", "Steering", "attend", "register_attention"]

IMPLEMENTATION = "softprompts"
"""Name of the attention implementation in ``config._attn_implementation``."""


@dataclass(frozen=True)
class Seen:
    """One call of the attention function, as the probe records it."""

    module: nn.Module
    keys_BNSH: Tensor
    values_BNSH: Tensor
    window: int | None


@dataclass
class Steering:
    """What one forward pass carries down to the attention layers.

    It lives as long as that forward (or, while decoding, as its sequence of forwards) and belongs to nobody else, so
    two threads may steer one model in two ways at the same time.
    """

    layer_of: Mapping[nn.Module, LayerKey] = field(default_factory=dict)
    """Number of every attention module, from the probe (some families do not number their modules)."""
    keys_values: Mapping[LayerKey, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Per layer keys and values ``[B or 1, N, P, H]``; a leading 1 is expanded to all rows, never copied."""
    visible_BP: Tensor | None = None
    """Which prompt positions a row may see (bool); ``None`` means that all rows see all of them."""
    visible_at: Mapping[LayerKey, Tensor] = field(default_factory=dict)
    """The same for layers where it differs, because not every prompt of the batch reaches them."""
    unbiased: bool = False
    """Leave relative position biases out: then a key counts the same wherever it stands (only a check needs that)."""
    packing: Packing | None = None
    """If given: the batch is one packed row and its prompts come from here (``keys_values`` is not looked at)."""
    captured: dict[LayerKey, tuple[Tensor, Tensor]] | None = None
    """If a dict: every layer writes its own text keys and values ``[B, N, S, H]`` there."""
    seen: list[Seen] | None = None
    """If a list: every call is recorded there (probing only)."""
    _masks: dict[tuple[int, bool, int], tuple[Tensor | None, Tensor]] = field(default_factory=dict, repr=False)

    def begin(self) -> None:
        """Start another forward pass with the same prompts (a decoding step): its masks are new."""
        self._masks.clear()

    def select(self, rows_R: Tensor) -> Steering:
        """Return what steers rows ``rows_R`` of the present ones (masks of the last forward pass are left behind)."""
        keys_values = {
            layer: (keys if keys.shape[0] == 1 else keys[rows_R], values if values.shape[0] == 1 else values[rows_R])
            for layer, (keys, values) in self.keys_values.items()
        }
        visible_BP = None if self.visible_BP is None else self.visible_BP[rows_R]
        # layers that the same prompts reach share one mask, and go on sharing it
        chosen = {id(visible): visible[rows_R] for visible in self.visible_at.values()}
        visible_at = {layer: chosen[id(visible)] for layer, visible in self.visible_at.items()}
        return Steering(self.layer_of, keys_values, visible_BP, visible_at)

    def widened(
        self,
        mask: Tensor | None,
        query_BNTH: Tensor,
        keys_BNSH: Tensor,
        length: int,
        causal: bool,
        layer: LayerKey | None = None,
    ) -> Tensor:
        """Put the prompt's columns in front of the text's attention mask.

        Layers of one kind share their mask, so each distinct mask is widened once per forward.

        Args:
            mask: What the model computed for the text, bool ``[B or 1, 1, T, S]``, or ``None`` where it relies on the
                causal flag of the kernel.
            query_BNTH: Queries of this forward (for their shape).
            keys_BNSH: Text keys (for their shape).
            length: P.
            causal: What ``None`` stands for: causal, or everything visible.
            layer: Which layer asks; see :attr:`visible_at`.

        Returns:
            Bool ``[B or 1, 1, T, P + S]``, true where attention is allowed.
        """
        T, S = query_BNTH.shape[2], keys_BNSH.shape[2]
        visible_BP = self.visible_at.get(layer, self.visible_BP) if layer is not None else self.visible_BP
        place = (id(mask) if mask is not None else -T, causal, id(visible_BP))
        # The mask itself is kept beside the result: an id alone may be reused after the tensor is freed.
        entry = self._masks.get(place)
        if entry is not None and entry[0] is mask and entry[1].shape[-2:] == (T, length + S):
            return entry[1]
        text = mask
        if text is None:
            text = torch.ones(1, 1, T, S, dtype=torch.bool, device=query_BNTH.device)
            text = text.tril(S - T) if causal else text
        rows = text.shape[0]
        if visible_BP is None:
            front = text.new_ones(rows, 1, T, length)
        else:
            front = visible_BP[:, None, None, :].expand(-1, 1, T, -1)
            text = text.expand(front.shape[0], -1, -1, -1)
        wide = torch.cat([front, text], dim=-1)
        self._masks[place] = (mask, wide)
        return wide


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    steering: Steering | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention of transformers over ``[prompt; text]``.

    A prompt is visible to every query that its row allows, also in layers with a sliding window: it is part of the
    model for this task, not of the text that scrolls by.

    Args:
        module: The attention module that calls.
        query: ``[B, N * groups, T, H]``.
        key: ``[B, N, S, H]``, rotary embedding applied, cache included.
        value: ``[B, N, S, H]``.
        attention_mask: Bool ``[B or 1, 1, T, S]`` or ``None``.
        steering: What :class:`Steering` says; without one this is transformers' own ``sdpa``.
        **kwargs: Passed on.

    Returns:
        What ``sdpa_attention_forward`` returns: ``[B, T, N * groups, H]`` and ``None``.
    """
    if steering is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[arg-type]
    if steering.seen is not None:
        window = kwargs.get("sliding_window")
        steering.seen.append(Seen(module, key, value, window if isinstance(window, int) else None))
    layer = steering.layer_of.get(module)
    if layer is not None and steering.captured is not None:
        steering.captured[layer] = (key, value)
    if steering.unbiased:
        kwargs["position_bias"] = None
    bias = kwargs.get("position_bias")
    if steering.packing is not None:
        return _attend_packed(steering.packing, layer, query, key, value, kwargs), None
    if layer is not None and layer in steering.keys_values:
        keys_P, values_P = steering.keys_values[layer]
        causal = bool(getattr(module, "is_causal", True))
        attention_mask = steering.widened(attention_mask, query, key, keys_P.shape[2], causal, layer)
        if isinstance(bias, Tensor):  # a prompt has no distance to the text
            kwargs["position_bias"] = nn.functional.pad(bias, (keys_P.shape[2], 0))
        B = query.shape[0]
        key = torch.cat([keys_P.to(key.dtype).expand(B, -1, -1, -1), key], dim=2)
        value = torch.cat([values_P.to(value.dtype).expand(B, -1, -1, -1), value], dim=2)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[arg-type]


def _attend_packed(
    packing: Packing,
    layer: LayerKey | None,
    query_1AMH: Tensor,
    key_1NMH: Tensor,
    value_1NMH: Tensor,
    kwargs: Mapping[str, object],
) -> Tensor:
    """Attention of a packed row, ``[1, M, A, H]``."""
    prefixes: list[tuple[Tensor, Tensor] | None] = []
    for layers in packing.keys_values:
        pair = layers.get(layer) if layer is not None else None
        prefixes.append(None if pair is None else (pair[0].to(key_1NMH.dtype), pair[1].to(value_1NMH.dtype)))
    scale, window = kwargs.get("scaling"), kwargs.get("sliding_window")
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query_1AMH, key_1NMH, value_1NMH))
    return packed_attention(
        query,
        key,
        value,
        packing,
        prefixes,
        scale=float(scale) if isinstance(scale, (int, float)) else None,
        window=window if isinstance(window, int) else None,
    )[None]


def register_attention() -> None:
    """Make :data:`IMPLEMENTATION` known to transformers; repeated calls change nothing."""
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
