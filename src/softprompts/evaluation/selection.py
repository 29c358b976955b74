"""Which metrics can be averaged to pick the best checkpoint: "mean if several" (Lester et al. 2021, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

from softprompts.errors import ConfigError
from softprompts.evaluation.scorers import METRICS

__all__ = ["averageable"]


def averageable(names: Sequence[str]) -> tuple[str, ...]:
    """Return metrics whose plain mean says how good a system is: percentages of which more is better.

    Raises:
        ConfigError: There is none, one is unknown, or one has another scale or direction.
    """
    if not names:
        raise ConfigError("the mean of no metric was asked for; name some in evaluation.metrics")
    for name in names:
        metric = METRICS.get(name)
        if metric.scale != "0-100" or not metric.higher_is_better:
            wrong = "is an error rate" if metric.scale == "0-100" else "has a scale of its own"
            raise ConfigError(
                f"the mean of {', '.join(names)} says nothing, because {name} {wrong}; expected percentages of which "
                "more is better: name them in evaluation.metrics, or set evaluation.selection to one metric or loss"
            )
    return tuple(names)
