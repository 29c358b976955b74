"""Ensembles as models: all members answer in the same batch, and their answers become one.

A folder with ``ensemble.json`` in the server's folder of prompts is served under its own name, its answers combined as
the file says (:mod:`softprompts.evaluation.ensemble`): ``average`` writes one text, token by token, and can be streamed
as any other; of ``vote``, ``likeliest`` and ``rank`` the answer is known when all members are done.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

from softprompts.config import TaskConfig, TrainRecipe, decode
from softprompts.errors import ConfigError, PoolFullError, SoftPromptsError
from softprompts.evaluation.ensemble import combine
from softprompts.evaluation.predict import ranked_scores
from softprompts.inference import Output, PromptPool, ServingLimits
from softprompts.inference.folding import measured, not_served
from softprompts.models import FrozenLM
from softprompts.storage import LoadedPrompt
from softprompts.storage.ensemble import ENSEMBLE_FILE, load_ensemble
from softprompts.storage.library import PromptLibrary
from softprompts.tasks import get_task
from softprompts.tasks.encode import encode, encode_choices
from softprompts.types import Example, Prediction

__all__ = ["Ask", "Ensemble", "RankedChoices", "is_member", "load_ensembles"]

_log = logging.getLogger("softprompts.server")
_MARK = "#"
"""Stands in the names that members have in the pool, and in no name of a prompt."""
_ANY_LENGTH = 1 << 30
T = TypeVar("T")


class Ask(NamedTuple):
    """What the engine is asked for behind one input."""

    ids: tuple[int, ...]
    prompt: str | None = None
    averaged: tuple[str, ...] = ()
    forced_ids: tuple[int, ...] = ()
    """A choice that is measured: the output is given, and wanted is how likely it is."""


@dataclass(frozen=True)
class RankedChoices:
    """The choices of a task as tokens, and how they are compared (:class:`softprompts.evaluation.predict.Ranking`)."""

    tokens: tuple[tuple[int, ...], ...]
    by: Literal["sum", "mean", "prior"]
    empty_ids: tuple[int, ...] = ()
    """An input without text, for ``prior``."""


@dataclass(frozen=True)
class Ensemble:
    """Prompts that answer together."""

    name: str
    combine: str
    members: tuple[str, ...]
    """Their names in the pool; nobody else can ask for them."""
    task: str | None
    choices: tuple[str, ...] = ()
    """The legal answers; empty: every text is one."""
    ranked: RankedChoices | None = None
    """For ``rank``."""

    @property
    def whole(self) -> bool:
        """Whether nothing of the answer is known before all of it is."""
        return self.combine != "average"

    def rows(self, inputs: int) -> int:
        """Count what the engine computes for so many inputs: a row for every member, and for every choice ranked."""
        if self.ranked is None:
            return inputs * len(self.members)
        behind = inputs + (self.ranked.by == "prior")
        return behind * len(self.members) * len(self.ranked.tokens)

    def asks(self, inputs: Sequence[tuple[int, ...]]) -> list[Ask]:
        """Say what the engine is asked for: of each input what :meth:`combined` needs, side by side."""
        if self.combine == "average":
            return [Ask(ids, averaged=self.members) for ids in inputs]
        if self.ranked is None:
            return [Ask(ids, member) for ids, member in itertools.product(inputs, self.members)]
        behind = [*inputs, self.ranked.empty_ids] if self.ranked.by == "prior" else inputs
        return [
            Ask(ids, member, forced_ids=choice)
            for ids, member, choice in itertools.product(behind, self.members, self.ranked.tokens)
        ]

    def combined(self, outputs: Sequence[Output]) -> list[Output]:
        """One output per input.

        Args:
            outputs: Of :meth:`asks`, with log-probabilities.
        """
        if self.combine == "average":
            return list(outputs)
        if self.ranked is not None:
            return self._best_choices(self.ranked, outputs)
        return [self._one(group) for group in _split(outputs, len(self.members))]

    def _one(self, outputs: Sequence[Output]) -> Output:
        # Each answer carries its own number, by which the chosen one is found again.
        answers = [
            Prediction(
                Example("", "", choices=self.choices, id=str(number)),
                output.text,
                logprob=_logprob(output),
                finished=output.finish_reason == "stop",
                new_tokens=len(output.ids),
            )
            for number, output in enumerate(outputs)
        ]
        return outputs[int(combine(answers, self.combine).prediction.example.id)]

    def _best_choices(self, ranked: RankedChoices, outputs: Sequence[Output]) -> list[Output]:
        """Per input the choice that the members together find best."""
        of_member = _split([_logprob(output) for output in outputs], len(ranked.tokens))
        groups = list(_split(list(of_member), len(self.members)))
        priors: Sequence[Sequence[float]] = groups.pop() if ranked.by == "prior" else [()] * len(self.members)
        example = Example("", "", choices=self.choices)
        found = []
        for group in groups:
            answers = [
                Prediction(example, "", choice_scores=ranked_scores(sums, ranked.tokens, ranked.by, alone))
                for sums, alone in zip(group, priors, strict=True)
            ]
            text = combine(answers, "rank").prediction.text
            place = self.choices.index(text)
            found.append(replace(outputs[place], text=text, logprobs=(), finish_reason="stop"))
        return found


def _split(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _logprob(output: Output) -> float:
    return math.fsum(token.logprob for token in output.logprobs)


def is_member(name: str) -> bool:
    """Whether a name of the pool is that of an ensemble's member."""
    return _MARK in name


def load_ensembles(
    library: PromptLibrary, frozen: FrozenLM, pool: PromptPool, limits: ServingLimits
) -> dict[str, Ensemble]:
    """Find the ensembles of a folder and bring their members into the pool.

    Those that are damaged, of another model, or that could never be answered are left out, with a line in the log.

    Args:
        library: The folder; ``name`` and ``task/name`` are looked at.
        frozen: The model.
        pool: Gets the members; those that are averaged are needed all at once and stay in memory.
        limits: Of the engine.
    """
    found = {}
    taken = largest = 0
    for pattern in ("*", "*/*"):
        for path in sorted(library.root.glob(f"{pattern}/{ENSEMBLE_FILE}")):
            name = path.parent.relative_to(library.root).as_posix()
            try:
                info, members = load_ensemble(library.path(name), frozen)
                names = tuple(f"{name}{_MARK}{number}" for number in range(len(members)))
                choices, by, empty_ids, tokens = _choices_of(members[0], frozen)
                if info.combine == "rank" and not choices:
                    raise ConfigError("its members' task has no choices that could be ranked")
                ranked = RankedChoices(tokens, by, empty_ids) if info.combine == "rank" else None
                ensemble = Ensemble(name, info.combine, names, info.task, choices, ranked)
                _check_members(members, frozen)
                _check_rows(ensemble, limits)
                sizes = [_bytes_of(member, frozen) for member in members] if info.combine == "average" else []
                _check_room(sum(sizes), taken, pool)
            except SoftPromptsError as error:
                _log.warning("an ensemble is left out", extra={"fields": {"ensemble": name, "reason": str(error)}})
                continue
            for own, member in zip(names, members, strict=True):
                pool.add(own, member.prompt, pinned=info.combine == "average")
            found[name] = ensemble
            taken, largest = taken + sum(sizes), max([largest, *sizes])
    if pool.budget_bytes - taken < largest:
        _log.warning(
            "averaged ensembles leave hardly any memory for other prompts; raise --prompts-mib",
            extra={"fields": {"ensembles_bytes": taken, "all_prompts_bytes": pool.budget_bytes}},
        )
    return found


def _choices_of(
    member: LoadedPrompt, frozen: FrozenLM
) -> tuple[tuple[str, ...], Literal["sum", "mean", "prior"], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The task's choices, how they are compared, an input without text, and the choices' tokens.

    Raises:
        SoftPromptsError: It is on record what the member was trained on, and that makes no sense here.
    """
    origin, recipe = member.info.origin, TrainRecipe()
    if origin.recipe is not None:
        recipe = decode(TrainRecipe, origin.recipe)
    elif origin.task is not None:
        recipe = replace(recipe, task=TaskConfig(name=origin.task))
    if recipe.task == TaskConfig():  # nothing is on record
        return (), "sum", (), ()
    task, by = get_task(recipe.task), recipe.evaluation.ranking
    if not task.choices:
        return (), by, (), ()
    example = Example("", "", choices=task.choices)
    bos_ids, end_ids = frozen.bos_ids, frozen.end_ids
    (tokens,) = encode_choices(
        [example], task.format, frozen.tokenize, eos_id=frozen.eos_id, bos_ids=bos_ids, end_ids=end_ids
    )
    empty_ids: tuple[int, ...] = ()
    if by == "prior":
        empty_ids = encode(
            example,
            task.format,
            frozen.tokenize,
            eos_id=frozen.eos_id,
            max_length=_ANY_LENGTH,
            with_target=False,
            bos_ids=bos_ids,
            end_ids=end_ids,
        ).ids
    return task.choices, by, empty_ids, tokens


def _check_members(members: Sequence[LoadedPrompt], frozen: FrozenLM) -> None:
    """Refuse members that no served text can have in front of it."""
    for number, member in enumerate(members):
        if member.info.placement == "infix":
            raise not_served(f"member {number}")
        frozen.check_kind(member.info.kind)


def _check_rows(ensemble: Ensemble, limits: ServingLimits) -> None:
    """Refuse an ensemble of which not even one input could be computed."""
    if ensemble.combine == "average" and len(ensemble.members) > limits.max_rows:
        raise ConfigError(
            f"its {len(ensemble.members)} members are computed at once, but at most {limits.max_rows} rows are; "
            "raise --max-rows"
        )
    rows = ensemble.rows(1)
    if rows > limits.most_rows:
        raise ConfigError(
            f"one input takes {rows} rows, but at most {limits.most_rows} may run and wait; raise --max-waiting"
        )


def _bytes_of(member: LoadedPrompt, frozen: FrozenLM) -> int:
    return measured(frozen, member.info.kind, member.info.length, member.info.width).size_bytes


def _check_room(wanted: int, taken: int, pool: PromptPool) -> None:
    """Refuse members that are not there all at once, beside those of the ensembles before."""
    if wanted + taken > pool.budget_bytes:
        beside = f" beside the {taken} of other averaged ensembles" if taken else ""
        raise PoolFullError(
            f"its members take {wanted} bytes in memory{beside}, more than all prompts together may "
            f"({pool.budget_bytes}); raise --prompts-mib"
        )
