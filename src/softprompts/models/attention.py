"""The seam: prompt keys and values enter through the attention interface of transformers.

One function is registered under :data:`IMPLEMENTATION`. It receives, as a keyword argument that ``model(...)`` hands
down to every layer, a :class:`Steering`: the prompt's keys and values per layer and which rows may see them. Nothing
is patched, no hook is set, no global holds the current batch.

Shape letters: B batch, T text tokens of this forward, S text tokens in the cache and of this forward, P prompt length,
N KV heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from softprompts.models.eager import eager_attention, needs_eager
from softprompts.models.flex import flex_packed_attention
from softprompts.models.in_place import InPlaceCache
from softprompts.models.inputs import differing_visibility, rows_of_prompts, visible_positions
from softprompts.models.kernels import packed_attention
from softprompts.models.operators import packed_attention_operator
from softprompts.models.packing import Packing
from softprompts.models.sharing import PromptsOfRows, worth_sharing
from softprompts.models.slot_pass import SlotPass
from softprompts.models.source_attention import source_attention
from softprompts.types import LayerKey, PromptStates

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
    slots: SlotPass | None = None
    """If given: the batch is one packed row of tokens of rows whose keys and values lie in slots, prompts included."""
    cache: InPlaceCache | None = None
    """While decoding: its layers keep columns free for prompts, which are written there at the first forward pass."""
    shared: bool = False
    """While decoding: prompts stay where they are and their rows attend to them together (``keys_values`` is then a
    :class:`~softprompts.models.sharing.PromptsOfRows`)."""
    front_BPD: Tensor | None = None
    """Embeddings to be read in front of each row's text, of prompts that cannot be folded; gone once they were read."""
    front_BP: Tensor | None = None
    """Which of those columns are the row's own (bool)."""
    position_BT: Tensor | None = None
    """Positions of this forward's tokens where prompts scroll out of sliding windows; ``None``: they stay visible."""
    sees_BT: Tensor | None = None
    """Which of this forward's tokens see their row's prompt (bool): those behind an infix; ``None``: all of them."""
    captured: dict[LayerKey, tuple[Tensor, Tensor]] | None = None
    """If a dict: every layer writes its own text keys and values ``[B, N, S, H]`` there."""
    seen: list[Seen] | None = None
    """If a list: every call is recorded there (probing only)."""
    _masks: dict[tuple[int, bool, int, int | None], tuple[Tensor | None, Tensor]] = field(
        default_factory=dict, repr=False
    )

    @classmethod
    def of_prompts(
        cls, layer_of: Mapping[nn.Module, LayerKey], states: Sequence[PromptStates], prompt_of_row_B: Tensor
    ) -> Steering:
        """Lay out the prompts that the rows of a batch carry.

        Args:
            layer_of: Number of every attention module.
            states: The prompts in use (:func:`softprompts.models.inputs.prompts_in_use`).
            prompt_of_row_B: Each row's index into them, -1 for none.
        """
        keys_values = rows_of_prompts(states, prompt_of_row_B)
        visible_BP = visible_positions(states, prompt_of_row_B)
        return cls(layer_of, keys_values, visible_BP, differing_visibility(states, prompt_of_row_B))

    @classmethod
    def of_decoding(
        cls, layer_of: Mapping[nn.Module, LayerKey], states: Sequence[PromptStates], prompt_of_row_B: Tensor, rows: int
    ) -> Steering:
        """Lay out the prompts of rows that will be continued, with the cache that their text goes to.

        Args:
            layer_of: Number of every attention module.
            states: The prompts in use, folded.
            prompt_of_row_B: Each row's index into them, -1 for none.
            rows: Rows that will be continued (more than B with beams).
        """
        prompts = PromptsOfRows(states, prompt_of_row_B)
        shared = worth_sharing(states, rows)
        return cls(
            layer_of,
            prompts,
            visible_positions(states, prompt_of_row_B),
            differing_visibility(states, prompt_of_row_B),
            cache=InPlaceCache(0 if shared else prompts.length),
            shared=shared,
        )

    def begin(self) -> None:
        """Start another forward pass with the same prompts (a decoding step): its masks are new."""
        self._masks.clear()
        self.sees_BT = None

    def select(self, rows_R: Tensor) -> Steering:
        """Return what steers rows ``rows_R`` of the present ones (masks of the last forward pass are left behind)."""
        keys_values: Mapping[LayerKey, tuple[Tensor, Tensor]]
        if isinstance(self.keys_values, PromptsOfRows):
            keys_values = self.keys_values.select(rows_R)
        else:
            keys_values = {
                layer: (keys if len(keys) == 1 else keys[rows_R], values if len(values) == 1 else values[rows_R])
                for layer, (keys, values) in self.keys_values.items()
            }
        visible_BP = None if self.visible_BP is None else self.visible_BP[rows_R]
        # layers that the same prompts reach share one mask, and go on sharing it
        chosen = {id(visible): visible[rows_R] for visible in self.visible_at.values()}
        visible_at = {layer: chosen[id(visible)] for layer, visible in self.visible_at.items()}
        return Steering(
            self.layer_of,
            keys_values,
            visible_BP,
            visible_at,
            cache=self.cache,
            shared=self.shared,
            front_BP=None if self.front_BP is None else self.front_BP[rows_R],
        )

    def joined(self, module: nn.Module, layer: LayerKey, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows' prompts and of their text, ``[B, N, P + S, H]``, of one layer."""
        held = None if self.cache is None or self.shared else self.cache.holder(module, key)
        if held is not None:
            if not held.has_front:
                held.put_front(*self.keys_values[layer])
            return held.behind_front()
        B = key.shape[0]
        keys_P, values_P = (states.expand(B, -1, -1, -1) for states in self.keys_values[layer])
        return torch.cat([keys_P.to(key.dtype), key], dim=2), torch.cat([values_P.to(value.dtype), value], dim=2)

    def widened(
        self,
        mask: Tensor | None,
        query_BNTH: Tensor,
        keys_BNSH: Tensor,
        length: int,
        causal: bool,
        layer: LayerKey | None = None,
        window: int | None = None,
    ) -> Tensor | None:
        """Put the prompt's columns in front of the text's attention mask.

        Layers of one kind share their mask, so each distinct mask is widened once per forward.

        Args:
            mask: What the model computed for the text, ``[B or 1, 1, T or 1, S]``, bool or added to the scores, or
                ``None`` where it relies on the causal flag of the kernel.
            query_BNTH: Queries of this forward (for their shape).
            keys_BNSH: Text keys (for their shape).
            length: P.
            causal: What ``None`` stands for: causal, or everything visible.
            layer: Which layer asks; see :attr:`visible_at`.
            window: Tokens that the layer looks back; prompts keep to it if :attr:`position_BT` is given.

        Returns:
            ``[B or 1, 1, T, P + S]``, of the kind of ``mask`` (bool: true where attention is allowed); ``None`` for
            single queries that see all.
        """
        T, S = query_BNTH.shape[2], keys_BNSH.shape[2]
        visible_BP = self.visible_at.get(layer, self.visible_BP) if layer is not None else self.visible_BP
        window = window if self.position_BT is not None else None
        if T == 1 and mask is None and visible_BP is None and window is None and self.sees_BT is None:
            return None
        place = (id(mask) if mask is not None else -T, causal, id(visible_BP), window)
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
            front = torch.ones(rows, 1, T, length, dtype=torch.bool, device=text.device)
        else:
            front = visible_BP[:, None, None, :].expand(-1, 1, T, -1)
        if window is not None and self.position_BT is not None:  # prompt column j is at position j
            column_P = torch.arange(length, device=front.device)
            front = front & (self.position_BT[:, None, :, None] - column_P < window)
        if self.sees_BT is not None:
            front = front & self.sees_BT[:, None, :, None]
        text = text.expand(front.shape[0], -1, T, -1)
        if text.dtype != torch.bool:  # families with masks of their own add them to the scores
            front = torch.zeros_like(front, dtype=text.dtype).masked_fill(~front, torch.finfo(text.dtype).min)
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
    model for this task, not of the text that scrolls by (unless the steering asks for that, see
    :attr:`Steering.position_BT`).

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
        return _attention(module, query, key, value, attention_mask, kwargs), None
    if steering.seen is not None:
        steering.seen.append(Seen(module, key, value, _window(kwargs)))
    layer = steering.layer_of.get(module)
    if layer is not None and steering.captured is not None:
        steering.captured[layer] = (key, value)
    if steering.unbiased:
        kwargs["position_bias"] = None
    bias = kwargs.get("position_bias")
    if steering.slots is not None:
        if layer is None:
            raise ValueError("an attention module that the probe did not see has no slots")
        return steering.slots.attend(layer, query, key, value, kwargs), None
    if steering.packing is not None:
        return _attend_packed(steering.packing, layer, query, key, value, kwargs), None
    if layer is not None and layer in steering.keys_values:
        causal = bool(getattr(module, "is_causal", True))
        prompts, window = steering.keys_values, _window(kwargs)
        if steering.shared and query.shape[2] == 1 and isinstance(prompts, PromptsOfRows) and _is_plain(kwargs):
            mask = steering.widened(attention_mask, query, key, prompts.length, causal, layer, window)
            scale = kwargs.get("scaling")
            scale = float(scale) if isinstance(scale, (int, float)) else query.shape[-1] ** -0.5
            return prompts.attend(layer, query, key, value, mask, scale), None
        wide_key, wide_value = steering.joined(module, layer, key, value)
        length = wide_key.shape[2] - key.shape[2]
        attention_mask = steering.widened(attention_mask, query, key, length, causal, layer, window)
        if isinstance(bias, Tensor):  # a prompt has no distance to the text
            kwargs["position_bias"] = nn.functional.pad(bias, (length, 0))
        key, value = wide_key, wide_value
    return _attention(module, query, key, value, attention_mask, kwargs), None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]
) -> Tensor:
    """Attention over all columns, ``[B, T, A, H]``."""
    if not needs_eager(kwargs):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    return eager_attention(
        query,
        key,
        value,
        mask,
        scaling=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        sinks_A=kwargs.get("s_aux"),
        position_bias=kwargs.get("position_bias"),
        causal=bool(getattr(module, "is_causal", True)),
    )


def _window(kwargs: Mapping[str, object]) -> int | None:
    window = kwargs.get("sliding_window")
    return window if isinstance(window, int) else None


def _is_plain(kwargs: Mapping[str, object]) -> bool:
    """Whether scores are nothing but scaled products of queries and keys."""
    return all(kwargs.get(name) is None for name in ("position_bias", "softcap", "s_aux"))


def _attend_packed(
    packing: Packing,
    layer: LayerKey | None,
    query_1AMH: Tensor,
    key_1NMH: Tensor,
    value_1NMH: Tensor,
    kwargs: Mapping[str, object],
) -> Tensor:
    """Attention of a packed row, ``[1, M, A, H]``."""
    if needs_eager(kwargs):
        raise ValueError("capped scores and sinks are not computed on packed rows")
    # Under autocast queries and keys may have left the rotary embedding in another type than the values.
    place = query_1AMH.device.type
    dtype = torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else value_1NMH.dtype
    query_1AMH, key_1NMH, value_1NMH = (tensor.to(dtype) for tensor in (query_1AMH, key_1NMH, value_1NMH))
    prefixes: list[tuple[Tensor, Tensor] | None] = []
    for layers in packing.keys_values:
        pair = layers.get(layer) if layer is not None else None
        prefixes.append(None if pair is None else (pair[0].to(dtype), pair[1].to(dtype)))
    scale = kwargs.get("scaling")
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query_1AMH, key_1NMH, value_1NMH))
    attention: Callable[..., Tensor] = flex_packed_attention
    if packing.held is not None and layer is not None:
        attention = partial(source_attention, layer=layer)
    elif not query.is_cuda:
        attention = packed_attention_operator if torch.compiler.is_compiling() else packed_attention
    return attention(
        query,
        key,
        value,
        packing,
        prefixes,
        scale=float(scale) if isinstance(scale, (int, float)) else None,
        window=_window(kwargs),
    )[None]


def register_attention() -> None:
    """Make :data:`IMPLEMENTATION` known to transformers; repeated calls change nothing."""
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
