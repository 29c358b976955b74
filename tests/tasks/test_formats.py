"""Records to examples, examples to segments, and templates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompts.errors import ConfigError, DataError
from softprompts.tasks import END_TOKEN, TextFormat, template_format
from softprompts.tasks.formats import field, parse_separator, text_field
from softprompts.types import Example


def text_of(format: TextFormat, record: dict, split: str = "train") -> str:
    (example,) = format.read(record, split)
    return "".join(segment.text for segment in format.segments(example)[:-1])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Review: {text} Sentiment:", "Review: fine Sentiment: positive"),
        ("Review: {text}\nSentiment: ", "Review: fine\nSentiment: positive"),
        ("{text}\n", "fine\npositive"),
        ("{text}", "fine\npositive"),
        ("{text} ", "fine\npositive"),
        ("{{{text}}} ({n}) =>", "{fine} (3) => positive"),
        ("{nested.a} and {nested.b.c}:", "1 and deep: positive"),
        ("{odd key}?", "yes? positive"),
    ],
)
def test_templates(template: str, expected: str):
    record = {"text": "fine", "label": "positive", "n": 3, "nested": {"a": 1, "b": {"c": "deep"}}, "odd key": "yes"}
    assert text_of(template_format(template, "{label}"), record) == expected


def test_what_stands_behind_the_last_field_is_the_separator():
    format = template_format("Review: {text} Sentiment:", "{label}")
    (example,) = format.read({"text": "fine", "label": "good", "id": 7}, "train")
    assert example == Example("Review: fine", "good", id="7")
    assert [tuple(segment) for segment in format.segments(example)] == [
        ("Review: fine", "input"),
        (" Sentiment:", "separator"),
        (" good", "target"),
        (END_TOKEN, "end"),
    ]


def test_an_unknown_field_names_those_that_exist():
    format = template_format("Review: {txt}", "{label}")
    with pytest.raises(DataError, match=r"field 'txt' is missing: did you mean 'text'. known: label, text"):
        format.read({"text": "fine", "label": "good"}, "train")
    with pytest.raises(DataError, match=r"field 'a\.b' is missing"):
        field({"a": {"c": 1}}, "a.b")


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, ["x"]])
def test_a_field_that_is_no_text_is_refused(value: object):
    with pytest.raises(DataError, match=r"field 'text' is .*, expected text"):
        text_field({"text": value}, "text")


@pytest.mark.parametrize("template", ["no field", "{", "}", "{}", "{a!r}", "{a:>3}", ""])
def test_malformed_templates_are_refused(template: str):
    with pytest.raises(ConfigError, match="template"):
        template_format(template, "{label}")
    with pytest.raises(ConfigError, match="template"):
        template_format("{text}", template)


def test_a_list_in_the_target_field_gives_the_references():
    format = template_format("{q}", "{answers}")
    (example,) = format.read({"q": "?", "answers": ["a", "b"]}, "dev")
    assert (example.target, example.references) == ("a", ("a", "b"))
    for bad in ([], [1], ["a", None]):
        with pytest.raises(DataError, match="answers"):
            format.read({"q": "?", "answers": bad}, "dev")


@pytest.mark.parametrize(
    ("written", "separator", "lead"),
    [
        ("eos", END_TOKEN, " "),
        (r"\n", "\n", ""),
        (" =>", " =>", " "),
        (" => ", " =>", " "),
        (" ", "", " "),
        (r"\tA:\n", "\tA:\n", ""),
    ],
)
def test_separators_as_users_write_them(written: str, separator: str, lead: str):
    format = TextFormat(lambda record, split: []).with_separator(parse_separator(written))
    assert (format.separator, format.target_lead) == (separator, lead)


def test_an_empty_separator_is_refused():
    with pytest.raises(ConfigError, match="separator is empty"):
        parse_separator("")


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="{}!:.[]"), min_size=1, max_size=8)
LITERALS = st.text(st.characters(codec="utf-8"), max_size=12)


@given(st.lists(st.tuples(LITERALS, NAMES), min_size=1, max_size=4), LITERALS, st.text(max_size=30), st.data())
def test_a_template_says_exactly_what_was_written(parts, tail: str, label: str, data):
    """Whatever the literals and values hold (braces too), the text is literal, value, literal, value, ..., tail."""
    record = {name: data.draw(st.text(max_size=20)) for _, name in parts} | {"__label": label}
    escape = {"{": "{{", "}": "}}"}
    template = "".join("".join(escape.get(c, c) for c in text) + "{" + name + "}" for text, name in parts)
    template += "".join(escape.get(c, c) for c in tail)
    format = template_format(template, "{__label}")
    (example,) = format.read(record, "train")
    assert example.input == "".join(text + record[name] for text, name in parts)
    assert format.separator == (tail.rstrip(" ") or "\n")
    assert example.target == label
