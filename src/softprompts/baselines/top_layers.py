"""Which weights lie at the top of a model: found by running it, never from the names of its modules.

The yardstick "FT-top2" of the prefix-tuning paper (Li & Liang 2021, section 6) trains the last two layers, the final
norm and the LM head. Its code has ``top_layers`` 0, 1, 2 (with the word embeddings, which are GPT-2's head too) and 00,
11, 22 (without them); here these are two numbers, ``baseline.top_layers.layers`` and ``.embeddings``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import nn

from softprompts.config import TopLayersConfig
from softprompts.errors import ConfigError, UnsupportedModelError
from softprompts.models import FrozenLM

__all__ = ["top_parameters"]


def top_parameters(frozen: FrozenLM, config: TopLayersConfig) -> tuple[str, ...]:
    """Find the weights at the top of a model.

    Args:
        frozen: Decoder-only, or an encoder-decoder, whose top is its decoder's.
        config: How many layers, and whether the word embeddings belong to it.

    Returns:
        Names of parameters as in ``model.named_parameters()``, in that order; tied ones once.

    Raises:
        ConfigError: The model has fewer layers, or nothing is left to train.
        UnsupportedModelError: It is not built of layers that run one after the other.
    """
    finished = _finished(frozen)
    layers = _layers(frozen, finished)
    if not 0 <= config.layers <= len(layers):
        raise ConfigError(
            f"baseline.top_layers.layers is {config.layers}, but '{frozen.name}' has {len(layers)} layers"
        )
    embeddings = frozen.model.get_input_embeddings()
    words = {id(weight) for weight in embeddings.parameters()}
    above = finished[finished.index(layers[-1]) + 1 :]
    chosen = {id(weight) for module in above for weight in module.parameters(recurse=False)} - words
    chosen |= {id(weight) for layer in layers[len(layers) - config.layers :] for weight in layer.parameters()}
    chosen |= words if config.embeddings else set()
    names = tuple(name for name, weight in frozen.model.named_parameters() if id(weight) in chosen)
    if not names:
        raise ConfigError(
            f"'{frozen.name}' has nothing behind its last layer but an LM head that shares the word embeddings; set "
            "baseline.top_layers.layers to 1 or more, or baseline.top_layers.embeddings to true"
        )
    return names


def _finished(frozen: FrozenLM) -> list[nn.Module]:
    """Run two tokens, and list every module in the order in which it was done with them."""
    finished: list[nn.Module] = []

    def noting(module: nn.Module) -> Callable[..., None]:
        return lambda *_: finished.append(module)

    ids_1T = torch.zeros(1, 2, dtype=torch.int64, device=frozen.device)
    inputs = {"input_ids": ids_1T} if frozen.pair is None else {"input_ids": ids_1T, "decoder_input_ids": ids_1T}
    with ExitStack() as stack, torch.no_grad():
        for module in frozen.model.modules():
            stack.callback(module.register_forward_hook(noting(module)).remove)
        frozen.model(**inputs, use_cache=False)
    return list({id(module): module for module in finished}.values())


def _layers(frozen: FrozenLM, finished: list[nn.Module]) -> list[nn.Module]:
    """The modules that run one after the other in the model, or in its decoder: its largest list of modules."""
    body = frozen.model if frozen.pair is None else frozen.pair.decoder
    lists = [list(found) for found in _outermost_lists(body)]
    ran = {id(module): place for place, module in enumerate(finished)}
    lists = [[layer for layer in found if id(layer) in ran] for found in lists]
    largest = max(lists, key=lambda found: sum(w.numel() for layer in found for w in layer.parameters()), default=[])
    if not largest:
        raise UnsupportedModelError(
            f"the layers of '{frozen.geometry.family}' cannot be told apart, so its top ones cannot be trained alone; "
            "set method to fine_tuning or prompt"
        )
    return sorted(largest, key=lambda layer: ran[id(layer)])


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Lists of modules that lie in no other list."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)
