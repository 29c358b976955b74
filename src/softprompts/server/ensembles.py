"""Ensembles as models: every member answers in the same batch, and the answers become one.

A folder with ``ensemble.json`` in the server's folder of prompts is served under its own name where its answers are
combined by ``vote`` or ``likeliest`` (:mod:`softprompts.evaluation.ensemble`). Other ways need the task's choices, or
one text that all members write together; those are answered by ``softprompts ensemble predict``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from softprompts.errors import SoftPromptsError
from softprompts.evaluation.ensemble import combine
from softprompts.inference import Output, PromptPool
from softprompts.models import FrozenLM
from softprompts.storage.ensemble import ENSEMBLE_FILE, load_ensemble
from softprompts.storage.library import PromptLibrary
from softprompts.types import Example, Prediction

__all__ = ["Ensemble", "is_member", "load_ensembles"]

_log = logging.getLogger("softprompts.server")
_SERVED = ("vote", "likeliest")
_MARK = "#"
"""Stands in the names that members have in the pool, and in no name of a prompt."""


@dataclass(frozen=True)
class Ensemble:
    """Prompts that answer together."""

    name: str
    combine: str
    members: tuple[str, ...]
    """Their names in the pool; nobody else can ask for them."""
    task: str | None

    def combined(self, outputs: Sequence[Output]) -> list[Output]:
        """One output per input.

        Args:
            outputs: Of all members, with log-probabilities; those of an input side by side.
        """
        count = len(self.members)
        groups = [outputs[start : start + count] for start in range(0, len(outputs), count)]
        return [self._one(group) for group in groups]

    def _one(self, outputs: Sequence[Output]) -> Output:
        # Each answer carries its own number, by which the chosen one is found again.
        answers = [
            Prediction(
                Example("", "", id=str(number)),
                output.text,
                logprob=math.fsum(token.logprob for token in output.logprobs),
                finished=output.finish_reason == "stop",
                new_tokens=len(output.ids),
            )
            for number, output in enumerate(outputs)
        ]
        return outputs[int(combine(answers, self.combine).prediction.example.id)]


def is_member(name: str) -> bool:
    """Whether a name of the pool is that of an ensemble's member."""
    return _MARK in name


def load_ensembles(library: PromptLibrary, frozen: FrozenLM, pool: PromptPool) -> dict[str, Ensemble]:
    """Find the ensembles of a folder and bring their members into the pool.

    Args:
        library: The folder; ``name`` and ``task/name`` are looked at.
        frozen: The model; ensembles of another one are left out, with a line in the log, as are damaged ones.
        pool: Gets the members.
    """
    found = {}
    for pattern in ("*", "*/*"):
        for path in sorted(library.root.glob(f"{pattern}/{ENSEMBLE_FILE}")):
            name = path.parent.relative_to(library.root).as_posix()
            try:
                info, members = load_ensemble(library.path(name), frozen)
            except SoftPromptsError as error:
                _log.warning("an ensemble is left out", extra={"fields": {"ensemble": name, "reason": str(error)}})
                continue
            if info.combine not in _SERVED:
                reason = f"its answers are combined by {info.combine}, which is not served"
                _log.warning("an ensemble is left out", extra={"fields": {"ensemble": name, "reason": reason}})
                continue
            names = tuple(f"{name}{_MARK}{number}" for number in range(len(members)))
            for own, member in zip(names, members, strict=True):
                pool.add(own, member.prompt)
            found[name] = Ensemble(name, info.combine, names, info.task)
    return found
