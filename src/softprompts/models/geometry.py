"""What a model offers to a prompt, found by running it: config field names lie, tensors do not.

Two tokens go through the model with a recording attention function and with a cache. What the function was handed and
what the cache holds must agree, layer by layer; a model where they do not is refused.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from softprompts.errors import UnsupportedModelError
from softprompts.models.attention import Seen, Steering
from softprompts.types import Geometry, KeyValueSite, LayerKey

__all__ = ["probe"]


def probe(model: PreTrainedModel) -> tuple[Geometry, dict[nn.Module, LayerKey]]:
    """Run two tokens through ``model`` and read off the shapes.

    Args:
        model: A causal LM that already uses the project's attention implementation.

    Returns:
        The geometry, and the number of every attention module.

    Raises:
        UnsupportedModelError: The attention does not go through the interface, or the cache disagrees with it.
    """
    family = str(getattr(model.config, "model_type", type(model).__name__))
    if bool(getattr(model.config, "is_encoder_decoder", False)):
        raise UnsupportedModelError(
            f"'{family}' is an encoder-decoder; this version steers decoder-only models: load a causal LM instead"
        )
    embedding = model.get_input_embeddings()
    steering = Steering(seen=[])
    cache = DynamicCache()
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    with torch.no_grad():
        try:
            model.base_model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.arange(2, device=device)[None],
                past_key_values=cache,
                use_cache=True,
                steering=steering,
            )
        except (TypeError, ValueError) as error:
            raise UnsupportedModelError(f"'{family}' refuses a prompt in its attention: {error}") from error
    assert steering.seen is not None
    _check_against_cache(family, steering.seen, cache)
    sites = tuple(_site(number, seen) for number, seen in enumerate(steering.seen))
    layer_of = {seen.module: site.key for seen, site in zip(steering.seen, sites, strict=True)}
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    geometry = Geometry(
        family=family,
        width=int(embedding(ids).shape[-1]),
        vocab_size=_rows(embedding),
        max_positions=int(limit) if limit else None,
        sites=sites,
    )
    return geometry, layer_of


def _site(number: int, seen: Seen) -> KeyValueSite:
    return KeyValueSite(
        key=LayerKey("self", number),
        kv_heads=int(seen.keys_BNSH.shape[1]),
        key_size=int(seen.keys_BNSH.shape[3]),
        value_size=int(seen.values_BNSH.shape[3]),
        window=seen.window,
    )


def _rows(embedding: nn.Module) -> int:
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[0])


def _check_against_cache(family: str, seen: list[Seen], cache: DynamicCache) -> None:
    if not seen:
        raise UnsupportedModelError(
            f"the attention of '{family}' does not go through transformers' attention interface; it cannot be steered"
        )
    if len({id(call.module) for call in seen}) != len(seen):
        raise UnsupportedModelError(f"'{family}' runs one attention module several times; it cannot be steered")
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    held = [(keys, values) for keys, values in pairs if keys is not None and values is not None]
    agree = len(held) == len(seen) and all(
        torch.equal(keys, call.keys_BNSH) and torch.equal(values, call.values_BNSH)  # false where shapes differ
        for (keys, values), call in zip(held, seen, strict=True)
    )
    if not agree:
        raise UnsupportedModelError(
            f"'{family}' keeps other keys and values in its cache ({len(held)} layers) than its attention uses "
            f"({len(seen)} calls); a prefix would not reach every layer, so the model is refused"
        )
