"""Which token comes next: what is forbidden, how a distribution is narrowed, how one token is drawn.

Everything here works on plain tensors and knows no model. Shape letters: R rows of the forward pass (requests times
beams), V vocabulary, N tokens that a banned sequence looks back. Temperature, top-k and top-p mean what they mean in
``transformers.generation.logits_process``, and are applied in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from softprompts.config import DecodingConfig
from softprompts.errors import ConfigError

__all__ = [
    "FORBIDDEN",
    "Constraints",
    "banned_sequences",
    "check_banned",
    "check_decoding",
    "draw",
    "warp",
]

FORBIDDEN = float("-inf")
"""Score of a token that may not come."""

_COLD = 1e-4
"""Below this temperature logits are divided by so little that the best might become infinite, and not draw at all; so
the best is made 0 beforehand, which changes no probability."""
_COLDEST = 1e-30
"""Less than this may be 0 in float32."""


# --------------------------------------------------------------------------------------------------------------------
# What may not come next
# --------------------------------------------------------------------------------------------------------------------


def check_decoding(decoding: DecodingConfig) -> None:
    """Refuse decoding options that make no sense.

    Raises:
        ConfigError: A number is out of its range; the message names it.
    """
    limits: tuple[tuple[str, float, bool, str], ...] = (
        ("max_new_tokens", decoding.max_new_tokens, decoding.max_new_tokens >= 1, "at least 1"),
        ("min_new_tokens", decoding.min_new_tokens, decoding.min_new_tokens >= 0, "at least 0"),
        ("beams", decoding.beams, decoding.beams >= 1, "at least 1"),
        ("batch_size", decoding.batch_size, decoding.batch_size >= 1, "at least 1"),
        (
            "temperature",
            decoding.temperature,
            0 < decoding.temperature <= 100,
            "above 0 (for no randomness: strategy greedy) and at most 100",
        ),
        ("top_k", decoding.top_k, decoding.top_k >= 0, "at least 0 (0 keeps all tokens)"),
        ("top_p", decoding.top_p, 0 < decoding.top_p <= 1, "in (0, 1] (1 keeps all tokens)"),
    )
    for name, value, fine, expected in limits:
        if not fine:
            raise ConfigError(f"decoding.{name} is {value}, expected {expected}")
    if decoding.min_new_tokens > decoding.max_new_tokens:
        raise ConfigError(
            f"decoding.min_new_tokens is {decoding.min_new_tokens}, more than max_new_tokens {decoding.max_new_tokens};"
            " lower the one or raise the other"
        )


def banned_sequences(strings: Sequence[str], tokenize: Callable[[str], list[int]]) -> tuple[tuple[int, ...], ...]:
    r"""Resolve banned strings to token ids.

    The meaning is that of ``bad_words_ids`` in transformers: a string that is one token bans this token; a string of
    several tokens bans the last of them wherever the others have just come (input included). Other tokens that merely
    contain the string stay allowed: ban ``"\n\n"`` beside ``"\n"``, as prefix-tuning's official code does, and
    ``" word"`` beside ``"word"``.

    Args:
        strings: What must not be produced.
        tokenize: Text to ids, without special tokens.

    Returns:
        Distinct id sequences. A tokenizer that treats the start of a text in its own way (SentencePiece) contributes
        the form within a text as well.

    Raises:
        ConfigError: A string is empty or has no tokens.
    """
    found: dict[tuple[int, ...], None] = {}
    before = tokenize("a")
    for text in strings:
        ids = tokenize(text)
        if not ids:
            raise ConfigError(f"decoding.banned holds {text!r}, which is no token of this model; remove it")
        found[tuple(ids)] = None
        within = tokenize("a" + text)
        if within[: len(before)] == before and len(within) > len(before):
            found[tuple(within[len(before) :])] = None
    return tuple(found)


def check_banned(banned: Sequence[Sequence[int]], *, eos_id: int, vocab_size: int) -> None:
    """Refuse bans of what is no token, and of everything.

    Args:
        banned: Id sequences.
        eos_id: The end-of-sequence token.
        vocab_size: V.

    Raises:
        ConfigError: A banned id is outside the vocabulary, or nothing would be left to generate.
    """
    outside = [token for sequence in banned for token in sequence if not 0 <= token < vocab_size]
    if outside:
        raise ConfigError(f"banned token id {outside[0]} is outside the vocabulary of {vocab_size} tokens")
    if len(_singles(banned) | {eos_id}) >= vocab_size:
        raise ConfigError("every token of the vocabulary is banned; shorten decoding.banned")


def _singles(banned: Sequence[Sequence[int]]) -> set[int]:
    """Tokens that are banned wherever they might come."""
    return {sequence[0] for sequence in banned if len(sequence) == 1}


class Constraints:
    """Banned tokens, banned sequences and no end before ``min_new_tokens``, for one batch of rows.

    It remembers the last tokens of every row, as far back as the longest banned sequence looks, and nothing if all
    bans are single tokens.

    Args:
        histories: The input ids of every row.
        banned: Id sequences; a ban of the end-of-sequence token alone is ignored, as in transformers.
        eos_id: The end-of-sequence token.
        min_new_tokens: The end is forbidden until so many tokens have come.
        vocab_size: V of the logits.
        device: Where the logits are.
    """

    def __init__(
        self,
        histories: Sequence[Sequence[int]],
        *,
        banned: Sequence[Sequence[int]],
        eos_id: int,
        min_new_tokens: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        singles = sorted(_singles(banned) - {eos_id})
        self._eos_id, self._min_new_tokens = eos_id, min_new_tokens
        self._single_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._single_V[singles] = True
        self._without_end_V = self._single_V.clone()
        self._without_end_V[eos_id] = True
        self._any_single = bool(singles)
        self._sequences = [
            (torch.tensor(sequence[:-1], device=device), sequence[-1]) for sequence in banned if len(sequence) > 1
        ]
        reach = max((len(sequence) - 1 for sequence in banned), default=0)
        # -1 is no token: a history shorter than a banned sequence never matches it.
        tails = [([-1] * reach + list(ids))[len(ids) :] for ids in histories]
        self._tails_RN = torch.tensor(tails, dtype=torch.long, device=device).view(len(tails), reach)

    def forbidden(self, new_tokens: int) -> Tensor | None:
        """Say what may not come now.

        Args:
            new_tokens: Tokens generated so far.

        Returns:
            Booleans that broadcast to ``[R, V]``, or ``None`` where everything is allowed.
        """
        early = new_tokens < self._min_new_tokens
        mask_V = self._without_end_V if early else self._single_V
        if not self._sequences:
            return mask_V[None] if early or self._any_single else None
        mask_RV = mask_V.repeat(self._tails_RN.shape[0], 1)
        for before, token in self._sequences:
            mask_RV[:, token] |= (self._tails_RN[:, self._tails_RN.shape[1] - len(before) :] == before).all(dim=1)
        return mask_RV

    def follow(self, parents_R: Tensor, tokens_R: Tensor | None = None) -> None:
        """Continue the rows ``parents_R`` with ``tokens_R`` (without tokens: only pick the rows)."""
        if self._sequences:
            self._tails_RN = self._tails_RN[parents_R]
            if tokens_R is not None:
                self._tails_RN = torch.cat([self._tails_RN[:, 1:], tokens_R[:, None]], dim=1)


# --------------------------------------------------------------------------------------------------------------------
# Narrowing and drawing
# --------------------------------------------------------------------------------------------------------------------


def warp(logits_RV: Tensor, decoding: DecodingConfig) -> Tensor:
    """Apply temperature, then top-k, then top-p.

    Top-k keeps the k best tokens and what ties with the last of them. Top-p (Holtzman et al. 2020) keeps the smallest
    set of best tokens whose probability reaches p, at least one.

    Returns:
        Logits ``[R, V]``, minus infinity where a token fell out.
    """
    if decoding.temperature != 1.0:
        if decoding.temperature < _COLD:
            logits_RV = logits_RV - logits_RV.amax(dim=-1, keepdim=True)
        logits_RV = logits_RV / max(decoding.temperature, _COLDEST)
    vocab_size = logits_RV.shape[-1]
    if 0 < decoding.top_k < vocab_size:
        last_R1 = logits_RV.topk(decoding.top_k, dim=-1).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < last_R1, FORBIDDEN)
    if decoding.top_p < 1.0:
        ascending_RV, order_RV = logits_RV.sort(dim=-1)
        outside_RV = ascending_RV.softmax(dim=-1).cumsum(dim=-1) <= 1 - decoding.top_p
        outside_RV[:, -1] = False
        logits_RV = logits_RV.masked_fill(outside_RV.scatter(1, order_RV, outside_RV), FORBIDDEN)
    return logits_RV


def draw(logits_RV: Tensor, uniforms_R: Sequence[float]) -> Tensor:
    """Draw one token per row by inverting the distribution function at a number in [0, 1).

    One number per row and step instead of a shared generator: what a row draws then depends on nothing but itself.

    Returns:
        Token ids ``[R]``.
    """
    probabilities_RV = logits_RV.softmax(dim=-1, dtype=torch.float64)
    heights_RV = probabilities_RV.cumsum(dim=-1)
    uniform_R1 = torch.tensor(uniforms_R, dtype=torch.float64, device=logits_RV.device)[:, None]
    # Scaled by the total, because rounding leaves it a little off 1, and clamped so that the product stays below the
    # total. A token of probability 0 is never the first one above the number, so forbidden tokens cannot be drawn.
    aim_R1 = uniform_R1.clamp(max=1 - 2**-52) * heights_RV[:, -1:]
    return torch.searchsorted(heights_RV, aim_R1, right=True)[:, 0]
