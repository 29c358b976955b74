"""The one generation path: text in, text out, every row with a prompt of its own.

Schedule -> forward -> sample -> postprocess. Evaluation, validation and the command line all come through here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from softprompts.config import DecodingConfig
from softprompts.errors import ConfigError, DataError, LengthError
from softprompts.inference.averaging import Averaged, check_averaged
from softprompts.inference.beam import BeamSearch
from softprompts.inference.sampling import (
    Constraints,
    Hypothesis,
    OnePath,
    Search,
    banned_sequences,
    check_decoding,
)
from softprompts.inference.text_stream import first_stop
from softprompts.models.seq2seq import check_room
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt
from softprompts.tasks.encode import collate
from softprompts.types import Encoded, PromptStates

__all__ = ["Engine", "Generation"]


@dataclass(frozen=True)
class Generation:
    """One generated output."""

    ids: tuple[int, ...]
    """Generated tokens, the end-of-sequence token left out."""
    text: str
    """The decoded tokens up to the first of ``decoding.stop``, special tokens left out, spaces kept as generated."""
    logprob: float
    """Sum of the model's log-probabilities of the tokens (and of the end token), before temperature and bans."""
    finished: bool
    """Whether the model ended the text itself, or by a stop string (``False``: it was cut at ``max_new_tokens``)."""


class Engine:
    """Generates with a frozen model and the prompts attached to it.

    Args:
        prompted: The model and its prompts; a row names its prompt by index (:attr:`Encoded.prompt`, -1 for none).
    """

    def __init__(self, prompted: PromptedLM) -> None:
        self.prompted = prompted
        self.frozen = prompted.frozen

    @torch.no_grad()
    def fold(self) -> list[PromptStates]:
        """Compute what all prompts come down to, for several calls of :meth:`generate`.

        It holds as long as nobody changes a prompt: after a training step, fold again.
        """
        return self.prompted.states()

    @torch.no_grad()
    def generate(
        self,
        rows: Sequence[Encoded],
        decoding: DecodingConfig,
        *,
        states: Sequence[PromptStates] | None = None,
        seed: int = 0,
        banned_ids: Sequence[Sequence[int]] = (),
        averaged: Sequence[int] = (),
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """Generate one output per row.

        The output of a row depends on the row, on ``decoding`` and, when sampling, on ``seed`` and on the row's index
        in ``rows``; never on the rows it shares a batch with (up to rounding in the forward pass).

        Args:
            rows: Inputs; targets, where they have any, are cut off at ``target_start``.
            decoding: Strategy, limits and bans. ``beam`` with one beam is greedy.
            states: What :meth:`fold` returned; computed here, once for all batches, if left out.
            seed: For sampling.
            banned_ids: Id sequences that are banned beside ``decoding.banned``.
            averaged: Indices of prompts that answer every row together, whatever prompt it names: each step takes the
                mean of their next-token distributions, in one forward pass. ``decoding.batch_size`` counts the rows of
                that pass, one per prompt and request.
            on_progress: Called with the number of outputs that just became ready.

        Returns:
            Generations, in the order of ``rows``.

        Raises:
            ConfigError: The decoding options make no sense, a row names a prompt that does not exist, or a beam search
                is to average.
            DataError: A row carries an infix and has no place for it.
            LengthError: A row is empty, or too long with its prompt and ``max_new_tokens``. Nothing has run then.
        """
        self.check(rows, decoding, averaged=averaged)
        banned = [*banned_sequences(decoding.banned, self.frozen.tokenize), *map(tuple, banned_ids)]
        states = self.fold() if states is None else states
        generations: dict[int, Generation] = {}
        for batch in _schedule(rows, max(1, decoding.batch_size // max(1, len(averaged)))):
            for index, hypothesis in self._run(rows, batch, decoding, states, averaged, seed=seed, banned=banned):
                generations[index] = self._finish(hypothesis, decoding.stop)
                if on_progress is not None:
                    on_progress(1)
        return [generations[index] for index in range(len(rows))]

    def _run(
        self,
        rows: Sequence[Encoded],
        requests: list[int],
        decoding: DecodingConfig,
        states: Sequence[PromptStates],
        averaged: Sequence[int],
        *,
        seed: int,
        banned: Sequence[Sequence[int]],
    ) -> Iterator[tuple[int, Hypothesis]]:
        """Decode one batch, yielding every request as soon as it is done; the batch shrinks as they leave."""
        inputs = [_without_target(rows[request]) for request in requests]
        if averaged:
            inputs = [replace(row, prompt=prompt) for row in inputs for prompt in averaged]
        batch = collate(inputs, pad_id=self.frozen.pad_id, padding_side="left", with_labels=False)
        device = self.frozen.device
        search = self._search(requests, decoding, seed, device)
        search = Averaged(search, len(averaged)) if averaged else search
        logits_RV, state = self.prompted.start(batch.to(device), states, width=search.width)
        constraints = Constraints(
            # bans look back over the text that is continued; a decoder of its own begins a new one
            [row.ids if self.frozen.pair is None else () for row in inputs],
            banned=banned,
            eos_id=self.frozen.eos_id,
            min_new_tokens=decoding.min_new_tokens,
            vocab_size=logits_RV.shape[-1],
            device=device,
        )
        if search.width > 1:
            rows_R = torch.arange(len(requests), device=device).repeat_interleave(search.width)
            logits_RV = logits_RV[rows_R]
            state.select(rows_R)
            constraints.follow(rows_R)
        while True:
            step = search.advance(logits_RV, constraints.forbidden(search.new_tokens))
            yield from step.closed
            if not len(step.tokens_R):
                return
            if step.closed:
                state.select(step.parents_R)
            elif search.width > 1:
                state.fork(step.parents_R)
            constraints.follow(step.parents_R, step.tokens_R)
            logits_RV = self.prompted.step(step.tokens_R, state)

    def _search(self, requests: list[int], decoding: DecodingConfig, seed: int, device: torch.device) -> Search:
        if decoding.strategy == "beam" and decoding.beams > 1:
            return BeamSearch(requests, decoding, eos_id=self.frozen.eos_id, device=device)
        return OnePath(requests, decoding, eos_id=self.frozen.eos_id, seed=seed)

    def _finish(self, hypothesis: Hypothesis, stop: Sequence[str]) -> Generation:
        text = self.frozen.tokenizer.decode(
            list(hypothesis.ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # a list of lists would give a list of texts
        found = first_stop(text, stop)
        text = text if found is None else text[: found[0]]
        return Generation(hypothesis.ids, text, hypothesis.logprob, hypothesis.finished or found is not None)

    def check(self, rows: Sequence[Encoded], decoding: DecodingConfig, *, averaged: Sequence[int] = ()) -> None:
        """Refuse what :meth:`generate` would refuse, without running anything; raises the same errors."""
        check_decoding(decoding)
        if averaged:
            check_averaged(decoding)
            rows = [replace(row, prompt=prompt) for prompt in averaged for row in rows]
        lengths = [cast(SoftPrompt, prompt).length for prompt in self.prompted.prompts]
        limit = self.frozen.geometry.max_positions
        for index, row in enumerate(rows):
            name = f"row {index}" + (f" (id '{row.example.id}')" if row.example.id else "")
            if not -1 <= row.prompt < len(lengths):
                raise ConfigError(f"{name} names prompt {row.prompt}, but {len(lengths)} prompts are attached")
            if row.target_start == 0:
                raise LengthError(f"{name} has no input tokens, so there is nothing to continue; give it some text")
            prompt = lengths[row.prompt] if row.prompt >= 0 else 0
            if row.prompt >= 0:
                _check_place(row, cast(SoftPrompt, self.prompted.prompts[row.prompt]), name)
            if self.frozen.pair is not None:
                in_front = row.prompt >= 0 and cast(SoftPrompt, self.prompted.prompts[row.prompt]).kind == "embedding"
                text, new = row.target_start, decoding.max_new_tokens
                check_room(self.frozen.pair, prompt if in_front else 0, text, new, name=name)
                continue
            total = prompt + row.target_start + decoding.max_new_tokens
            if limit is not None and total > limit:
                raise LengthError(
                    f"{name} needs {total} positions: prompt {prompt} + input {row.target_start} + max_new_tokens "
                    f"{decoding.max_new_tokens}, but the model has {limit}; shorten the input or lower max_new_tokens"
                )


def _check_place(row: Encoded, prompt: SoftPrompt, name: str) -> None:
    """Refuse a row in which an infix has no place, or which nothing continues that sees it."""
    if not prompt.is_infix:
        return
    if row.infix_at is None:
        raise DataError(
            f"{name} carries an infix, but does not say where its input ends: a raw text has no such place; encode it "
            "with the format of a task"
        )
    if prompt.kind == "prefix" and row.infix_at >= row.target_start:
        raise DataError(
            f"{name} has nothing between its input and its output that sees the infix; give the format a separator"
        )


def _schedule(rows: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """Group row indices by length, so that little is padded; longest first, so that too little memory shows at once."""
    order = sorted(range(len(rows)), key=lambda index: (-rows[index].target_start, index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _without_target(row: Encoded) -> Encoded:
    if row.decoder_ids is not None:
        return replace(row, decoder_ids=None)
    return row if row.target_start == len(row.ids) else replace(row, ids=row.ids[: row.target_start])
