"""What an encoder-decoder learns from a row of tokens: pairs of what its encoder reads and what its decoder says.

Both objectives give pairs of fixed lengths, so that a compiled step has static shapes, and both are pure functions of
the row and a random generator, which :class:`~softprompts.pretraining.trainer.PairRows` seeds per row: a resumed run
sees the same pairs.

* *Span corruption* (Raffel et al. 2020, section 3.1.4; ``random_spans_noise_mask`` of the T5 code): a fixed number of
  tokens in a fixed number of spans is cut out, each span leaves one sentinel, and the target is the spans, each behind
  its sentinel.
* *LM adaptation* (Lester et al. 2021, section 3.2: the prefix-LM objective): the row is cut at a random point.

Shape letters: T tokens of the row, S of the encoder's input, U of the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from softprompts.errors import ConfigError
from softprompts.pretraining.recipe import PretrainRecipe

__all__ = ["Cut", "Pairing", "SpanCorruption", "pairing", "sentinel_count"]

_Ids = NDArray[np.int64]


class Pairing(Protocol):
    """Makes a pair of a row."""

    @property
    def input_length(self) -> int:
        """S, the same for every row."""
        ...

    @property
    def target_length(self) -> int:
        """U, the same for every row."""
        ...

    @property
    def pads(self) -> bool:
        """Whether inputs are filled up with pads."""
        ...

    def pair(self, ids_T: _Ids, rng: np.random.Generator) -> tuple[_Ids, _Ids]:
        """Return ``(inputs [S], targets [U])``."""
        ...


@dataclass(frozen=True)
class SpanCorruption:
    """Spans of a row of ``length`` tokens become sentinels.

    Attributes:
        length: T, at least 2.
        noise_density: Share of the tokens that are cut out.
        mean_span_length: Mean tokens per span.
        first_sentinel: Id of ``<extra_id_0>``; the others follow it. No token of a row has such an id.
        end: Id that ends both inputs and targets.
    """

    length: int
    noise_density: float
    mean_span_length: float
    first_sentinel: int
    end: int
    pads: bool = False

    @property
    def noise_tokens(self) -> int:
        """How many tokens are cut out."""
        return min(max(round(self.length * self.noise_density), 1), self.length - 1)

    @property
    def spans(self) -> int:
        """How many spans they come in, and how many sentinels are needed."""
        noise = self.noise_tokens
        return min(max(round(noise / self.mean_span_length), 1), noise, self.length - noise)

    @property
    def input_length(self) -> int:
        """What is left, the sentinels, and the end."""
        return self.length - self.noise_tokens + self.spans + 1

    @property
    def target_length(self) -> int:
        """What was cut out, the sentinels, and the end."""
        return self.noise_tokens + self.spans + 1

    def pair(self, ids_T: _Ids, rng: np.random.Generator) -> tuple[_Ids, _Ids]:
        """Cut random spans out of a row; it begins with a token that stays and ends with a span, as T5's do."""
        kept = _segments(self.length - self.noise_tokens, self.spans, rng)
        lost = _segments(self.noise_tokens, self.spans, rng)
        borders = np.cumsum(np.stack([kept, lost], axis=1).ravel())[:-1]
        pieces = np.split(ids_T, borders)
        sentinels = self.first_sentinel + np.arange(self.spans)[:, None]
        end = np.array([self.end])
        inputs = [part for pair in zip(pieces[0::2], sentinels, strict=True) for part in pair]
        targets = [part for pair in zip(sentinels, pieces[1::2], strict=True) for part in pair]
        return np.concatenate([*inputs, end]), np.concatenate([*targets, end])

    def restore(self, inputs_S: _Ids, targets_U: _Ids) -> _Ids:
        """Put the spans back: the row that :meth:`pair` was given."""
        inputs, targets = inputs_S[:-1], targets_U[:-1]
        kept = np.split(inputs, np.flatnonzero(inputs >= self.first_sentinel))
        lost = np.split(targets, np.flatnonzero(targets >= self.first_sentinel))
        # Every piece but the first begins with its sentinel, which goes.
        spans = {int(piece[0]): piece[1:] for piece in lost[1:]}
        return np.concatenate([kept[0], *(part for piece in kept[1:] for part in (spans[int(piece[0])], piece[1:]))])


@dataclass(frozen=True)
class Cut:
    """A text is cut at a random point: its first part is the input, its rest the target.

    The text is the row up to ``target_length`` tokens behind the cut: every target is full, only inputs are padded.

    Attributes:
        length: T.
        target_length: U, less than T.
        end: Id that ends the inputs. Targets have no end of their own: the text goes on.
        pad: Id that fills the inputs up; no token of a row has it.
    """

    length: int
    target_length: int
    end: int
    pad: int
    pads: bool = True

    @property
    def input_length(self) -> int:
        """The longest first part, and the end."""
        return self.length - self.target_length + 1

    def pair(self, ids_T: _Ids, rng: np.random.Generator) -> tuple[_Ids, _Ids]:
        """Cut a row; every cut that leaves an input and a full target is equally likely."""
        at = int(rng.integers(1, self.input_length))
        inputs = np.full(self.input_length, self.pad)
        inputs[:at], inputs[at] = ids_T[:at], self.end
        return inputs, ids_T[at : at + self.target_length].copy()


def _segments(items: int, count: int, rng: np.random.Generator) -> _Ids:
    """Cut ``items`` into ``count`` parts of at least one, all ways equally likely; ``[count]`` lengths."""
    cuts = np.sort(rng.choice(items - 1, count - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=items)


def pairing(recipe: PretrainRecipe, vocab_size: int) -> Pairing:
    """Make what the recipe asks for.

    Args:
        recipe: Of an encoder-decoder.
        vocab_size: Of the tokenizer without sentinels; they follow its last id.
    """
    objective, context = recipe.objective, recipe.model.context
    if recipe.objective_name == "prefix_lm":
        return Cut(context, objective.target_tokens or context // 2, end=0, pad=1)
    if context < 2:
        raise ConfigError(f"model.context is {context}, expected at least 2 for span corruption")
    return SpanCorruption(context, objective.noise_density, objective.mean_span_length, vocab_size, end=0)


def sentinel_count(recipe: PretrainRecipe) -> int:
    """How many sentinels a tokenizer has: ``objective.sentinels``, or as many as a row needs; 0 for decoders.

    LM adaptation uses none, but its tokenizer is that of the model that it starts from.

    Raises:
        ConfigError: ``objective.sentinels`` is less than span corruption needs.
    """
    if recipe.model.kind == "decoder":
        return 0
    objective = recipe.objective
    spans = SpanCorruption(recipe.model.context, objective.noise_density, objective.mean_span_length, 0, 0).spans
    if objective.sentinels is None:
        return spans
    if objective.sentinels < spans and recipe.objective_name == "span_corruption":
        raise ConfigError(
            f"objective.sentinels is {objective.sentinels}, but a row of {recipe.model.context} tokens has {spans} "
            "spans; raise it, or leave it out"
        )
    return objective.sentinels
