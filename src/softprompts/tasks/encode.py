"""From examples to batches of token ids.

The segments of an example are tokenised **one by one** and joined. Tokenising the whole text at once could merge
characters across the border between input and target, and then the tokens in front of the target would differ
between training (target known) and generation (target unknown).

Conventions: ``ids`` hold no special tokens except what the tokenizer puts in front of every text (``bos_ids``) and the
end token where the format asks for it (as separator, and after the target of a training row). ``labels_BT[b, t]`` is
the token at t for every t of the target, end token included, and -100 elsewhere; nobody learns to predict the input.

An encoder-decoder reads the input alone in its encoder and the target in its decoder, each a text of its own: the
tokenizer's special tokens stand around the input (T5: ``</s>`` behind it), nothing separates the two, and neither
begins with the space that a continuation begins with.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch

from softprompts.errors import ConfigError, DataError, LengthError
from softprompts.tasks.formats import END_TOKEN, Format
from softprompts.types import Batch, Encoded, Example

__all__ = ["IGNORED_LABEL", "bucketed_batches", "collate", "encode", "encode_choices", "shuffled_batches"]

IGNORED_LABEL = -100
"""Label of a position that is not learned, as in torch and transformers."""

_WINDOW_BATCHES = 50
"""Rows are sorted by length within windows of so many batches: short padding, yet batches that differ every epoch."""


def encode(
    example: Example,
    format: Format,
    tokenize: Callable[[str], list[int]],
    *,
    eos_id: int,
    max_length: int,
    on_long: Literal["error", "truncate"] = "error",
    prompt: int = 0,
    with_target: bool = True,
    bos_ids: Sequence[int] = (),
    end_ids: Sequence[int] | None = None,
) -> Encoded:
    """Turn one example into token ids.

    Args:
        example: What to encode.
        format: Its layout.
        tokenize: Text to ids **without** special tokens (``FrozenLM.tokenize``).
        eos_id: Id of the end token.
        max_length: Most tokens that a row may have, the prompt not counted.
        on_long: ``truncate`` cuts the input from its end, never the separator or the target; ``error`` refuses. Of an
            input with a tail (:attr:`Example.tail`), what stands in front of the tail is cut first.
        prompt: Index of the prompt that the row carries, -1 for none.
        with_target: False gives input and separator only, for generation.
        bos_ids: What the tokenizer puts in front of every text (``FrozenLM.bos_ids``); never cut.
        end_ids: What the tokenizer puts behind every text of an encoder (``FrozenLM.end_ids``). If given, the row is
            for an encoder-decoder, and input and target may have ``max_length`` tokens each.

    Returns:
        The row; its labels are ``ids[target_start:]``, or ``decoder_ids`` for an encoder-decoder.

    Raises:
        LengthError: The row is longer than ``max_length`` (with ``truncate``: even without its input).
        DataError: The target is empty, or nothing is left to encode.
    """
    paired = end_ids is not None
    parts: dict[str, list[int]] = {"input": [], "separator": [], "target": []}
    for segment in format.segments(example):
        if segment.role in ("target", "end") and not with_target:
            continue
        special = segment.text == END_TOKEN and segment.role in ("separator", "end")
        if segment.role == "separator" and paired and (special or not segment.text.strip()):
            continue  # a mark between input and target that says nothing: the two stand in different places
        text = segment.text.lstrip(" ") if paired and segment.role in ("input", "target") else segment.text
        ids = [eos_id] if special else tokenize(text)
        parts["target" if segment.role == "end" else segment.role].extend(ids)
        if segment.role == "target" and (not ids or not example.target.strip()):
            raise DataError(f"the target of record '{example.id}' is empty; every record needs an answer to learn from")
    head, kept, target = parts["input"], parts["separator"], parts["target"]
    around = len(bos_ids) + len(end_ids or ())
    if target and paired:
        target = [*bos_ids, *target]
        if len(target) > max_length:
            raise LengthError(_too_long(example, max_length, 0, 0, len(target), "truncate"))
    behind = [] if paired else target
    total = around + len(head) + len(kept) + len(behind)
    if total > max_length:
        room = max_length - around - len(kept) - len(behind)
        if on_long == "error" or room < 0:
            raise LengthError(_too_long(example, max_length, around + len(head), len(kept), len(behind), on_long))
        head = _cut(example, format, tokenize, room, paired=paired) if example.tail else head[:room]
    ids = [*bos_ids, *head, *kept, *(end_ids or ()), *behind]
    if not ids:
        raise DataError(f"record '{example.id}' gives no tokens at all; give it an input, or the format a separator")
    decoder_ids = tuple(target) if paired and with_target else None
    infix_at = None if paired else len(bos_ids) + len(head)
    return Encoded(tuple(ids), len(ids) - len(behind), example, prompt, decoder_ids, infix_at)


def _cut(
    example: Example, format: Format, tokenize: Callable[[str], list[int]], room: int, *, paired: bool
) -> list[int]:
    """Cut the input of an example to so many tokens, its tail last."""
    text = "".join(segment.text for segment in format.segments(example) if segment.role == "input")
    text = text.lstrip(" ") if paired else text
    tail = tokenize(example.tail)
    return [*tokenize(text.removesuffix(example.tail))[: max(0, room - len(tail))], *tail[:room]]


def encode_choices(
    examples: Sequence[Example],
    format: Format,
    tokenize: Callable[[str], list[int]],
    *,
    eos_id: int,
    bos_ids: Sequence[int] = (),
    end_ids: Sequence[int] | None = None,
) -> list[tuple[tuple[int, ...], ...]]:
    """Turn the legal answers of examples into token ids, as they would stand behind the input of each, end included.

    Args:
        examples: Of one task.
        format: Their layout.
        tokenize: As for :func:`encode`, like the rest.
        eos_id: Id of the end token.
        bos_ids: What the tokenizer puts in front of every text.
        end_ids: What it puts behind every text of an encoder; given for encoder-decoders.

    Returns:
        Per example its choices; examples of the same choices share them.
    """
    known: dict[str, tuple[int, ...]] = {}
    together: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}
    for example in examples:
        for choice in example.choices:
            if choice not in known:  # segments are tokenised one by one, so the input makes no difference
                row = encode(
                    replace(example, target=choice),
                    format,
                    tokenize,
                    eos_id=eos_id,
                    max_length=sys.maxsize,
                    bos_ids=bos_ids,
                    end_ids=end_ids,
                )
                known[choice] = row.target_ids
        if example.choices not in together:
            together[example.choices] = tuple(known[choice] for choice in example.choices)
    return [together[example.choices] for example in examples]


def _too_long(example: Example, limit: int, head: int, kept: int, target: int, on_long: str) -> str:
    remedy = (
        "raise task.max_length or set task.on_long=truncate to cut the input"
        if on_long == "error"
        else "truncation cuts the input only, and the rest does not fit: raise task.max_length"
    )
    return (
        f"record '{example.id}' has {head + kept + target} tokens (input {head}, separator {kept}, target {target}), "
        f"but at most {limit} are allowed; {remedy}"
    )


def collate(
    rows: Sequence[Encoded],
    *,
    pad_id: int,
    padding_side: Literal["right", "left"] = "right",
    with_labels: bool = True,
) -> Batch:
    """Pad rows to one length.

    Args:
        rows: At least one.
        pad_id: What padding is filled with; the mask is 0 there, so any id does.
        padding_side: ``right`` for training, ``left`` for generation.
        with_labels: False leaves the labels out.

    Returns:
        ids, mask and labels of shape [B, T] and the prompt indices [B], all int64 on the CPU. Rows of an
        encoder-decoder have targets of shape [B, U] in place of labels.

    Raises:
        ConfigError: There are no rows, or rows of both kinds of model.
    """
    if not rows:
        raise ConfigError("a batch of no rows was asked for; give at least one")
    length = max(len(row.ids) for row in rows)
    ids_BT = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    labels_BT = torch.full_like(ids_BT, IGNORED_LABEL)
    for index, row in enumerate(rows):
        start = length - len(row.ids) if padding_side == "left" else 0
        end = start + len(row.ids)
        ids_BT[index, start:end] = torch.tensor(row.ids)
        mask_BT[index, start:end] = 1
        labels_BT[index, start + row.target_start : end] = ids_BT[index, start + row.target_start : end]
    prompt_of_row_B = torch.tensor([row.prompt for row in rows])
    targets_BU = _targets(rows) if with_labels else None
    labels = labels_BT if with_labels and targets_BU is None else None
    places = [row.infix_at for row in rows if row.infix_at is not None]
    infix_B = torch.tensor(places) if len(places) == len(rows) else None
    return Batch(ids_BT, mask_BT, labels, prompt_of_row_B, targets_BU, infix_B)


def _targets(rows: Sequence[Encoded]) -> torch.Tensor | None:
    """What the decoder should predict, ``[B, U]``; ``None`` where the rows are for a decoder-only model."""
    targets = [row.decoder_ids for row in rows if row.decoder_ids is not None]
    if not targets:
        return None
    if len(targets) != len(rows):
        raise ConfigError("some rows of this batch have a decoder's target and some have none; encode them all alike")
    targets_BU = torch.full((len(rows), max(len(target) for target in targets)), IGNORED_LABEL, dtype=torch.int64)
    for index, target in enumerate(targets):
        targets_BU[index, : len(target)] = torch.tensor(target)
    return targets_BU


def shuffled_batches(rows: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Cut a random order of the rows into batches, whatever their lengths; otherwise as :func:`bucketed_batches`.

    Args:
        rows: How many there are.
        batch_size: Rows of a batch.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.

    Raises:
        ConfigError: ``batch_size`` is below 1.
    """
    order, _ = _shuffled(rows, batch_size, seed, epoch)
    return [order[at : at + batch_size] for at in range(0, rows, batch_size)]


def bucketed_batches(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Group rows of similar length into batches, in an order that depends on ``(seed, epoch)`` alone.

    All indices are shuffled, cut into windows of 50 batches, sorted by length within each window and cut into
    batches; the batches are shuffled again. Every index occurs exactly once, and all batches but one are full (the
    remainder is one smaller batch). The same arguments give the same batches on every machine, so an epoch can be
    resumed in its middle by its position alone.

    Padding changes neither loss nor gradient of a row; bucketing changes which rows share a batch. That is not free:
    rows of one length are alike, and under a mean over tokens a batch of short rows weighs as much as one of long
    rows, so a run learns less per step than from random batches (measured: docs/explanation/speed.md).

    Args:
        lengths: Tokens of every row.
        batch_size: Rows of a batch.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.

    Raises:
        ConfigError: ``batch_size`` is below 1.
    """
    order, generator = _shuffled(len(lengths), batch_size, seed, epoch)
    window = batch_size * _WINDOW_BATCHES
    batches = []
    for start in range(0, len(order), window):
        rows = sorted(order[start : start + window], key=lengths.__getitem__)
        batches += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    generator.shuffle(batches)
    return batches


def _shuffled(rows: int, batch_size: int, seed: int, epoch: int) -> tuple[list[int], random.Random]:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
    generator = random.Random(f"{seed}/{epoch}")  # a string is seeded by its SHA-512, the same everywhere
    order = list(range(rows))
    generator.shuffle(order)
    return order, generator
