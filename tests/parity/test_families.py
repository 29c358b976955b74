"""The matrix of families: one row per shape, one column per contract; ``make matrix`` writes it down as a page."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from family_contracts import COLUMNS, RIGHT, Subject, judge
from zoo_decoders import DECODERS

REFUSED = {"rwkv", "llama4"}
"""Shapes that cannot be steered at all."""


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_every_contract_holds_or_the_model_is_refused(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    subject = Subject(DECODERS[name], tokenizer)
    cells = {column: judge(subject, column) for column in COLUMNS}
    wrong = {column: cell.reason for column, cell in cells.items() if cell.verdict == "wrong"}
    assert not wrong
    verdicts = [cell.verdict for cell in cells.values()]
    # a shape that is right today must not turn into a refused one unnoticed
    assert verdicts.count("refused") == len(COLUMNS) if name in REFUSED else verdicts.count(RIGHT) >= 7
