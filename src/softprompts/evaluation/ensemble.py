"""Prompt ensembling (Lester et al. 2021, section 6): several prompts of one task answer a record in one forward pass.

The record stands in the batch once per prompt. The answers become one by majority vote, by taking the likeliest, by
averaging the probabilities of a task's choices, or by averaging the next-token distributions of all prompts while one
common text is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from softprompts.config import DecodingConfig
from softprompts.errors import ConfigError, nearest
from softprompts.evaluation.classification import is_legal
from softprompts.evaluation.predict import Ranking, predict, rank
from softprompts.inference import Engine
from softprompts.types import Encoded, Prediction

__all__ = [
    "COMBINATIONS",
    "Answer",
    "Vote",
    "combine",
    "illegal_of_members",
    "likeliest",
    "majority_vote",
    "mean_choice",
    "predict_ensemble",
]

COMBINATIONS = ("vote", "likeliest", "average", "rank")
"""How answers become one; see :func:`predict_ensemble`."""


@dataclass(frozen=True)
class Vote:
    """How a majority was found."""

    winner: int
    """Number of the member that gave the winning answer; of several, the one that found it most likely."""
    votes: dict[str, int]
    """Per answer, runs of blanks made one, how many members gave it; most votes first. Illegal answers are left out."""
    illegal: int
    """Members whose answer is none of the choices."""
    tied: bool
    """Whether log-probabilities decided between answers with equally many votes."""


@dataclass(frozen=True)
class Answer:
    """What an ensemble answers to one record."""

    prediction: Prediction
    """The common answer. Chosen among the members' it is that of one of them, with its log-probability."""
    members: tuple[Prediction, ...]
    """What each member answers on its own; empty if nobody asked for it."""
    vote: Vote | None = None
    """For a majority vote."""


def majority_vote(answers: Sequence[Prediction], choices: Sequence[str] = ()) -> Vote:
    """Find the answer that most members give.

    Args:
        answers: One per member, with log-probabilities.
        choices: The legal answers; a member whose answer is none of them, runs of blanks made one, has no vote. Empty:
            every answer is legal.

    Returns:
        The vote. Among answers with equally many votes the one wins whose votes have the highest sum of
        log-probabilities, then the one that comes first among the choices (without choices: among the members'
        answers). If every answer is illegal, the member with the likeliest one (:func:`likeliest`) wins, without a
        vote.

    Raises:
        ConfigError: There are no answers.
    """
    if not answers:
        raise ConfigError("nobody answered, so there is nothing to vote on; an ensemble needs at least one member")
    words = [_normal(one.text) for one in answers]
    order = list(dict.fromkeys(map(_normal, choices or words)))
    voters = {word: [index for index, own in enumerate(words) if own == word] for word in order if word in words}
    illegal = len(answers) - sum(map(len, voters.values()))
    if not voters:
        return Vote(likeliest(answers), {}, illegal, tied=False)
    most = max(map(len, voters.values()))
    tied = [word for word, own in voters.items() if len(own) == most]
    # Of equals, max() keeps the first and sorted() the order: that of the choices.
    best = max(tied, key=lambda word: math.fsum(_logprob(answers[index]) for index in voters[word]))
    votes = {word: len(voters[word]) for word in sorted(voters, key=lambda word: -len(voters[word]))}
    winner = max(voters[best], key=lambda index: _logprob(answers[index]))
    return Vote(winner, votes, illegal, tied=len(tied) > 1)


def likeliest(answers: Sequence[Prediction]) -> int:
    """Return the number of the answer with the highest mean log-probability per token (its end counts as one).

    The mean and not the sum, because the sum prefers short texts. Of equal ones the first is taken.

    Raises:
        ConfigError: There are no answers.
    """
    if not answers:
        raise ConfigError("nobody answered, so there is nothing to choose from; an ensemble needs at least one member")
    return max(range(len(answers)), key=lambda index: _mean_logprob(answers[index]))


def combine(answers: Sequence[Prediction], how: str) -> Answer:
    """Make one answer of the members' answers to a record.

    Args:
        answers: One per member, all to the same example; its choices are the legal answers.
        how: ``vote``, ``likeliest`` or ``rank``.

    Raises:
        ConfigError: There are no answers, ``how`` is none of these, or the answers were not ranked.
    """
    if how == "likeliest":
        return Answer(answers[likeliest(answers)], tuple(answers))
    if how == "rank":
        return Answer(mean_choice(answers), tuple(answers))
    if how != "vote":
        raise ConfigError(f"answers cannot be combined by '{how}': {nearest(how, ('vote', 'likeliest', 'rank'))}")
    vote = majority_vote(answers, answers[0].example.choices if answers else ())
    return Answer(answers[vote.winner], tuple(answers), vote)


def mean_choice(answers: Sequence[Prediction]) -> Prediction:
    """Average what the members think of the choices: each one's scores become probabilities that add up to 1.

    Args:
        answers: One per member, ranked.

    Returns:
        The choice with the highest mean probability, of equal ones the first; its ``choice_scores`` are the logarithms
        of the means.

    Raises:
        ConfigError: There are no answers, or one was not ranked.
    """
    scores = [one.choice_scores for one in answers]
    if not scores or any(not own for own in scores):
        raise ConfigError("probabilities of choices can be averaged where all members ranked them; use ranked answers")
    logs = [[score - _logsumexp(own) for score in own] for own in scores]
    means = tuple(_logsumexp(column) - math.log(len(logs)) for column in zip(*logs, strict=True))
    text = answers[0].example.choices[means.index(max(means))]
    return Prediction(answers[0].example, text, max(means), ranked=text, choice_scores=means)


def predict_ensemble(
    engine: Engine,
    rows: Sequence[Encoded],
    decoding: DecodingConfig,
    *,
    how: str,
    ranking: Ranking | None = None,
    with_members: bool = True,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer every record with all prompts of an engine.

    All N members of a record are in the same batch: B records are B * N rows, each with its own prompt. What the model
    makes of a text depends on the prompt in front of it, so nothing but the weights can be shared.

    Args:
        engine: The model with the N members as its prompts, and no other.
        rows: Encoded inputs; which prompt they name does not matter. The choices of their examples are the legal
            answers.
        decoding: How. ``batch_size`` counts rows of a forward pass and is made a multiple of N.
        how: ``vote`` (:func:`majority_vote`), ``likeliest`` (:func:`likeliest`), ``rank`` (:func:`mean_choice`) or
            ``average``: one text, of which every token is chosen from the mean of the members' distributions.
        ranking: The choices of the rows, for ``rank``.
        with_members: For ``average``: whether the members' own answers are wanted as well (a pass of their own).
        seed: For sampling.
        on_progress: Called with the number of outputs that just became ready, N per record; with ``average`` one more.

    Raises:
        ConfigError: ``how`` is unknown, there are no members, the decoding options make no sense, a beam search is to
            average, or choices are to be ranked and there are none.
        LengthError: A row does not fit into the context. Nothing has run then.
    """
    count = len(engine.prompted.prompts)
    if how not in COMBINATIONS:
        raise ConfigError(f"answers cannot be combined by '{how}': {nearest(how, COMBINATIONS)}")
    if not count:
        raise ConfigError("an ensemble without a prompt was asked for an answer; give it at least one member")
    if how == "rank" and ranking is None:
        raise ConfigError("a text without choices cannot be ranked; combine answers by vote, likeliest or average")
    if how == "average":
        engine.check(rows, decoding, averaged=range(count))
    states = engine.fold()
    whole = replace(decoding, batch_size=max(1, decoding.batch_size // count) * count)
    spread = _spread(rows, count)
    own: list[Prediction] = []
    if ranking is not None and how == "rank":
        wide = Ranking(
            [one for one in ranking.choices for _ in range(count)], ranking.by, _spread(ranking.priors, count)
        )
        own = rank(engine, spread, wide, states=states, batch_size=whole.batch_size, on_progress=on_progress)
    elif how != "average" or with_members:
        # Neighbours of equal length stay neighbours in the engine's batches, so every batch holds whole records.
        own = predict(engine, spread, whole, states=states, seed=seed, on_progress=on_progress)
    of_row = [tuple(own[start : start + count]) for start in range(0, len(own), count)] or [()] * len(rows)
    if how != "average":
        return [combine(answers, how) for answers in of_row]
    members = tuple(range(count))
    texts = predict(engine, rows, whole, states=states, averaged=members, seed=seed, on_progress=on_progress)
    return [Answer(text, answers) for text, answers in zip(texts, of_row, strict=True)]


def illegal_of_members(answers: Sequence[Answer]) -> tuple[int, ...]:
    """Count, per member, the answers that are none of their example's choices; zeros for free text."""
    return tuple(
        sum(bool(one.example.choices) and not is_legal(one.text, one.example.choices) for one in own)
        for own in zip(*(answer.members for answer in answers), strict=True)
    )


def _spread(rows: Sequence[Encoded], members: int) -> list[Encoded]:
    return [replace(row, prompt=member) for row in rows for member in range(members)]


def _normal(text: str) -> str:
    return " ".join(text.split())


def _logprob(answer: Prediction) -> float:
    return -math.inf if answer.logprob is None else answer.logprob


def _mean_logprob(answer: Prediction) -> float:
    tokens = (answer.new_tokens or 0) + bool(answer.finished)
    return _logprob(answer) / tokens if tokens else -math.inf


def _logsumexp(values: Sequence[float]) -> float:
    highest = max(values)
    return highest + math.log(math.fsum(math.exp(value - highest) for value in values))
