"""A frozen model and its prompts together: states in, logits out.

The paths of one training step and of one decoding step both run through here. Prompts are computed once per step, at
batch 1; rows only attend to the result.

Shape letters: B batch, T text tokens, P prompt length, D width, V vocabulary, M label positions, K prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from softprompts.errors import PromptMismatchError, UnsupportedModelError
from softprompts.models import seq2seq
from softprompts.models.attention import Steering
from softprompts.models.cache import DecodeState
from softprompts.models.frozen import FrozenLM
from softprompts.models.infix import check_seen, inlined, places_in_text, prompt_starts
from softprompts.models.inputs import (
    check_length,
    label_positions,
    left_aligned,
    position_ids,
    prompt_lengths,
    prompts_in_use,
)
from softprompts.models.label_loss import chunked_cross_entropy, token_losses
from softprompts.models.packing import pack
from softprompts.models.seq2seq import Seq2SeqState
from softprompts.models.sources import Held, SourceCache, cuttable, put_in_front, without_inputs
from softprompts.prompts.base import SoftPrompt
from softprompts.types import Batch, Geometry, LayerKey, PromptStates

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


class _Rows(NamedTuple):
    """A batch as the model reads it: infixes that are embeddings have become text of their rows."""

    batch: Batch
    words_BTD: Tensor | None
    """Embeddings of its text, where not all of it is words."""
    used: list[PromptStates]
    """The prompts in use that are not text."""
    prompt_of_row_B: Tensor
    """Each row's index into them, -1 for none."""
    start_B: Tensor | None
    """Real tokens in front of each row's prompt; ``None`` where all prompts stand in front."""
    held: Held | None = None
    """Inputs that have been read before and are not in the batch any more."""
    offset_B: Tensor | None = None
    """How many tokens each of them has."""

    @property
    def length_B(self) -> Tensor:
        """Positions of each row's prompt."""
        return prompt_lengths(self.used, self.prompt_of_row_B)


def _mismatch(number: int, made_for: Geometry, offered: Geometry) -> str:
    if replace(made_for, prompt_scrolls=offered.prompt_scrolls) == offered:
        words = {True: "text", False: "visible"}
        return (
            f"prompt {number} was trained with window '{words[made_for.prompt_scrolls]}', this model was loaded with "
            f"window '{words[offered.prompt_scrolls]}'; load the model with the prompt's"
        )
    return (
        f"prompt {number} was made for a {made_for.family} of width {made_for.width} with {len(made_for.sites)} "
        f"layers, this model is a {offered.family} of width {offered.width} with {len(offered.sites)} layers; load the "
        "model it was made for"
    )


class PromptedLM(nn.Module):
    """K prompts on one frozen language model.

    Args:
        frozen: The model.
        prompts: Its prompts; a row of a batch names its own by index. May be empty: then this is the model alone.

    Raises:
        PromptMismatchError: A prompt was made for a model of another geometry.
    """

    def __init__(self, frozen: FrozenLM, prompts: Sequence[SoftPrompt] = ()) -> None:
        super().__init__()
        for number, prompt in enumerate(prompts):
            frozen.check_kind(prompt.kind, prompt.placement)
            if prompt.geometry != frozen.geometry:
                raise PromptMismatchError(_mismatch(number, prompt.geometry, frozen.geometry))
        # Kept out of nn.Module's sight: parameters() of this module are the prompts' alone.
        self._frozen = (frozen,)
        self.prompts = nn.ModuleList(prompts)
        if any(tensor.device != frozen.device for tensor in (*self.parameters(), *self.buffers())):
            self.to(frozen.device)
        self.packing = True
        """Whether training and scoring run all rows as one packed row, where the model allows it."""
        self.sources: SourceCache | None = None
        """Inputs that are read once, where they stand in front of infixes; see :meth:`keep_sources`."""

    @property
    def frozen(self) -> FrozenLM:
        """The frozen model."""
        return self._frozen[0]

    def keep_sources(self, *, limit_bytes: int) -> SourceCache:
        """Keep keys and values of inputs in front of infixes: training and scoring then read each input once.

        The model must not change any more. Other prompts on the same frozen model may share the result
        (:attr:`sources`).

        Args:
            limit_bytes: Most bytes to keep; beyond them :class:`~softprompts.errors.ConfigError` is raised.

        Raises:
            UnsupportedModelError: Keys and values are not all that this model keeps of an input, or windows hide some
                of them and it does not run packed rows.
        """
        frozen = self.frozen
        windows = any(site.window is not None for site in frozen.geometry.sites)
        if frozen.causal is None or not frozen.causal.through_attention or (windows and not self.packs):
            raise UnsupportedModelError(
                f"inputs of '{frozen.geometry.family}' cannot be kept as keys and values alone; set "
                "model.cache_source_gib to null"
            )

        def read(ids_RS: Tensor, mask_RS: Tensor) -> Mapping[LayerKey, tuple[Tensor, Tensor]]:
            captured: dict[LayerKey, tuple[Tensor, Tensor]] = {}
            frozen.hidden_states(
                input_ids=ids_RS,
                attention_mask=mask_RS,
                position_ids=position_ids(mask_RS, torch.zeros_like(mask_RS[:, 0])),
                steering=Steering(frozen.layer_of, captured=captured),
            )
            return captured

        self.sources = SourceCache(read, frozen.geometry, limit_bytes=limit_bytes)
        return self.sources

    @property
    def packs(self) -> bool:
        """Whether training and scoring run all rows as one packed row here."""
        on_cpu = self.frozen.device.type == "cpu"
        return self.packing and self.frozen.packable and (on_cpu or self.sources is None)

    def states(self) -> list[PromptStates]:
        """Compute every prompt's keys and values, with gradient. Call it once per step.

        Embeddings in front of a causal model do not depend on the text behind them, so they are run through the model
        here, once, instead of once per row; loss and gradients are the same. Those of an infix do depend on the text
        in front of them, and stay embeddings.
        """
        return [self._folded(prompt()) for prompt in self.prompts]

    def _folded(self, states: PromptStates) -> PromptStates:
        if states.embeddings_PD is None or states.infix or not self.frozen.folds:
            return states
        return PromptStates(length=states.length, keys_values=self.frozen.activations(states.embeddings_PD))

    def _rows(self, batch: Batch, states: Sequence[PromptStates]) -> _Rows:
        """Find out which prompts a batch carries, and put those that are embeddings behind an input into the text."""
        self._check_prompts(batch, len(states))
        used, row_B = prompts_in_use(states, batch.prompt_of_row_B)
        longer, words_BTD = inlined(batch, used, row_B, self.frozen.model.get_input_embeddings())
        if words_BTD is not None:
            used, row_B = prompts_in_use(states, longer.prompt_of_row_B)
        return _Rows(longer, words_BTD, used, row_B, prompt_starts(used, row_B, longer.infix_B))

    def _hidden_states(self, rows: _Rows, steering: Steering, cache: Cache | None = None) -> Tensor:
        """Run the text of a batch with its prompts; ``[B, T, D]``, meaningless at pads."""
        mask_BT = rows.batch.mask_BT
        in_front_B = rows.length_B if rows.offset_B is None else rows.length_B + rows.offset_B
        check_length(self.frozen.geometry, int(in_front_B.max()), int(mask_BT.sum(dim=1).max()))
        position_BT = position_ids(mask_BT, rows.length_B, rows.start_B)
        if rows.held is not None and rows.offset_B is not None:
            position_BT = position_BT + rows.offset_B[:, None]
            put_in_front(steering, rows.held, mask_BT, self.frozen.attention_dtype)
        if rows.start_B is not None:
            steering.sees_BT = places_in_text(mask_BT) >= rows.start_B[:, None]
        words = {"input_ids": rows.batch.ids_BT} if rows.words_BTD is None else {"inputs_embeds": rows.words_BTD}
        return self.frozen.hidden_states(
            **words,
            attention_mask=mask_BT,
            position_ids=position_BT,
            past_key_values=cache,
            steering=steering,
        )

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

    def label_losses(
        self, batch: Batch, states: Sequence[PromptStates] | None = None, *, z_loss: float = 0.0
    ) -> LabelLosses:
        """Cross-entropy of a batch's labels; the logits of a large vocabulary are never in memory all at once.

        Args:
            batch: With labels.
            states: What :meth:`states` returned in this step; computed here if left out, which is also the faster way
                to train: embedding prompts then run in the same pass as the text.
            z_loss: Adds so much of the logits' squared log-sum-exp to every loss.

        Raises:
            DataError: There are no labels, or one stands first in its row.
            LengthError: A row does not fit into the context.
            PromptMismatchError: A row asks for a prompt that is not there.
        """
        with self.frozen.autocast():
            hidden_MD, labels_M, row_M = self._label_states(batch, states)
            if self.frozen.head_is_trained:
                losses_M = token_losses(self.frozen.head(hidden_MD), labels_M, z_loss)
            else:
                size = self.frozen.geometry.vocab_size
                losses_M = chunked_cross_entropy(self.frozen.head, hidden_MD, labels_M, vocab_size=size, z_loss=z_loss)
        return LabelLosses(losses_M, labels_M, row_M)

    def _label_states(self, batch: Batch, states: Sequence[PromptStates] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states that predict the labels ``[M, D]``, the labels and their rows."""
        if self.frozen.pair is not None:
            states = self.states() if states is None else states
            self._check_prompts(batch, len(states))
            return seq2seq.label_states(self.frozen.pair, batch, states)
        packed = self.packs
        if states is None and packed:
            in_use = batch.prompt_of_row_B.unique().tolist()
            # Only what this batch carries is computed, and embeddings in front of rows are run together with them.
            states = [
                prompt() if number in in_use else PromptStates(length=0) for number, prompt in enumerate(self.prompts)
            ]
        rows = self._rows(batch, self.states() if states is None else states)
        row_M, column_M, labels_M = label_positions(rows.batch)
        if rows.start_B is not None:
            check_seen(places_in_text(rows.batch.mask_BT)[row_M, column_M], rows.start_B[row_M])
        if self.sources is not None:
            rows = self._without_sources(rows, self.sources)
            row_M, column_M, labels_M = label_positions(rows.batch)
        if packed:
            return self._packed_states(rows, row_M, column_M), labels_M, row_M
        steering = self.frozen.steering(rows.used, rows.prompt_of_row_B)
        return self._hidden_states(rows, steering)[row_M, column_M], labels_M, row_M

    def _without_sources(self, rows: _Rows, sources: SourceCache) -> _Rows:
        """Leave out the inputs that see no prompt; their keys and values are known or are computed now."""
        free_K = torch.tensor([*(state.infix for state in rows.used), True], device=rows.prompt_of_row_B.device)
        length_B = cuttable(rows.batch, free_K[rows.prompt_of_row_B])
        if not bool(length_B.any()):
            return rows
        held = sources.held(rows.batch, length_B, self.frozen.attention_dtype)
        batch, words_BTD = without_inputs(rows.batch, rows.words_BTD, length_B)
        start_B = None if rows.start_B is None else (rows.start_B - length_B).clamp(min=0)
        start_B = start_B if start_B is not None and bool(start_B.any()) else None
        return _Rows(batch, words_BTD, rows.used, rows.prompt_of_row_B, start_B, held, length_B)

    def _packed_states(self, rows: _Rows, row_M: Tensor, column_M: Tensor) -> Tensor:
        """Run all real tokens of a batch as one row, without a pad."""
        batch, length_B, text_B = rows.batch, rows.length_B, rows.batch.mask_BT.sum(dim=1)
        length_B = length_B if rows.offset_B is None else length_B + rows.offset_B
        longest = int((length_B + text_B).argmax())
        check_length(self.frozen.geometry, int(length_B[longest]), int(text_B[longest]))
        packing = pack(batch.mask_BT, rows.used, rows.prompt_of_row_B, rows.start_B, rows.offset_B)
        packing = replace(packing, held=rows.held)
        words_MD = None if rows.words_BTD is None else rows.words_BTD.flatten(0, 1)[packing.index_M]
        hidden_MD = self.frozen.packed_hidden_states(batch.ids_BT.flatten()[packing.index_M], packing, words_MD)
        return hidden_MD[packing.packed_of_BT[row_M, column_M]]

    @torch.no_grad()
    def start(
        self, batch: Batch, states: Sequence[PromptStates] | None = None, *, width: int = 1
    ) -> tuple[Tensor, DecodeState | Seq2SeqState]:
        """Read the inputs of a batch and predict each row's next token.

        Args:
            batch: Padded on either side; labels are ignored.
            states: Folded prompts; computed here if left out.
            width: Rows that will go on from each of these (beams), as far as it is known.

        Returns:
            Logits ``[B, V]`` in float32 and the state to go on from.
        """
        states = self.states() if states is None else states
        self._check_prompts(batch, len(states))
        if self.frozen.pair is not None:
            return seq2seq.start(self.frozen.pair, batch, states)
        rows = self._rows(left_aligned(batch), states)
        mask_BT, columns = rows.batch.mask_BT, rows.batch.mask_BT.shape[1]
        text_B = mask_BT.sum(dim=1)
        if rows.start_B is not None:
            check_seen(text_B - 1, rows.start_B)
        steering, cache = self.frozen.decoding(rows.used, rows.prompt_of_row_B, batch.rows * width)
        hidden_BTD = self._hidden_states(rows, steering, cache)
        steering.begin()
        state = DecodeState(cache, mask_BT, rows.length_B + text_B, steering, columns)
        return self.frozen.head(hidden_BTD[:, -1]), state

    @torch.no_grad()
    def step(self, tokens_B: Tensor, state: DecodeState | Seq2SeqState) -> Tensor:
        """Append one token to every row.

        Args:
            tokens_B: Ids.
            state: Changed in place.

        Returns:
            Logits ``[B, V]`` in float32 for the token after.
        """
        if isinstance(state, Seq2SeqState):
            return state.step(tokens_B)
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
