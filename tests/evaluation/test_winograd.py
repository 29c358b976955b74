"""WSC: a predicted phrase is judged by the phrase and the label of the record."""

import pytest

from softprompts.errors import DataError
from softprompts.evaluation.metrics import score
from softprompts.evaluation.scorers.winograd import same_phrase


@pytest.mark.parametrize(
    ("prediction", "phrase", "same"),
    [
        ("jug", "The jug", True),
        ("THE  blue jug ", "the jug", True),
        ("jug", "the blue jug", True),
        ("the shelf", "the jug", False),
        ("Bob", "Bob's hat", False),
        ("bob's hat", "Bob's hat", True),
        ("jug shelf", "jug lid", False),
    ],
)
def test_words_decide_not_case_and_determiners(prediction: str, phrase: str, same: bool):
    assert same_phrase(prediction, phrase) is same
    assert same_phrase(phrase, prediction) is same


def test_the_label_says_whether_it_should_be_the_phrase():
    references = [("True", "The jug"), ("False", "The shelf"), ("True", "The jug"), ("False", "The shelf")]
    assert score("wsc_accuracy", ["jug", "jug", "shelf", "the shelf"], references, resamples=0).value == 50
    assert score("wsc_accuracy", ["", "the", "jug", "jug"], references, resamples=0).value == 50


def test_references_of_another_kind_are_refused():
    with pytest.raises(DataError, match="expected a label and a phrase"):
        score("wsc_accuracy", ["x"], [("the jug",)])
