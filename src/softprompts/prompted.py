"""A frozen model and its prompts together: states in, logits out.

The paths of one training step and of one decoding step both run through here. Prompts are computed once per step, at
batch 1; rows only attend to the result.

Shape letters: B batch, T text tokens, P prompt length, D width, V vocabulary, M label positions, K prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from softprompts.errors import PromptMismatchError
from softprompts.models.attention import Steering
from softprompts.models.cache import DecodeState
from softprompts.models.frozen import FrozenLM
from softprompts.models.inputs import (
    check_length,
    label_positions,
    left_aligned,
    position_ids,
    prompt_lengths,
    prompts_in_use,
    rows_of_prompts,
    visible_positions,
)
from softprompts.models.label_loss import chunked_cross_entropy
from softprompts.models.packing import pack
from softprompts.prompts.base import SoftPrompt
from softprompts.types import Batch, PromptStates

__all__ = ["LabelLogits", "LabelLosses", "PromptedLM"]


class LabelLogits(NamedTuple):
    """Logits where something is to be predicted, and nowhere else."""

    logits_MV: Tensor
    """Float32."""
    labels_M: Tensor
    row_M: Tensor
    """Row of the batch that each position belongs to."""


class LabelLosses(NamedTuple):
    """Cross-entropy where something is to be predicted."""

    losses_M: Tensor
    """Float32, with gradient."""
    labels_M: Tensor
    row_M: Tensor
    """Row of the batch that each position belongs to."""


class PromptedLM(nn.Module):
    """K prompts on one frozen causal language model.

    Args:
        frozen: The model.
        prompts: Its prompts; a row of a batch names its own by index. May be empty: then this is the model alone.

    Raises:
        PromptMismatchError: A prompt was made for a model of another geometry.
    """

    def __init__(self, frozen: FrozenLM, prompts: Sequence[SoftPrompt] = ()) -> None:
        super().__init__()
        for number, prompt in enumerate(prompts):
            if prompt.geometry != frozen.geometry:
                raise PromptMismatchError(
                    f"prompt {number} was made for a {prompt.geometry.family} of width {prompt.geometry.width} with "
                    f"{len(prompt.geometry.sites)} layers, this model is a {frozen.geometry.family} of width "
                    f"{frozen.geometry.width} with {len(frozen.geometry.sites)} layers; load the model it was made for"
                )
        # Kept out of nn.Module's sight: parameters() of this module are the prompts' alone.
        self._frozen = (frozen,)
        self.prompts = nn.ModuleList(prompts)
        self.to(frozen.device)
        self.packing = True
        """Whether training and scoring run all rows as one packed row, where the model allows it."""

    @property
    def frozen(self) -> FrozenLM:
        """The frozen model."""
        return self._frozen[0]

    def states(self) -> list[PromptStates]:
        """Compute every prompt's keys and values, with gradient. Call it once per step.

        Embeddings in front of a causal model do not depend on the text behind them, so they are run through the model
        here, once, instead of once per row; loss and gradients are the same.
        """
        return [self._folded(prompt()) for prompt in self.prompts]

    def _folded(self, states: PromptStates) -> PromptStates:
        if states.embeddings_PD is None:
            return states
        return PromptStates(length=states.length, keys_values=self.frozen.activations(states.embeddings_PD))

    def _hidden_states(
        self, batch: Batch, steering: Steering, length_B: Tensor, cache: DynamicCache | None = None
    ) -> Tensor:
        """Run the text of a batch behind its prompts; ``[B, T, D]``, meaningless at pads."""
        mask_BT = batch.mask_BT
        check_length(self.frozen.geometry, int(length_B.max()), int(mask_BT.sum(dim=1).max()))
        return self.frozen.hidden_states(
            input_ids=batch.ids_BT,
            attention_mask=mask_BT,
            position_ids=position_ids(mask_BT, length_B),
            past_key_values=cache,
            steering=steering,
        )

    def _steering(self, batch: Batch, states: Sequence[PromptStates]) -> tuple[Steering, Tensor]:
        self._check_prompts(batch, len(states))
        used, row_B = prompts_in_use(states, batch.prompt_of_row_B)
        steering = Steering(self.frozen.layer_of, rows_of_prompts(used, row_B), visible_positions(used, row_B))
        return steering, prompt_lengths(used, row_B)

    def _check_prompts(self, batch: Batch, known: int) -> None:
        prompt_of_row_B = batch.prompt_of_row_B
        if bool((prompt_of_row_B >= known).any()) or bool((prompt_of_row_B < -1).any()):
            raise PromptMismatchError(
                f"a row asks for prompt {int(prompt_of_row_B.max())}, but there are {known} prompts (counted from 0, "
                "-1 for none)"
            )

    def label_logits(self, batch: Batch, states: Sequence[PromptStates] | None = None) -> LabelLogits:
        """Predict the labels of a batch. The head runs on label positions only.

        Args:
            batch: With labels.
            states: What :meth:`states` returned in this step; computed here if left out.

        Raises:
            DataError: There are no labels, or one stands first in its row.
            LengthError: A row does not fit into the context.
            PromptMismatchError: A row asks for a prompt that is not there.
        """
        hidden_MD, labels_M, row_M = self._label_states(batch, states)
        return LabelLogits(self.frozen.head(hidden_MD), labels_M, row_M)

    def label_losses(self, batch: Batch, states: Sequence[PromptStates] | None = None) -> LabelLosses:
        """Cross-entropy of a batch's labels; the logits of a large vocabulary are never in memory all at once.

        Args:
            batch: With labels.
            states: What :meth:`states` returned in this step; computed here if left out, which is also the faster way
                to train: embedding prompts then run in the same pass as the text.

        Raises:
            DataError: There are no labels, or one stands first in its row.
            LengthError: A row does not fit into the context.
            PromptMismatchError: A row asks for a prompt that is not there.
        """
        hidden_MD, labels_M, row_M = self._label_states(batch, states)
        if self.frozen.head_is_trained:
            logits_MV = self.frozen.head(hidden_MD)
            return LabelLosses(functional.cross_entropy(logits_MV, labels_M, reduction="none"), labels_M, row_M)
        vocab_size = self.frozen.geometry.vocab_size
        losses_M = chunked_cross_entropy(self.frozen.head, hidden_MD, labels_M, vocab_size=vocab_size)
        return LabelLosses(losses_M, labels_M, row_M)

    def _label_states(self, batch: Batch, states: Sequence[PromptStates] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states that predict the labels ``[M, D]``, the labels and their rows."""
        row_M, column_M, labels_M = label_positions(batch)
        if self.packing and self.frozen.packable:
            return self._packed_states(batch, row_M, column_M, states), labels_M, row_M
        steering, length_B = self._steering(batch, self.states() if states is None else states)
        return self._hidden_states(batch, steering, length_B)[row_M, column_M], labels_M, row_M

    def _packed_states(
        self, batch: Batch, row_M: Tensor, column_M: Tensor, states: Sequence[PromptStates] | None
    ) -> Tensor:
        """Run all real tokens of a batch as one row, without a pad."""
        frozen = self.frozen
        self._check_prompts(batch, len(self.prompts) if states is None else len(states))
        in_use = batch.prompt_of_row_B.unique().tolist()
        # Only what this batch carries is computed; the others' places hold nothing and are dropped just below.
        known = states or [
            prompt() if number in in_use else PromptStates(length=0) for number, prompt in enumerate(self.prompts)
        ]
        used, row_B = prompts_in_use(known, batch.prompt_of_row_B)
        packing = pack(batch.mask_BT, used, row_B)
        length_B, text_B = prompt_lengths(used, row_B), batch.mask_BT.sum(dim=1)
        longest = int((length_B + text_B).argmax())
        check_length(frozen.geometry, int(length_B[longest]), int(text_B[longest]))
        hidden_MD = frozen.packed_hidden_states(batch.ids_BT.flatten()[packing.index_M], packing)
        return hidden_MD[packing.packed_of_BT[row_M, column_M]]

    @torch.no_grad()
    def start(self, batch: Batch, states: Sequence[PromptStates] | None = None) -> tuple[Tensor, DecodeState]:
        """Read the inputs of a batch and predict each row's next token.

        Args:
            batch: Padded on either side; labels are ignored.
            states: Folded prompts; computed here if left out.

        Returns:
            Logits ``[B, V]`` in float32 and the state to go on from.
        """
        batch, cache = left_aligned(batch), DynamicCache()
        steering, length_B = self._steering(batch, self.states() if states is None else states)
        hidden_BTD = self._hidden_states(batch, steering, length_B, cache)
        steering.begin()
        state = DecodeState(cache, batch.mask_BT, length_B + batch.mask_BT.sum(dim=1), steering)
        return self.frozen.head(hidden_BTD[:, -1]), state

    @torch.no_grad()
    def step(self, tokens_B: Tensor, state: DecodeState) -> Tensor:
        """Append one token to every row.

        Args:
            tokens_B: Ids.
            state: Changed in place.

        Returns:
            Logits ``[B, V]`` in float32 for the token after.
        """
        state.mask_BS = torch.cat([state.mask_BS, state.mask_BS.new_ones(state.rows, 1)], dim=1)
        state.steering.begin()
        hidden_B1D = self.frozen.hidden_states(
            input_ids=tokens_B[:, None],
            attention_mask=state.mask_BS,
            position_ids=state.position_B[:, None],
            past_key_values=state.cache,
            steering=state.steering,
        )
        state.position_B = state.position_B + 1
        return self.frozen.head(hidden_B1D[:, 0])
