"""What a prompt comes down to when it is served: keys and values in the number type of the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from softprompts.errors import PlacementError, UnknownPromptError
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt
from softprompts.types import PromptStates

__all__ = [
    "FoldedPrompt",
    "FoldedPrompts",
    "Measure",
    "fold_for_serving",
    "measured",
    "not_served",
    "positions_of",
    "size_bytes",
]


_EMBEDDING_BYTES = 4
"""Of a number of an embedding prompt that stays one, in front of an encoder: float32, as it was trained."""


@torch.no_grad()
def fold_for_serving(frozen: FrozenLM, prompt: SoftPrompt, name: str) -> PromptStates:
    """Compute a prompt once, for all rows that will carry it.

    Args:
        frozen: The model.
        prompt: Made for it.
        name: For messages.

    Raises:
        PromptMismatchError: It was made for another model.
        PlacementError: It is an infix.
    """
    if prompt.is_infix:
        raise not_served(name)
    (states,) = PromptedLM(frozen, [prompt]).states()
    dtype = frozen.dtype
    pairs = {layer: (k.detach().to(dtype), v.detach().to(dtype)) for layer, (k, v) in states.keys_values.items()}
    return replace(states, keys_values=pairs)


def not_served(name: str) -> PlacementError:
    """Say why an infix has no place in a served text."""
    return PlacementError(
        f"the prompt '{name}' is an infix, and a served text does not say where its input ends; train it with "
        "prompt.placement: prefix"
    )


def size_bytes(states: PromptStates) -> int:
    """Memory that a prompt takes."""
    tensors = [tensor for pair in states.keys_values.values() for tensor in pair]
    tensors += [] if states.embeddings_PD is None else [states.embeddings_PD]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def positions_of(frozen: FrozenLM, kind: str, length: int) -> int:
    """Positions that a prompt takes of its row's text.

    Args:
        frozen: The model. In an encoder-decoder keys and values stand beside the text and take none.
        kind: ``"prefix"`` or ``"embedding"``.
        length: P.
    """
    return 0 if frozen.pair is not None and kind == "prefix" else length


class Measure(NamedTuple):
    """What is known of a prompt before it is computed."""

    positions: int
    """See :func:`positions_of`."""
    size_bytes: int
    """What :func:`size_bytes` will be."""


def measured(frozen: FrozenLM, kind: str, length: int, width: int) -> Measure:
    """Say how long and how large a prompt will be.

    Args:
        frozen: The model.
        kind: ``"prefix"`` or ``"embedding"``.
        length: P.
        width: Numbers of one of its positions at rest, W.
    """
    position_bytes = width * frozen.dtype.itemsize
    if kind == "embedding":
        folded_bytes = frozen.geometry.prefix_width * frozen.dtype.itemsize
        position_bytes = folded_bytes if frozen.folds else width * _EMBEDDING_BYTES
    return Measure(positions_of(frozen, kind, length), length * position_bytes)


class FoldedPrompts:
    """Prompts that are in memory and stay there, by their numbers: ``"0"``, ``"1"``, ...

    Args:
        frozen: The model.
        states: What each of them comes down to.
    """

    def __init__(self, frozen: FrozenLM, states: Sequence[PromptStates]) -> None:
        self.on_change: Callable[[], None] | None = None
        self._frozen, self._states = frozen, states

    def positions(self, name: str) -> int:
        """See :func:`positions_of`.

        Raises:
            UnknownPromptError: There is no such prompt.
        """
        states = self.lease(name).states
        return positions_of(self._frozen, "prefix" if states.embeddings_PD is None else "embedding", states.length)

    def resident(self, name: str) -> bool:
        """All are."""
        return True

    def check_together(self, names: Collection[str]) -> None:
        """All are in memory."""

    def lease(self, name: str) -> FoldedPrompt:
        """Look a prompt up; raises UnknownPromptError."""
        if not name.isdecimal() or int(name) >= len(self._states):
            raise UnknownPromptError(f"there is no prompt '{name}': there are {len(self._states)}, by their numbers")
        return FoldedPrompt(self._states[int(name)])

    def wait_for_change(self, timeout_s: float) -> None:
        """Nothing changes."""
        time.sleep(timeout_s)


@dataclass(frozen=True)
class FoldedPrompt:
    """A prompt that is there; the lease of :class:`FoldedPrompts`."""

    states: PromptStates
    ready = True
    waits_for_room = False
    error = None

    def release(self) -> None:
        """Nothing is to be freed."""
