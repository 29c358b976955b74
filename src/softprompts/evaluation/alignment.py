"""Bring predictions and references that were read from files together: the same records, order and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from softprompts.errors import DataError, nearest
from softprompts.evaluation.score_files import Gold, Predicted

__all__ = ["align", "with_choices"]


def align(predicted: Predicted, gold: Gold, *, lenient: bool = False) -> tuple[str, ...]:
    """Bring predictions into the order of the references, and labels into the words of the task.

    Args:
        predicted: The predictions.
        gold: The references.
        lenient: Let labels that the task does not have pass; they are wrong then.

    Raises:
        DataError: There are too few or too many predictions, one is of no known record, or a label is none of the
            task's.
    """
    if predicted.meanings and gold.meanings:
        order = _order_by_name(predicted, predicted.meanings, gold, gold.meanings, "meaning")
    elif predicted.ids and gold.ids:
        order = _order_by_name(predicted, predicted.ids, gold, _as_in_files(gold.ids, predicted.ids), "id")
    else:
        order = _order_by_line(predicted, gold)
    if not gold.choices:
        return tuple(predicted.texts[index] for index in order)
    words = []
    for index, choices in zip(order, gold.choices, strict=True):
        text = predicted.texts[index]
        word = _choice(text, choices) if choices else text
        if word is None and not lenient:
            line = f", line {predicted.lines[index]}" if predicted.lines[index] else ""
            raise DataError(
                f"'{predicted.path}'{line}: the label {text!r} is none of the task's: {nearest(text, choices)} "
                f"(--lenient counts such labels as wrong)"
            )
        words.append(text if word is None else word)
    return tuple(words)


def with_choices(gold: Gold, choices: Sequence[str]) -> Gold:
    """Say what the legal answers are, and put references that name or number them into these words.

    Raises:
        DataError: A reference is none of them.
    """
    words = []
    for number, texts in enumerate(gold.references):
        found = [_choice(text, choices) for text in texts]
        if None in found:
            which = f"of '{gold.ids[number]}'" if gold.ids else f"number {number + 1}"
            wrong = texts[found.index(None)]
            raise DataError(f"'{gold.path}': label {which} is {wrong!r}, none of the task's: {nearest(wrong, choices)}")
        words.append(tuple(word for word in found if word is not None))
    return replace(gold, references=tuple(words), choices=(tuple(choices),) * len(words))


def _order_by_line(predicted: Predicted, gold: Gold) -> list[int]:
    got, expected = len(predicted.texts), len(gold.references)
    while got > expected and not predicted.texts[got - 1].strip():
        got -= 1  # empty lines at the end of a file
    if got < expected:
        raise DataError(
            f"too few predictions: '{predicted.path}' ends after line {predicted.lines[-1] if predicted.lines else 0} "
            f"with {got}, expected {expected}, one per record of {gold.path}"
        )
    if got > expected:
        raise DataError(
            f"too many predictions: '{predicted.path}', line {predicted.lines[expected]} is number {expected + 1}, "
            f"expected {expected}, one per record of {gold.path}"
        )
    return list(range(expected))


def _order_by_name(
    predicted: Predicted, names: Sequence[str], gold: Gold, known: Sequence[str], word: str
) -> list[int]:
    places: dict[str, int] = {}
    for index, identity in enumerate(names):
        if identity in places:
            line = predicted.lines[index]
            raise DataError(f"'{predicted.path}', line {line}: {word} '{identity}' was there before")
        places[identity] = index
    missing = [identity for identity in known if identity not in places]
    if missing:
        raise DataError(
            f"too few predictions: '{predicted.path}' has {len(places)} and none for '{missing[0]}' "
            f"({len(missing)} of {len(known)} records of {gold.path} are missing)"
        )
    extra = next((identity for identity in places if identity not in set(known)), None)
    if extra is not None:
        line = predicted.lines[places[extra]]
        raise DataError(
            f"too many predictions: '{predicted.path}'{f', line {line}' if line else ''}: '{extra}' is no record "
            f"of {gold.path}"
        )
    return [places[identity] for identity in known]


def _as_in_files(own: Sequence[str], theirs: Sequence[str]) -> Sequence[str]:
    """Our ids as a benchmark's files have them, where none is known there: 7 for 'superglue_rte-dev-7'."""
    return own if set(own) & set(theirs) else [identity.rpartition("-")[2] for identity in own]


def _choice(text: str, choices: Sequence[str]) -> str | None:
    """Find the label that a text means: its word in any case, or its number."""
    word = next((one for one in choices if one.lower() == text.strip().lower()), None)
    number = text.strip()
    return choices[int(number)] if word is None and number.isdecimal() and int(number) < len(choices) else word
