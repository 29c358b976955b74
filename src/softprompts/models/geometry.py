"""What a model offers to a prompt, found by running it: config field names lie, tensors do not.

Two tokens go through the model with a recording attention function and with a cache. Where the attention function is
called, prompts enter through it; layers that share the keys and values of an earlier one share its prefix, too. Where
it is not called, but keys and values stand in the cache, prompts enter there.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from softprompts.errors import UnsupportedModelError
from softprompts.models.attention import Seen, Steering
from softprompts.models.cache_route import held_keys_values, is_stateful
from softprompts.models.families import REFUSED_FAMILIES, own_windows
from softprompts.types import Geometry, KeyValueSite, LayerKey

__all__ = ["Probed", "new_cache", "probe"]


@dataclass(frozen=True)
class Probed:
    """How prompts reach a causal model."""

    geometry: Geometry
    layer_of: dict[nn.Module, LayerKey]
    """Number of every attention module; empty where the attention cannot be reached."""
    through_attention: bool
    """Whether keys and values enter through the attention interface; otherwise they enter through the cache."""
    stateful: bool
    """Whether layers keep a recurrent state, so that an embedding prompt cannot be folded into keys and values."""
    takes_embeddings: bool
    """Whether the model reads embeddings that are no rows of its vocabulary."""
    cache_name: str
    """What the model calls its cache."""
    accepts: frozenset[str]
    """Arguments that its forward knows."""

    def check_kind(self, kind: str, placement: str = "prefix") -> None:
        """Refuse a kind of prompt that the model has no place for.

        Raises:
            UnsupportedModelError: ``"prefix"`` without keys and values, ``"embedding"`` where only words are read, or
                keys and values as an infix where they can only stand in front of everything.
        """
        family = self.geometry.family
        if kind == "prefix" and placement == "infix" and self.geometry.sites:
            if not self.through_attention:
                raise UnsupportedModelError(
                    f"prompts reach '{family}' through its cache, where keys and values stand in front of the whole "
                    "text; as an infix train embeddings (prompt.kind: embedding)"
                )
            if self.geometry.prompt_scrolls:
                raise UnsupportedModelError(
                    f"'{family}' was loaded with window 'text', and keys and values between input and output have no "
                    "place in a window; load it with window 'visible', or train embeddings (prompt.kind: embedding)"
                )
        if kind == "prefix" and not self.geometry.sites:
            raise UnsupportedModelError(
                f"no layer of '{family}' has keys and values, so there is nothing that a prefix could stand in front "
                "of; train an embedding prompt (prompt.kind: embedding)"
            )
        if kind == "embedding" and not self.takes_embeddings:
            raise UnsupportedModelError(
                f"'{family}' reads more of a token than its embedding (each layer looks the token up again), so "
                "embeddings that are no words cannot be its input; train a prefix (prompt.kind: prefix)"
            )


def probe(model: PreTrainedModel, body: nn.Module, *, window: str | None = None) -> Probed:
    """Run two tokens through ``model`` and read off the shapes.

    Args:
        model: A causal LM that already uses the project's attention implementation.
        body: Its part that makes hidden states.
        window: ``"visible"``, ``"text"`` or ``None`` for what the model allows; see
            :attr:`softprompts.types.Geometry.prompt_scrolls`.

    Raises:
        UnsupportedModelError: Neither attention nor cache can be reached, or they disagree.
    """
    family = str(getattr(model.config, "model_type", type(model).__name__))
    if family in REFUSED_FAMILIES:
        raise UnsupportedModelError(f"'{family}' cannot be steered correctly: {REFUSED_FAMILIES[family]}")
    names = frozenset(inspect.signature(type(body).forward).parameters)
    cache_name = next((name for name in ("past_key_values", "cache_params") if name in names), "")
    if not cache_name:
        raise UnsupportedModelError(
            f"'{family}' keeps its state outside of transformers' caches and reads pads like text, so rows of "
            "different lengths could not be steered side by side; it is refused"
        )
    cache, steering = new_cache(model), Steering(seen=[])
    takes_embeddings = _run(family, model, body, {cache_name: cache, "use_cache": True, "steering": steering}, names)
    assert steering.seen is not None
    held, stateful = held_keys_values(cache), is_stateful(cache)
    layer_of, sites = _numbered(family, steering.seen, len(held))
    if not steering.seen:
        if not held and not stateful:
            raise UnsupportedModelError(
                f"neither the attention nor the cache of '{family}' can be reached; it cannot be steered"
            )
        windows = own_windows(model.config, len(held))
        sites = [_site(number, *pair, windows[number]) for number, pair in enumerate(held)]
    embedding = model.get_input_embeddings()
    geometry = Geometry(
        family=family,
        width=int(embedding(torch.zeros(1, 1, dtype=torch.long, device=model.device)).shape[-1]),
        vocab_size=_rows(embedding),
        max_positions=_steady_positions(model.config.get_text_config()),
        sites=tuple(sites),
        prompt_scrolls=_scrolls(family, sites, bool(steering.seen) and not stateful, window),
    )
    return Probed(geometry, layer_of, bool(steering.seen), stateful, takes_embeddings, cache_name, names)


def _steady_positions(config: PreTrainedConfig) -> int | None:
    """Positions within which what a row computes depends on no other row; ``None`` for any number.

    Two kinds of scaled rotary embeddings switch, for the whole batch, as soon as one row goes beyond the length of the
    model's first training (``dynamic_rope_update`` of transformers). So none may: a batch equals its rows one by one.
    """
    limits = [getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)]  # MPT
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # some have one per layer type
        if one.get("rope_type") in ("dynamic", "longrope"):
            limits += [holder.get("original_max_position_embeddings") for holder in (one, vars(config))]
    return min((int(limit) for limit in limits if limit), default=None)


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty cache: one that keeps recurrent states where the model has any.

    Otherwise no layer of it forgets what a window hides: that is left to the mask.
    """
    cache = DynamicCache(config=model.config)
    return cache if is_stateful(cache) else DynamicCache()


def _run(family: str, model: PreTrainedModel, body: nn.Module, options: dict[str, Any], names: frozenset[str]) -> bool:
    """Run two positions; returns whether they could be embeddings that stand for no word."""
    device = model.device
    width = model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=device)).shape[-1]
    generator = torch.Generator().manual_seed(3)
    inputs_embeds = torch.randn(1, 2, width, generator=generator).to(device, model.dtype)
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    known: dict[str, Any] = {"attention_mask": torch.ones_like(ids), **options}
    if "position_ids" in names:
        known["position_ids"] = torch.arange(2, device=device)[None]
    if not any(name in names for name in ("kwargs", "steering")):
        del known["steering"]
    with torch.no_grad():
        try:
            body(inputs_embeds=inputs_embeds, **known)
        except RuntimeError as error:
            if "inputs_embeds" not in str(error):
                raise
            body(input_ids=ids, **known)
            return False
        except (TypeError, ValueError) as error:
            raise UnsupportedModelError(f"'{family}' refuses a prompt in its attention: {error}") from error
    return True


def _numbered(family: str, seen: Sequence[Seen], held: int) -> tuple[dict[nn.Module, LayerKey], list[KeyValueSite]]:
    """Number the attention modules that have keys and values of their own; the others take those they share."""
    if len({id(call.module) for call in seen}) != len(seen):
        raise UnsupportedModelError(f"'{family}' runs one attention module several times; it cannot be steered")
    layer_of: dict[nn.Module, LayerKey] = {}
    sites: list[KeyValueSite] = []
    owners: list[tuple[Seen, LayerKey]] = []
    for call in seen:
        # random inputs: equal keys are the same keys (false where shapes differ)
        key = next((key for owner, key in owners if torch.equal(owner.keys_BNSH, call.keys_BNSH)), None)
        if key is None:
            site = _site(len(sites), call.keys_BNSH, call.values_BNSH, call.window)
            key = site.key
            sites.append(site)
            owners.append((call, key))
        layer_of[call.module] = key
    if seen and held != len(sites):
        raise UnsupportedModelError(
            f"'{family}' keeps keys and values of {held} layers in its cache, but its attention uses those of "
            f"{len(sites)}; a prefix would not reach every layer, so the model is refused"
        )
    return layer_of, sites


def _site(number: int, keys_BNSH: Tensor, values_BNSH: Tensor, window: int | None) -> KeyValueSite:
    return KeyValueSite(
        key=LayerKey("self", number),
        kv_heads=int(keys_BNSH.shape[1]),
        key_size=int(keys_BNSH.shape[3]),
        value_size=int(values_BNSH.shape[3]),
        window=window,
    )


def _scrolls(family: str, sites: Sequence[KeyValueSite], can_stay: bool, window: str | None) -> bool:
    """Whether the prompt takes part in sliding windows."""
    if all(site.window is None for site in sites):
        return False
    if window == "visible" and not can_stay:
        raise UnsupportedModelError(
            f"'{family}' applies its sliding window itself, so a prompt cannot stay visible behind it; "
            "load it with window 'text' (the prompt then scrolls by like text) or leave the option out"
        )
    return window == "text" or not can_stay


def _rows(embedding: nn.Module) -> int:
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0])
