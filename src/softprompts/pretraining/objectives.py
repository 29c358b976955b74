"""Self-supervised objectives as transforms of raw text: what a document of the mix looks like.

Plain causal language modelling takes very many tokens before a small model copies a name out of its context, which is
what text generation from records asks of it. ``records`` buys that ability early: pieces of a sentence (capitalised
spans, numbers, content words) are put in front of it in ever changing surface forms, and names are in part replaced by
invented ones, so that copying is the only way to get them right. Nothing here follows the schema of any benchmark.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from softprompts.registry import Registry

__all__ = [
    "OBJECTIVES",
    "Context",
    "Objective",
    "invent_name",
    "invent_word",
    "lookup",
    "plain",
    "records",
    "repetition",
    "split_sentences",
]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NAME = re.compile(r"[A-Z][\w'’&-]*(?: (?:of |the |de |and |& )?[A-Z0-9][\w'’&-]*)*")
_NUMBER = re.compile(r"\$?\d(?:[\d,.:/-]*\d)?(?: ?(?:am|pm|%|km|m|years|miles))?\b")
_WORD = re.compile(r"\b[a-z][a-z-]{4,}\b")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"”')]*\s+(?=[\"“'(]?[A-Z0-9])|\n+")
_SPEAKER = re.compile(r"^[A-Z]: ")
_COMMON = frozenset(
    _words(
        """
        The This That These Those There They Then When Where What Which While Who How And But For With From His Her
        Its Their Our Your You She Her Him Was Were Are Did Does Have Has Can Could Would Will Please Yes Okay Thank
        Thanks Sure After Before Also However Some All Any Not Now One Two Let Here Just Sorry Great Alright Once Such
        about above after again against almost along already although always among another around because before
        being below between could during either enough every first going great having herself himself itself later
        might myself never often other others please quite rather right shall should since still their theirs them
        there therefore these thing things think those though through under until upon using where whether which
        while whole whose within without would years yours
        """
    )
)
"""Capitalised at the start of a sentence and no names, or long and without content."""
_KEYS = {
    "name": _words("name title entity who subject item thing label what called a1 key object ref place person"),
    "number": _words("number count value n amount figure num quantity no. digits"),
    "word": _words("word topic about tag term note detail hint kind keyword aspect point"),
}
_SEPARATORS = (" | ", "; ", ", ", "\n", " / ", " - ", " , ", " ; ", " || ", " . ")
_LINKS = (" : ", ": ", " = ", "=", "[", " -> ", " is ", "(", " - ")
_MARKERS = (
    "\n",
    " => ",
    " -> ",
    "\nText: ",
    "\nSentence: ",
    "\n\n",
    " >> ",
    "\nIn words: ",
    " || ",
    "\n- ",
    " ## ",
    "\n= ",
)
_ONSETS = _words("b br c ch cl d dr f fl g gl gr h j k kl l m n p pl qu r s sh sk st t th tr v w x y z zh")
_VOWELS = _words("a e i o u a e i o ai ee ia oo ou y")
_CODAS = ("", "", "", "n", "r", "l", "s", "x", "th", "ck", "m", "rd", "nt", "sk", "v", "lla", "ndo", "ton", "ley")


@dataclass
class Context:
    """What a transform may draw from: a random stream, and names seen in earlier texts of the same source."""

    rng: random.Random
    names: deque[str] = field(default_factory=lambda: deque(maxlen=2000))


Objective = Callable[[str, Context], list[str]]
OBJECTIVES: Registry[Objective] = Registry("pretraining objective")


def split_sentences(text: str) -> list[str]:
    """Cut a text at sentence ends and line breaks; speaker labels such as ``U:`` are dropped."""
    return [_SPEAKER.sub("", part.strip()) for part in _SENTENCE_END.split(text) if part and part.strip()]


def invent_word(rng: random.Random, syllables: int | None = None) -> str:
    """Make a lower-case word of 1 to 3 random syllables that most likely exists nowhere."""
    count = syllables or rng.choice((1, 2, 2, 2, 3))
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(count)]
    return "".join(parts) + rng.choice(_CODAS)


def invent_name(rng: random.Random) -> str:
    """Make a capitalised name of 1 to 3 invented words."""
    words = [invent_word(rng).capitalize() for _ in range(rng.choice((1, 1, 1, 2, 2, 3)))]
    if len(words) == 3 and rng.random() < 0.5:
        words[1] = rng.choice(("of", "the", "&", "de", "and"))
    if rng.random() < 0.15:
        words.insert(0, "The")
    return " ".join(words)


@dataclass(frozen=True)
class _Form:
    """One surface form of a record; a document keeps to one form, as a data set would."""

    separator: str
    link: str | None
    """``None``: bare values without keys."""
    marker: str
    shuffled: bool
    keys: dict[str, Sequence[str]]
    lowercase_keys: bool

    @staticmethod
    def draw(rng: random.Random) -> _Form:
        keys: dict[str, Sequence[str]] = {}
        for kind, known in _KEYS.items():
            invented = [invent_word(rng) for _ in range(6)]
            keys[kind] = rng.sample(known, 6) if rng.random() < 0.5 else invented
        link = rng.choice(_LINKS) if rng.random() < 0.65 else None
        separator, marker = rng.choice(_SEPARATORS), rng.choice(_MARKERS)
        return _Form(separator, link, marker, rng.random() < 0.5, keys, rng.random() < 0.8)

    def render(self, pieces: list[tuple[str, str]]) -> str:
        """Write ``(kind, value)`` pieces as one record."""
        used = dict.fromkeys(self.keys, 0)
        fields = []
        for kind, value in pieces:
            if self.link is None:
                fields.append(value)
                continue
            key = self.keys[kind][used[kind] % len(self.keys[kind])]
            used[kind] += 1
            key = key if self.lowercase_keys else key.capitalize()
            closing = {"[": "]", "(": ")"}.get(self.link, "")
            fields.append(f"{key}{self.link}{value}{closing}")
        return self.separator.join(fields)


def _is_name_or_piece(text: str) -> bool:
    return text not in _COMMON and text[:2] not in ("I'", "I’") and (len(text) > 1 or text.isdigit())


def _names(text: str) -> list[str]:
    return [m.group() for m in _NAME.finditer(text) if _is_name_or_piece(m.group())]


def _pieces(sentence: str, rng: random.Random) -> list[tuple[int, str, str]]:
    """Extract ``(offset, kind, value)`` of names, numbers and a few content words, without overlaps."""
    found: list[tuple[int, str, str]] = []
    taken: list[tuple[int, int]] = []

    def take(kind: str, match: re.Match[str]) -> None:
        start, end = match.span()
        if any(start < e and s < end for s, e in taken) or not _is_name_or_piece(match.group()):
            return
        taken.append((start, end))
        found.append((start, kind, match.group()))

    for match in _NAME.finditer(sentence):
        # A lone capitalised word at the start of a sentence is rarely a name.
        if match.start() > 0 or " " in match.group():
            take("name", match)
    for match in _NUMBER.finditer(sentence):
        take("number", match)
    words = list(_WORD.finditer(sentence))
    rng.shuffle(words)
    for match in words[: rng.choice((0, 1, 1, 2, 3))]:
        take("word", match)
    return sorted(found)


def _record(sentence: str, form: _Form, context: Context) -> str | None:
    """Turn one sentence into ``record marker sentence``; ``None`` where it offers nothing to record."""
    rng = context.rng
    pieces = _pieces(sentence, rng)
    names = [value for _, kind, value in pieces if kind == "name"]
    context.names.extend(names)
    if not names and len(pieces) < 2:
        return None
    if len(pieces) > 7:
        pieces = sorted(rng.sample(pieces, 7))
    fields = [(kind, value) for _, kind, value in pieces]
    for name in dict.fromkeys(value for kind, value in fields if kind == "name"):
        if rng.random() < 0.4:
            borrow = context.names and rng.random() < 0.4
            other = rng.choice(context.names) if borrow else invent_name(rng)
            sentence = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", lambda _, new=other: new, sentence)  # type: ignore[misc]
            fields = [(kind, other if value == name else value) for kind, value in fields]
    if form.shuffled:
        rng.shuffle(fields)
    return f"{form.render(fields)}{form.marker}{sentence}"


@OBJECTIVES.register("plain")
def plain(text: str, context: Context) -> list[str]:
    """Return the text itself."""
    return [text]


@OBJECTIVES.register("records")
def records(text: str, context: Context) -> list[str]:
    """Put in front of each sentence a record of its names, numbers and some of its words.

    Up to five sentences that share one surface form make a document, separated by one or two line breaks.
    """
    documents: list[str] = []
    group: list[str] = []
    form, wanted = _Form.draw(context.rng), context.rng.randint(1, 5)
    for sentence in split_sentences(text):
        if not 25 <= len(sentence) <= 320:
            continue
        record = _record(sentence, form, context)
        if record is not None:
            group.append(record)
        if len(group) == wanted:
            documents.append(context.rng.choice(("\n", "\n\n")).join(group))
            group, form, wanted = [], _Form.draw(context.rng), context.rng.randint(1, 5)
    if group:
        documents.append("\n".join(group))
    return documents


@OBJECTIVES.register("lookup")
def lookup(text: str, context: Context) -> list[str]:
    """Make a record of names from the text and invented ones, then restate some of its fields by key."""
    rng = context.rng
    names = _names(text)
    context.names.extend(names)
    pool = names + [invent_name(rng) for _ in range(4)] + [str(rng.randint(1, 9999)) for _ in range(2)]
    form = _Form.draw(rng)
    link = form.link or " : "
    closing = {"[": "]", "(": ")"}.get(link, "")
    known = [key for keys in _KEYS.values() for key in keys]
    lines = []
    for _ in range(rng.randint(1, 4)):
        values = rng.sample(pool, min(len(pool), rng.randint(1, 5)))
        keys = [rng.choice(known) if rng.random() < 0.5 else invent_word(rng) for _ in values]
        record = form.separator.join(f"{k}{link}{v}{closing}" for k, v in zip(keys, values, strict=True))
        order = list(range(len(values)))
        rng.shuffle(order)
        frame = rng.choice(("{k}{l}{v}{c}", "The {k} is {v}.", "{v} is the {k}.", "Its {k}: {v}.", "{k}? {v}"))
        answers = [frame.format(k=keys[i], l=link, v=values[i], c=closing) for i in order[: rng.randint(1, len(order))]]
        lines.append(record + form.marker + rng.choice((" ", "\n", "; ")).join(answers))
    return ["\n".join(lines)]


@OBJECTIVES.register("repetition")
def repetition(text: str, context: Context) -> list[str]:
    """Say a list of words or a sentence twice or more: the plainest exercise in copying."""
    rng = context.rng
    words = [m.group() for m in _WORD.finditer(text)] or ["word"]
    names = _names(text)
    documents = []
    for sentence in rng.sample(sentences := split_sentences(text) or [text], min(2, len(sentences))):
        if rng.random() < 0.4:
            item = sentence
        else:
            pool = words + names + [invent_name(rng) for _ in range(6)] + [invent_word(rng) for _ in range(4)]
            item = rng.choice((", ", " ", "\n", "; ", " - ")).join(rng.choices(pool, k=rng.randint(3, 14)))
        documents.append(rng.choice(("\n", "\n\n", " | ", " = ", "\nAgain: ")).join([item] * rng.randint(2, 3)))
    return documents
