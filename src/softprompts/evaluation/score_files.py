"""Files of predictions and of references, in the formats that the benchmarks' official scripts read.

Predictions: one line per record in the order of the references; E2E's tables (``MR`` and output columns, tab or comma);
SQuAD's JSON object ``{id: text}``; JSONL such as SuperGLUE's ``{"idx": 0, "label": "..."}`` or the samples of
``softprompts evaluate``. References: one line per record; E2E's blocks separated by empty lines; E2E's tables; several
parallel files where an empty line is a missing reference; JSONL with ``references`` (or ``answers``, ``label``);
SQuAD's JSON. A mistake is a :class:`~softprompts.errors.DataError` that names file and line.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from softprompts.errors import DataError, DataNotFoundError

__all__ = ["Gold", "Predicted", "read_predictions", "read_references"]

_MEANING = re.compile(r"(mr|src|source|meaning(?:[_ .-]rep(?:resentation)?)?|da|dial(?:ogue)?[_ .-]act)s?", re.I)
_OUTPUT = re.compile(r"(out(?:put)?|sys(?:tem)?(?:[_ .-]?out(?:put)?)?|pred(?:iction)?|ref(?:erence)?|human.*)s?", re.I)
"""Headers of the columns, as the official E2E script recognizes them."""

_TEXT_FIELDS = ("prediction", "output", "label", "answer", "text")
_REFERENCE_FIELDS = ("references", "answers", "reference", "target", "label", "output")
_ID_FIELDS = ("id", "idx")


@dataclass(frozen=True)
class Predicted:
    """Predictions as they stand in a file."""

    path: str
    texts: tuple[str, ...]
    lines: tuple[int, ...]
    """Where each text stands; 0 where there is no telling (SQuAD's JSON)."""
    ids: tuple[str, ...] = ()
    """Of each text's record; empty: the order of the references."""
    meanings: tuple[str, ...] = ()
    """Of E2E's tables: what each text says; they identify records where the references have them, too."""


@dataclass(frozen=True)
class Gold:
    """The right answers."""

    path: str
    """Of the file, or what else they come from, for messages."""
    references: tuple[tuple[str, ...], ...]
    ids: tuple[str, ...] = ()
    choices: tuple[tuple[str, ...], ...] = ()
    """Legal answers of each record; empty for free text."""
    groups: tuple[str, ...] = ()
    """Which records belong together (MultiRC's questions); empty: none do."""
    meanings: tuple[str, ...] = ()
    """Of E2E's tables, each once."""


# --------------------------------------------------------------------------------------------------------------------
# Predictions
# --------------------------------------------------------------------------------------------------------------------


def read_predictions(path: str | Path) -> Predicted:
    """Read predictions; the name's ending tells the format (.jsonl, .json, .tsv, .csv, anything else: lines).

    Raises:
        DataNotFoundError: The file does not exist.
        DataError: It is not UTF-8, a line is damaged or lacks a field.
    """
    place, lines = str(path), _lines(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        return _json_predictions(place, "\n".join(lines))
    if suffix == ".jsonl":
        found = [one for number, record in _records(place, lines) for one in _answers(place, number, record)]
        ids = tuple(identity for identity, _, _ in found) if all(identity for identity, _, _ in found) else ()
        return Predicted(place, tuple(text for _, text, _ in found), tuple(line for _, _, line in found), ids)
    rows = _table(place, lines) if suffix in (".tsv", ".csv") else None
    if rows is not None:
        texts, places = tuple(text for _, _, text in rows), tuple(line for line, _, _ in rows)
        return Predicted(place, texts, places, meanings=tuple(meaning for _, meaning, _ in rows))
    return Predicted(place, tuple(lines), tuple(range(1, len(lines) + 1)))


def _json_predictions(place: str, text: str) -> Predicted:
    content = _json(place, text)
    if not isinstance(content, dict):
        raise DataError(f"'{place}' holds a JSON {type(content).__name__}, expected an object {{id: answer}}")
    wrong = next((key for key, value in content.items() if not isinstance(value, str)), None)
    if wrong is not None:
        raise DataError(f"'{place}': the answer of '{wrong}' is {content[wrong]!r}, expected text")
    return Predicted(place, tuple(content.values()), (0,) * len(content), tuple(content))


def _answers(place: str, number: int, record: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Yield id, text and line of the answers in a JSONL record; MultiRC has many, in SuperGLUE's nested format."""
    if "passage" in record and "idx" in record:
        for question in _part(place, number, record["passage"], "questions"):
            for answer in _part(place, number, question, "answers"):
                identity = f"{record['idx']}-{question.get('idx')}-{answer.get('idx')}"
                yield identity, _text(place, number, answer, ("label",)), number
        return
    yield _identity(record), _text(place, number, record, _TEXT_FIELDS), number


def _part(place: str, number: int, record: Any, name: str) -> Sequence[Mapping[str, Any]]:
    found = record.get(name) if isinstance(record, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DataError(f"'{place}', line {number}: field '{name}' is missing or no list of objects")
    return found


def _text(place: str, number: int, record: Mapping[str, Any], names: Sequence[str]) -> str:
    name = next((name for name in names if name in record), None)
    if name is None:
        fields = ", ".join(record) or "none"
        raise DataError(f"'{place}', line {number}: a field is missing: expected one of {names}, got {fields}")
    value = record[name]
    if not isinstance(value, (str, int)):
        raise DataError(f"'{place}', line {number}: field '{name}' is {value!r}, expected text or a label")
    return str(value)


def _identity(record: Mapping[str, Any]) -> str:
    value = next((record[name] for name in _ID_FIELDS if name in record), "")
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


# --------------------------------------------------------------------------------------------------------------------
# References
# --------------------------------------------------------------------------------------------------------------------


def read_references(paths: Sequence[str | Path]) -> Gold:
    """Read references from one file, or from parallel files of one reference each.

    Raises:
        DataNotFoundError: A file does not exist.
        DataError: One is not UTF-8, damaged, or a record has no reference.
    """
    place = ", ".join(map(str, paths))
    if len(paths) > 1:
        return Gold(place, _parallel([(str(path), _lines(path)) for path in paths]))
    lines, suffix = _lines(paths[0]), Path(paths[0]).suffix.lower()
    if suffix == ".json":
        return _squad(place, _json(place, "\n".join(lines)))
    if suffix == ".jsonl":
        records = [one for number, record in _records(place, lines) for one in _golds(place, number, record)]
        ids = tuple(identity for identity, _, _ in records) if all(identity for identity, _, _ in records) else ()
        groups = tuple(group for _, _, group in records) if all(group for _, _, group in records) else ()
        return Gold(place, tuple(texts for _, texts, _ in records), ids, groups=groups)
    rows = _table(place, lines) if suffix in (".tsv", ".csv") else None
    if rows is not None:
        by_meaning: dict[str, list[str]] = {}
        for _, meaning, text in rows:
            by_meaning.setdefault(meaning, []).append(text)
        return Gold(place, tuple(map(tuple, by_meaning.values())), meanings=tuple(by_meaning))
    while lines and not lines[-1].strip():  # what ends a file makes no blocks of its lines
        lines.pop()
    if all(line.strip() for line in lines):
        return Gold(place, tuple((line,) for line in lines))
    return Gold(place, tuple(_blocks(place, lines)))


def _parallel(files: Sequence[tuple[str, list[str]]]) -> tuple[tuple[str, ...], ...]:
    longest = max(len(lines) for _, lines in files)
    short = next(((path, len(lines)) for path, lines in files if len(lines) != longest), None)
    if short is not None:
        raise DataError(f"'{short[0]}' ends after line {short[1]}, other files of references after line {longest}")
    records = []
    for number, texts in enumerate(zip_longest(*(lines for _, lines in files)), start=1):
        kept = tuple(text for text in texts if text.strip())
        if not kept:
            raise DataError(f"'{files[0][0]}', line {number}: the line is empty in every file of references")
        records.append(kept)
    return tuple(records)


def _blocks(place: str, lines: Sequence[str]) -> Iterator[tuple[str, ...]]:
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            block.append(line.strip())
        elif block:
            yield tuple(block)
            block = []
        elif number <= len(lines):
            raise DataError(f"'{place}', line {number}: a record has no reference (two empty lines in a row)")


def _golds(place: str, number: int, record: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yield id, texts and group of the references in a JSONL record; MultiRC's answers are grouped by question."""
    if "passage" in record and isinstance(record["passage"], dict) and "questions" in record["passage"]:
        for identity, text, _ in _answers(place, number, record):
            yield identity, (text,), identity.rpartition("-")[0]
        return
    name = next((name for name in _REFERENCE_FIELDS if name in record), None)
    if name is None:
        fields = ", ".join(record) or "none"
        raise DataError(f"'{place}', line {number}: a field is missing: expected 'references', got {fields}")
    value = record[name]
    value = value.get("text") if isinstance(value, dict) else value  # SQuAD on the hub: {"text": [...], "answer_start"}
    values = [
        one.get("text") if isinstance(one, dict) else one for one in (value if isinstance(value, list) else [value])
    ]
    texts = tuple(map(str, values))
    if not texts or not all(isinstance(one, (str, int, float)) and str(one).strip() for one in values):
        raise DataError(
            f"'{place}', line {number}: field '{name}' is {record[name]!r}, expected at least one reference"
        )
    index = record.get("idx")
    question = ""
    if isinstance(index, dict) and "paragraph" in index and "question" in index:
        question = f"{index['paragraph']}-{index['question']}"
    yield _identity(record), texts, question


def _squad(place: str, content: Any) -> Gold:
    found: dict[str, tuple[str, ...]] = {}
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    found[str(question["id"])] = tuple(answer["text"] for answer in question["answers"])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"'{place}' is not in SQuAD's format (data, paragraphs, qas, answers): {type(error).__name__} {error}"
        ) from error
    empty = next((identity for identity, texts in found.items() if not texts), None)
    if empty is not None:
        raise DataError(f"'{place}': question '{empty}' has an empty list of answers")
    return Gold(place, tuple(found.values()), tuple(found))


# --------------------------------------------------------------------------------------------------------------------
# Lines, tables, JSON
# --------------------------------------------------------------------------------------------------------------------


def _lines(path: str | Path) -> list[str]:
    """Lines of a file without their ends. Only line feeds end a line: texts may hold other separators."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataNotFoundError(f"'{path}' does not exist; give the path of a file") from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from error
    raw = content.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n") if content else []
    lines = []
    for number, line in enumerate(raw, start=1):
        try:
            lines.append(line.decode("utf-8").removesuffix("\r"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"'{path}', line {number}: byte {line[error.start]:#04x} at position {error.start + 1} is not UTF-8; "
                f"convert the file first (iconv -f latin1 -t utf-8, if it is Latin-1)"
            ) from error
    return lines


def _records(place: str, lines: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _json(place, line, number)
        if not isinstance(record, dict):
            raise DataError(f"'{place}', line {number}: got a JSON {type(record).__name__}, expected an object")
        yield number, record


def _json(place: str, text: str, number: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = error.lineno if number is None else number
        raise DataError(f"'{place}', line {line}: no valid JSON ({error.msg} at column {error.colno})") from error


def _table(place: str, lines: Sequence[str]) -> list[tuple[int, str, str]] | None:
    """Rows (line, meaning, text) of a table with a header as the official E2E script has it; None if it has none."""
    if not lines:
        return None
    reader = csv.reader((line + "\n" for line in lines), delimiter="\t" if "\t" in lines[0] else ",")
    header = [name.strip() for name in next(reader)]
    meanings, outputs = ([i for i, name in enumerate(header) if kind.fullmatch(name)] for kind in (_MEANING, _OUTPUT))
    if len(meanings) != 1 or len(outputs) != 1:
        raise DataError(f"'{place}', line 1: the columns {header} need one of meanings ('mr') and one of texts ('ref')")
    rows = []
    for row in reader:
        if row and len(row) != len(header):
            raise DataError(f"'{place}', line {reader.line_num}: got {len(row)} columns, expected {len(header)}")
        if row:
            rows.append((reader.line_num, row[meanings[0]].strip(), row[outputs[0]]))
    return rows
