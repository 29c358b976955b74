"""The matrix of families: one row per shape, one column per contract; ``make matrix`` writes it down as a page."""

from __future__ import annotations

import pytest
import transformers
from transformers import PreTrainedTokenizerFast

from family_contracts import COLUMNS, RIGHT, Subject, judge
from softprompts.models.families import REFUSED_FAMILIES, TESTED_FAMILIES
from zoo_decoders import DECODERS

REFUSED = {"rwkv", "llama4"}
"""Shapes that cannot be steered at all."""


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which older releases of transformers call
@pytest.mark.parametrize("name", sorted(DECODERS))
def test_every_contract_holds_or_the_model_is_refused(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    subject = Subject(DECODERS[name], tokenizer)
    cells = {column: judge(subject, column) for column in COLUMNS}
    wrong = {column: cell.reason for column, cell in cells.items() if cell.verdict == "wrong"}
    assert not wrong
    verdicts = [cell.verdict for cell in cells.values()]
    # a shape that is right today must not turn into a refused one unnoticed
    assert verdicts.count("refused") == len(COLUMNS) if name in REFUSED else verdicts.count(RIGHT) >= 7


def test_the_tested_families_are_those_of_the_zoo() -> None:
    configs = {
        name: getattr(transformers, shape.config_class or f"{shape.classes}Config") for name, shape in DECODERS.items()
    }
    right = {config.model_type for name, config in configs.items() if name not in REFUSED}
    assert sorted(right) == list(TESTED_FAMILIES)
    assert not right & set(REFUSED_FAMILIES)
