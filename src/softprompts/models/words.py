"""What a tokenizer does to words, found by asking it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

__all__ = ["common_ids", "marks_around_text"]


def marks_around_text(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the tokenizer puts in front of every text, and behind it."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    marked = tokenizer("a").input_ids
    start = next((i for i in range(len(marked)) if marked[i : i + len(plain)] == plain), 0)
    return tuple(marked[:start]), tuple(marked[start + len(plain) :])


def common_ids(tokenizer: PreTrainedTokenizerBase, limit: int, count: int) -> list[int]:
    """The first ``count`` ids below ``limit`` that stand for text; special tokens and broken pieces do not."""
    special = set(tokenizer.all_special_ids)
    ids: list[int] = []
    for token in range(limit):
        if token not in special and _is_text(str(tokenizer.decode([token]))):
            ids.append(token)
        if len(ids) == count:
            break
    return ids


def _is_text(piece: str) -> bool:
    return bool(piece.strip()) and "�" not in piece
