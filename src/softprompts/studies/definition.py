"""What a study is: settings, what is judged, what was published, and the claims that it tests.

A study is a YAML file in ``definitions``, decoded into these dataclasses. Its settings are all pairs of a *series* and
a *point* (a line of a plot, and a place on it); each setting is run on every *task* with every seed, which makes the
cells. Everything that a cell does is a recipe value, so a method or a prompt that a recipe can name needs no code here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Check", "Choice", "Claim", "Cost", "Judge", "Plot", "Published", "Scale", "Study", "Uncovered"]


@dataclass(frozen=True)
class Choice:
    """One series, one point or one task: its name, and the recipe values that make it."""

    name: str
    x: float | None = None
    """Where a point stands on the axis; ``None`` puts points side by side."""
    set: Mapping[str, Any] = field(default_factory=dict)
    """Recipe values by dotted key; ``{seed}`` stands for the seed. Points go over series, tasks over points."""
    start: str | None = None
    """A setting (``series/point``) whose prompt, of the same seed, this one starts from or is made of."""
    members: int | None = None
    """Train so many prompts, and judge the ensemble of them."""
    transfer: Mapping[str, Any] | None = None
    """Do not train: transfer the prompt of ``start`` to this setting's model; values of a transfer recipe."""
    own: str | None = None
    """For a transfer: the setting whose prompt is the target model's own, which recovery is measured against."""
    parameters: float | None = None
    """Of the model, for the prediction of costs, where it is another than the scale's."""


@dataclass(frozen=True)
class Judge:
    """One way to judge what was trained."""

    name: str = ""
    """Goes before the names of its metrics, ``unseen/bleu``; empty for none."""
    split: Literal["train", "dev", "test"] = "test"
    set: Mapping[str, Any] = field(default_factory=dict)
    """Recipe values that differ from those of the training."""


@dataclass(frozen=True)
class Cost:
    """What predicts how long a cell takes."""

    parameters: float
    """Of the model."""
    tokens: float
    """Of a training row, on average."""
    records: float = 0
    """Judged, all ways of judging together."""
    new_tokens: float = 0
    """Generated per judged record."""


@dataclass(frozen=True)
class Scale:
    """A study at one size."""

    recipe: Mapping[str, Any]
    """What all cells share: a recipe without output_dir, in sections."""
    series: tuple[Choice, ...]
    points: tuple[Choice, ...]
    metrics: tuple[str, ...]
    """What is reported; the first one is what claims are about unless they say otherwise."""
    cost: Cost
    tasks: tuple[Choice, ...] = (Choice(""),)
    """Where there are several, a setting's value is the mean over them."""
    skip: tuple[str, ...] = ()
    """Settings (``series/point``) that are left out."""
    judges: tuple[Judge, ...] = (Judge(),)
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Check:
    """One comparison of settings: the mean of some against the mean of others."""

    better: tuple[str, ...]
    """Settings, each ``series/point`` or ``series/point:metric``."""
    than: tuple[str, ...]
    metric: str | None = None
    """For settings that name none; ``None`` takes the scale's first metric."""
    within: float | None = None
    """Instead of better: equal up to so much of the metric's unit."""


@dataclass(frozen=True)
class Claim:
    """What a paper says, and how that is tested."""

    text: str
    source: str
    """Paper, section, table or figure."""
    checks: tuple[Check, ...]
    """All of them have to hold."""
    published: str = ""
    """The paper's evidence in words and numbers."""
    tiny: tuple[Check, ...] = ()
    """What is checked at the scale ``tiny``, where its settings are others; empty takes ``checks``."""

    def at(self, scale: str) -> tuple[Check, ...]:
        """Return what is checked at a scale."""
        return self.tiny if scale == "tiny" and self.tiny else self.checks


@dataclass(frozen=True)
class Uncovered:
    """A claim that no study tests."""

    text: str
    source: str
    why: str


@dataclass(frozen=True)
class Published:
    """A number of the paper, beside a setting of ours."""

    setting: str
    """``series/point``."""
    metric: str
    """As the paper calls it."""
    value: float
    what: str = ""
    """Model and data that it belongs to."""


@dataclass(frozen=True)
class Plot:
    """How the result is drawn."""

    kind: Literal["line", "bars", "curve", "scatter"]
    """``line``: points on an axis; ``bars``: a group per point; ``curve``: validations over steps and over seconds;
    ``scatter``: every setting by its stored parameters."""
    axis: str = ""
    """What the points are."""
    log: bool = False
    like: str = ""
    """The paper's figure with this layout."""


@dataclass(frozen=True)
class Study:
    """One ablation."""

    name: str
    title: str
    question: str
    """In plain words."""
    claims: tuple[Claim, ...]
    plot: Plot
    tiny: Scale
    paper: Scale
    published: tuple[Published, ...] = ()
