"""How alike prompts are, by the neurons that they activate (Su et al. 2022, section 6.1: ON).

A prompt stands in front of an empty text: of the one token that begins a text of a decoder-only model; of the marks
around an empty input of an encoder-decoder, whose decoder then reads its first token. A *neuron* is one number that
enters the second matrix of a layer's feed-forward network at that token; it is activated if it is larger than 0. Two
prompts overlap as far as they activate the same neurons: the cosine of their vectors of zeros and ones.

The official code looks at plain networks, where that number is the activation function's output. With a gate (SwiGLU,
GeGLU) the second matrix reads the product of gate and other half, and this is what counts here: it is what the neuron
gives to the residual stream. Unlike the measures on a prompt's own numbers, this one compares prompts of any kind and
length, on one model.

Shape letters: K prompts, F neurons of one layer, P prompt length, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from softprompts.errors import PromptMismatchError
from softprompts.models import FrozenLM
from softprompts.models.feed_forward import find_feed_forwards, watch
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt, prompt_from_table
from softprompts.types import Batch

__all__ = ["ActivatedNeurons", "activated_neurons"]


@dataclass(frozen=True)
class ActivatedNeurons:
    """Which neurons each of K prompts activates."""

    layers: tuple[Tensor, ...]
    """Per layer, bottom first, bool ``[K, F]``."""

    def overlap(self, layers: Iterable[int] | None = None) -> Tensor:
        """Cosine of the prompts' vectors of zeros and ones, ``[K, K]`` in float64.

        Args:
            layers: Numbers of the layers that count; ``None`` for all.
        """
        chosen = self.layers if layers is None else [self.layers[number] for number in layers]
        direction_KF = functional.normalize(torch.cat(list(chosen), dim=1).double(), dim=1)
        return (direction_KF @ direction_KF.T).clamp(0, 1)

    def groups(self, count: int = 3) -> dict[str, range]:
        """Cut the layers into ``count`` groups (or one per layer, where there are fewer), bottom first, by name."""
        total = len(self.layers)
        ends = [total * number // min(count, total) for number in range(min(count, total) + 1)]
        ranges = [range(first, last) for first, last in itertools.pairwise(ends)]
        return {f"layers {group[0]}-{group[-1]}" if len(group) > 1 else f"layer {group[0]}": group for group in ranges}

    def overlaps(self, groups: int = 3) -> dict[str, Tensor]:
        """The overlap in ``"all layers"`` and in each of :meth:`groups`, by name."""
        return {"all layers": self.overlap()} | {
            name: self.overlap(layers) for name, layers in self.groups(groups).items()
        }


@torch.no_grad()
def activated_neurons(prompts: Sequence[SoftPrompt], frozen: FrozenLM) -> ActivatedNeurons:
    """Find out which neurons each prompt activates by itself.

    Args:
        prompts: For this model; of any kinds and lengths. Embeddings of an unknown model need its width only.
        frozen: The model. Hooks watch it while it reads, and are gone afterwards.

    Raises:
        PromptMismatchError: A prompt was made for a model of other shapes.
        UnsupportedModelError: Where the model's feed-forward networks are is not understood (mixtures of experts).
    """
    feed_forwards = find_feed_forwards(frozen)
    rows: list[list[Tensor]] = []
    for prompt in prompts:
        prompted = PromptedLM(frozen, [_for_model(prompt, frozen)])
        states = prompted.states()
        with watch(feed_forwards, rows=1) as seen:
            prompted.start(_empty_text(frozen), states)
        rows.append([entered_1F > 0 for entered_1F in seen if entered_1F is not None])
        assert len(rows[-1]) == len(feed_forwards), "a layer was not run"
    return ActivatedNeurons(tuple(torch.cat(list(layer)).cpu() for layer in zip(*rows, strict=True)))


def _for_model(prompt: SoftPrompt, frozen: FrozenLM) -> SoftPrompt:
    """A copy, so that the caller's prompt stays on its device."""
    if not prompt.geometry.is_partial:
        return prompt.fold()
    if prompt.geometry.width != frozen.geometry.width:
        raise PromptMismatchError(
            f"an embedding prompt of width {prompt.geometry.width} cannot stand in front of '{frozen.name}' of width "
            f"{frozen.geometry.width}; name the model that it was made for"
        )
    return prompt_from_table(prompt.kind, frozen.geometry, prompt.table_PW, placement=prompt.placement)


def _empty_text(frozen: FrozenLM) -> Batch:
    """A batch of one row with nothing but the marks that a text has anyway."""
    ids = (*frozen.bos_ids, *(frozen.end_ids or ()))
    if not ids:
        begin = frozen.tokenizer.bos_token_id
        ids = (frozen.eos_id if begin is None else int(begin),)
    ids_11 = torch.tensor([ids], device=frozen.device)
    row_1 = torch.zeros(1, dtype=torch.long, device=frozen.device)
    return Batch(ids_11, torch.ones_like(ids_11), labels_BT=None, prompt_of_row_B=row_1, infix_B=row_1)
