"""How likely each of a row's choices is: the input is read once, and the choices go on from there together.

A classification task has a few legal answers, its label words. Their log-probabilities behind an input need no
generation, and a prediction made of them is always legal (rank classification, as in Brown et al. 2020 and Sanh et al.
2022). The choices of a row form a tree by their tokens: what two choices have in common is computed once, and every
branch is a row of the decoding state, like a beam.

Shape letters: B rows, R branches, V vocabulary, C branches one token further on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from softprompts.config import DecodingConfig
from softprompts.errors import DataError
from softprompts.inference.engine import Engine
from softprompts.tasks.encode import collate
from softprompts.types import Encoded, PromptStates

__all__ = ["score_choices"]

_PAIRS_PER_ROW = 8
"""A batch holds so many times ``batch_size`` pairs of an input and a choice at most, for each is a row in memory."""

_Tokens = tuple[int, ...]
_Tree = dict[_Tokens, list[int]]
"""From the tokens of a branch to those that may come next."""


@torch.no_grad()
def score_choices(
    engine: Engine,
    rows: Sequence[Encoded],
    choices: Sequence[Sequence[_Tokens]],
    *,
    states: Sequence[PromptStates] | None = None,
    batch_size: int = 32,
    on_progress: Callable[[int], None] | None = None,
) -> list[tuple[float, ...]]:
    """Measure how likely every choice is behind its row's input and prompt.

    It is the number that each pair of input and choice would give alone (up to rounding in the forward pass), whatever
    the prompts, and for decoder-only models and encoder-decoders alike.

    Args:
        engine: The model with its prompts.
        rows: Inputs, each with its own prompt; targets, where they have any, are cut off at ``target_start``.
        choices: Of every row: the tokens of its choices, end token included
            (:func:`softprompts.tasks.encode.encode_choices`).
        states: What :meth:`Engine.fold` returned; computed here, once for all batches, if left out.
        batch_size: Most rows that are read at a time.
        on_progress: Called with the number of rows that just became ready.

    Returns:
        Per row and choice: sum of the log-probabilities of its tokens, in nats.

    Raises:
        DataError: A row has no choices, or one of no tokens; or a row carries an infix and has no place for it.
        ConfigError: A row names a prompt that does not exist.
        LengthError: A row is empty, or too long with its prompt and its longest choice. Nothing has run then.
    """
    if len(choices) != len(rows):
        raise DataError(f"got choices for {len(choices)} rows, but there are {len(rows)} rows; expected some for each")
    for row, some in zip(rows, choices, strict=True):
        if not some or not all(some):
            raise DataError(f"record '{row.example.id}' has no choices to rank, or an empty one; expected label words")
    longest = max((len(choice) for own in choices for choice in own), default=0)
    engine.check(rows, DecodingConfig(max_new_tokens=longest))
    states = engine.fold() if states is None else states
    trees: dict[tuple[_Tokens, ...], _Tree] = {}
    scores: dict[int, tuple[float, ...]] = {}
    for indices in _batches(rows, choices, batch_size):
        own = [tuple(choices[index]) for index in indices]
        trees |= {one: _tree(one) for one in own if one not in trees}
        inputs = [replace(rows[i], ids=rows[i].ids[: rows[i].target_start], decoder_ids=None) for i in indices]
        found = _branches(engine, inputs, [trees[one] for one in own], states)
        for place, index in enumerate(indices):
            scores[index] = tuple(found[place, choice] for choice in own[place])
        if on_progress is not None:
            on_progress(len(indices))
    return [scores[index] for index in range(len(rows))]


def _batches(rows: Sequence[Encoded], choices: Sequence[Sequence[_Tokens]], batch_size: int) -> Iterator[list[int]]:
    """Group rows by length, longest first, with a limit on their choices as well."""
    batch: list[int] = []
    pairs = 0
    for index in sorted(range(len(rows)), key=lambda index: (-rows[index].target_start, index)):
        if batch and (len(batch) == batch_size or pairs + len(choices[index]) > _PAIRS_PER_ROW * batch_size):
            yield batch
            batch, pairs = [], 0
        batch.append(index)
        pairs += len(choices[index])
    if batch:
        yield batch


def _tree(choices: Sequence[_Tokens]) -> _Tree:
    tree: _Tree = {}
    for choice in choices:
        for end, token in enumerate(choice):
            following = tree.setdefault(choice[:end], [])
            if token not in following:
                following.append(token)
    return tree


def _branches(
    engine: Engine, inputs: Sequence[Encoded], trees: Sequence[_Tree], states: Sequence[PromptStates]
) -> dict[tuple[int, _Tokens], float]:
    """Walk the trees of a batch level by level; log-probability of every branch, by row and tokens."""
    frozen, prompted = engine.frozen, engine.prompted
    batch = collate(inputs, pad_id=frozen.pad_id, padding_side="left", with_labels=False)
    width = max(sum(map(len, tree.values())) - len(tree) + 1 for tree in trees)  # leaves of the largest tree
    logits_RV, state = prompted.start(batch.to(frozen.device), states, width=width)
    branches: list[tuple[int, _Tokens]] = [(row, ()) for row in range(len(inputs))]
    found = dict.fromkeys(branches, 0.0)
    while True:
        further = [(r, token) for r, (row, tokens) in enumerate(branches) for token in trees[row].get(tokens, ())]
        parent_C, token_C = torch.tensor(further, device=frozen.device).T
        logprob_C = logits_RV.log_softmax(dim=-1)[parent_C, token_C].tolist()
        grown = [(branches[r][0], (*branches[r][1], token)) for r, token in further]
        for (r, _), branch, logprob in zip(further, grown, logprob_C, strict=True):
            found[branch] = found[branches[r]] + logprob
        going = [number for number, (row, tokens) in enumerate(grown) if tokens in trees[row]]
        if not going:
            return found
        going_R = torch.tensor(going, device=frozen.device)
        parent_R = parent_C[going_R]
        if parent_R.tolist() != list(range(len(branches))):
            state.select(parent_R)
        branches = [grown[number] for number in going]
        logits_RV = prompted.step(token_C[going_R], state)
