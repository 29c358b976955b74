"""What a small LM can do: grammar (BLiMP), copying from its context, and a look at its text.

All of it works with any causal LM and tokenizer of transformers.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompts.errors import DataError, DataNotFoundError

__all__ = ["COPY_TEMPLATES", "BlimpResult", "blimp", "copying", "induction", "sample", "sequence_log_probs"]

COPY_TEMPLATES = (
    ("name : {name} | city : {city}\nThe name is", " {name}"),
    ("name: {name}, city: {city}, price: cheap\nName:", " {name}"),
    ("place = {city}; visitor = {name}\nvisitor =", " {name}"),
    ("My friend {name} lives in {city}. One day, my friend", " {name}"),
    ("U: I want to book a table at {name} in {city}.\nS: Please confirm: a table at", " {name}"),
    ("<guest> {name} <town> {city}\nguest:", " {name}"),
)
"""``(context, continuation)`` pairs. The first three are of the kind that the exercise ``lookup`` trains, with other
keys; the rest are not."""
_CITIES = ("Paris", "London", "Boston", "Berkeley", "Chicago", "Rome", "Berlin", "Oakland", "Sydney", "Vancouver")


@torch.no_grad()
def sequence_log_probs(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], skip: Sequence[int] | None = None, batch_size: int = 32
) -> tuple[list[float], list[bool]]:
    """Score token sequences.

    Args:
        model: A causal LM.
        rows: Token ids, each row with its start token.
        skip: Per row, how many leading tokens are context only (at least 1, the default).
        batch_size: Rows per forward pass; rows are padded on the right to the longest.

    Returns:
        Per row the sum of log-probabilities (nats) behind the context, and whether every one of those tokens is the
        greedy choice.
    """
    skip = [1] * len(rows) if skip is None else skip
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    sums, greedy = [0.0] * len(rows), [False] * len(rows)
    for first in range(0, len(rows), batch_size):
        chosen = order[first : first + batch_size]
        longest = max(len(rows[i]) for i in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        counted = torch.zeros(len(chosen), longest, dtype=torch.bool)
        for place, i in enumerate(chosen):
            ids[place, : len(rows[i])] = torch.tensor(list(rows[i]))
            counted[place, skip[i] : len(rows[i])] = True
        ids, counted = ids.to(model.device), counted.to(model.device)
        # Padding lies on the right of a causal model: no real token sees it, so no mask is needed.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        targets, counted = ids[:, 1:], counted[:, 1:]
        log_probs = -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        right = (logits.argmax(dim=-1) == targets) | ~counted
        for place, i in enumerate(chosen):
            sums[i] = float((log_probs[place] * counted[place]).sum())
            greedy[i] = bool(right[place].all())
    return sums, greedy


def _unseen_name(rng: random.Random) -> str:
    """Alternate consonants and vowels, unlike the syllables that training names are invented from."""
    start = rng.random() < 0.5
    letters = [rng.choice("bcdfgklmnprstvz" if (i % 2 == 0) == start else "aeiou") for i in range(rng.randint(5, 8))]
    return "".join(letters).capitalize()


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _with_start(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    assert isinstance(start, int), "the tokenizer has neither a start nor an end token"
    return [start, *_ids(tokenizer, text)]


@dataclass(frozen=True)
class BlimpResult:
    """Accuracy on minimal pairs.

    Attributes:
        accuracy: Mean over all pairs, and as the paradigms have the same size, over paradigms.
        standard_error: Of that mean.
        pairs: How many pairs were scored.
        by_term: Accuracy per linguistic phenomenon.
    """

    accuracy: float
    standard_error: float
    pairs: int
    by_term: dict[str, float]


def blimp(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    pairs_per_paradigm: int | None = None,
    batch_size: int = 64,
) -> BlimpResult:
    """Tell how often the grammatical sentence of a pair is the more probable one (Warstadt et al. 2020).

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer; each sentence is scored behind one start token.
        path: JSONL with ``good``, ``bad``, ``uid`` and ``term`` (or ``linguistics_term``).
        pairs_per_paradigm: Take the first so many pairs of each; ``None``: all.
        batch_size: Sentences per forward pass.

    Raises:
        DataNotFoundError: There is no such file.
        DataError: The file holds no pairs.
    """
    if not path.is_file():
        raise DataNotFoundError(f"BLiMP file '{path}' does not exist; expected one JSONL file with all paradigms")
    taken: dict[str, int] = defaultdict(int)
    records: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            uid = record.get("uid") or record.get("UID", "")
            if pairs_per_paradigm is None or taken[uid] < pairs_per_paradigm:
                taken[uid] += 1
                records.append(record)
    if not records:
        raise DataError(f"BLiMP file '{path}' holds no pairs")
    good = [_with_start(tokenizer, r.get("good") or r["sentence_good"]) for r in records]
    bad = [_with_start(tokenizer, r.get("bad") or r["sentence_bad"]) for r in records]
    scores, _ = sequence_log_probs(model, good + bad, batch_size=batch_size)
    by_term: dict[str, list[bool]] = defaultdict(list)
    for i, record in enumerate(records):
        by_term[record.get("term") or record.get("linguistics_term", "all")].append(scores[i] > scores[i + len(good)])
    accuracy = sum(map(sum, by_term.values())) / len(records)
    return BlimpResult(
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / len(records)),
        pairs=len(records),
        by_term={term: sum(hits) / len(hits) for term, hits in sorted(by_term.items())},
    )


def copying(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 300, seed: int = 0
) -> dict[str, float]:
    """Tell how often an invented name is repeated exactly, greedily, out of a short record or sentence.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        count: Records in all, the templates in turn.
        seed: Of names and cities.

    Returns:
        ``accuracy`` and ``standard_error`` over all records, and accuracy per template by its number.
    """
    rng = random.Random(seed)
    rows, skips = [], []
    for i in range(count):
        context, continuation = COPY_TEMPLATES[i % len(COPY_TEMPLATES)]
        fields = {"name": _unseen_name(rng), "city": rng.choice(_CITIES)}
        start = _with_start(tokenizer, context.format(**fields))
        rows.append(start + _ids(tokenizer, continuation.format(**fields).rstrip()))
        skips.append(len(start))
    _, right = sequence_log_probs(model, rows, skips)
    accuracy = sum(right) / count
    result = {"accuracy": accuracy, "standard_error": math.sqrt(accuracy * (1 - accuracy) / count)}
    for number in range(len(COPY_TEMPLATES)):
        hits = right[number :: len(COPY_TEMPLATES)]
        result[f"template_{number}"] = sum(hits) / max(1, len(hits))
    return result


@torch.no_grad()
def induction(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 32, length: int = 20, seed: int = 0
) -> dict[str, float]:
    """Say a list of random words twice, commas between, and measure the second time (induction, Olsson et al. 2022).

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer; the words are its tokens of one blank and at least three lower-case letters.
        count: Lists.
        length: Words in a list, all different; fewer where the tokenizer knows fewer.
        seed: Of the lists.

    Returns:
        ``accuracy`` (greedy, given the tokens before) and ``loss`` in nats on the words of the repetition but its
        first, and ``first_loss`` on the same words said for the first time.

    Raises:
        DataError: Hardly any token is a word.
    """
    words = [i for i in range(len(tokenizer)) if re.fullmatch(r" [a-z]{3,}", str(tokenizer.decode([i])))]
    if len(words) < 4:
        raise DataError(f"the tokenizer has {len(words)} tokens that are words, expected at least 4")
    length = min(length, len(words))
    rng = random.Random(seed)
    comma, line_break = _ids(tokenizer, ","), _ids(tokenizer, "\n")
    start, rows = _with_start(tokenizer, ""), []
    for _ in range(count):
        once = [token for word in rng.sample(words, length) for token in (word, *comma)]
        rows.append(start + once + line_break + once)
    ids = torch.tensor(rows, device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    stride = 1 + len(comma)
    # Entry i of `losses` is about token i + 1; the first word of each list cannot be foretold.
    first = [len(start) - 1 + stride * i for i in range(1, length)]
    second = [place + stride * length + len(line_break) for place in first]
    return {
        "accuracy": float((logits.argmax(-1) == ids[:, 1:])[:, second].float().mean()),
        "loss": float(losses[:, second].mean()),
        "first_loss": float(losses[:, first].mean()),
    }


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 60,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
) -> list[str]:
    """Continue each text once; temperature 0 is greedy. Returns prompt and continuation."""
    torch.manual_seed(seed)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([_with_start(tokenizer, prompt)], device=model.device)
        options: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        output = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, pad_token_id=1, **options
        )
        texts.append(str(tokenizer.decode(output[0, 1:], skip_special_tokens=True)))
    return texts
