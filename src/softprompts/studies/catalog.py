"""Which studies there are, and what one comes down to: settings, cells, and the recipe of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import yaml

from softprompts.config import TrainRecipe, decode, replaced
from softprompts.config.merging import merged, nested
from softprompts.errors import ConfigError, nearest
from softprompts.studies.definition import Choice, Scale, Study, Uncovered

__all__ = [
    "Cell",
    "Plan",
    "ScaleName",
    "Setting",
    "get_study",
    "make_plan",
    "plan_from",
    "recipe_of",
    "studies",
    "uncovered",
]

ScaleName = Literal["tiny", "paper"]

_FOLDER, _BASES = "definitions", "_bases"


@dataclass(frozen=True)
class Setting:
    """A series at a point."""

    series: str
    point: str
    x: float | None
    set: Mapping[str, Any]
    start: str | None = None
    members: int | None = None
    transfer: Mapping[str, Any] | None = None
    own: str | None = None
    parameters: float | None = None

    @property
    def name(self) -> str:
        """As claims call it."""
        return f"{self.series}/{self.point}"


@dataclass(frozen=True)
class Cell:
    """A setting on a task with a seed: what is run and resumed as one piece."""

    setting: Setting
    task: Choice
    seed: int

    @property
    def lot(self) -> str:
        """Name of the folder that it shares with its other seeds."""
        return _slug("--".join(part for part in (self.setting.series, self.setting.point, self.task.name) if part))

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.lot}--seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A study at a scale, with what the command line changes."""

    study: Study
    scale_name: ScaleName
    scale: Scale
    settings: tuple[Setting, ...] = field(default=())

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All of them, seeds of one setting side by side, those that others start from first."""
        started = {name for setting in self.settings for name in (setting.start, setting.own) if name is not None}
        ordered = sorted(self.settings, key=lambda setting: setting.name not in started)
        return tuple(
            Cell(setting, task, seed) for setting in ordered for task in self.scale.tasks for seed in self.scale.seeds
        )

    def lots(self) -> dict[str, tuple[Cell, ...]]:
        """Cells by the folder that they share."""
        found: dict[str, tuple[Cell, ...]] = {}
        for cell in self.cells:
            found[cell.lot] = (*found.get(cell.lot, ()), cell)
        return found

    def setting(self, name: str) -> Setting:
        """Look one up.

        Raises:
            ConfigError: There is none of that name.
        """
        known = {setting.name: setting for setting in self.settings}
        if name not in known:
            raise ConfigError(f"study '{self.study.name}' has no setting '{name}': {nearest(name, known)}")
        return known[name]


def studies() -> tuple[str, ...]:
    """Names of all studies, in alphabetical order."""
    folder = files("softprompts.studies") / _FOLDER
    names = [item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")]
    return tuple(sorted(name for name in names if not name.startswith("_")))


@cache
def get_study(name: str) -> Study:
    """Read a study.

    Raises:
        ConfigError: There is none of that name; the nearest one is named.
    """
    if name not in studies():
        raise ConfigError(f"unknown study '{name}': {nearest(name, studies())}")
    content = _read(name)
    for scale in get_args(ScaleName):
        own = dict(content[scale])
        content[scale] = merged(_read(_BASES)[own.pop("base")], own) if "base" in own else own
    return decode(Study, content)


def uncovered() -> tuple[Uncovered, ...]:
    """Claims of the papers that no study tests."""
    text = (files("softprompts.studies") / _FOLDER / "_uncovered.yaml").read_text(encoding="utf-8")
    return tuple(decode(Uncovered, one) for one in yaml.safe_load(text))


def _read(name: str) -> dict[str, Any]:
    text = (files("softprompts.studies") / _FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def make_plan(
    study: Study,
    scale_name: ScaleName,
    *,
    model: str | None = None,
    seeds: Sequence[int] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Plan:
    """Multiply a study out.

    Args:
        study: What is studied.
        scale_name: At which size.
        model: Another frozen model than the scale's.
        seeds: Others than the scale's.
        changes: Recipe values by dotted key that go over those of all cells, below those that make a setting.

    Raises:
        ConfigError: All settings name models of their own, so that ``model`` would change nothing; or a seed is given
            twice.
    """
    scale: Scale = getattr(study, scale_name)
    if seeds is not None:
        if not seeds or len(set(seeds)) != len(seeds):
            raise ConfigError(f"the seeds are {list(seeds)}, expected at least one, and each once")
        scale = replace(scale, seeds=tuple(seeds))
    values = dict(changes or {})
    settings = _settings(scale)
    if model is not None:
        if all("model.name_or_path" in setting.set for setting in settings):
            raise ConfigError(f"study '{study.name}' compares models, so --model would change nothing; leave it out")
        values["model.name_or_path"] = model
    if values:
        scale = replace(scale, recipe=merged(scale.recipe, nested(values)))
    return Plan(study, scale_name, scale, settings)


def plan_from(content: Mapping[str, Any]) -> Plan:
    """Read a plan back from the ``study.json`` of a folder."""
    scale = decode(Scale, content["plan"])
    return Plan(decode(Study, content["study"]), content["scale"], scale, _settings(scale))


def _settings(scale: Scale) -> tuple[Setting, ...]:
    pairs = ((series, point) for series in scale.series for point in scale.points)
    return tuple(_setting(*pair) for pair in pairs if f"{pair[0].name}/{pair[1].name}" not in scale.skip)


def _setting(series: Choice, point: Choice) -> Setting:
    """Put a point on its series; what the point says goes over what the series says."""

    def either(name: str) -> Any:
        own = getattr(point, name)
        return getattr(series, name) if own is None else own

    return Setting(
        series=series.name,
        point=point.name,
        x=point.x,
        set={**series.set, **point.set},
        start=either("start"),
        members=either("members"),
        transfer=either("transfer"),
        own=either("own"),
        parameters=either("parameters"),
    )


def recipe_of(plan: Plan, cell: Cell, output_dir: str, start: str | None = None) -> TrainRecipe:
    """Write the recipe of one cell.

    Args:
        plan: The study.
        cell: One of its cells.
        output_dir: Where the run goes.
        start: Directory of the prompt that it starts from, where its setting names one.

    Raises:
        ConfigError: A key is unknown or a value has the wrong type.
    """
    own = {**cell.setting.set, **cell.task.set}
    values = {key: _with_seed(value, cell.seed) for key, value in own.items()}
    if "preset" in plan.scale.recipe:  # its cases look at the values of the setting too
        recipe = decode(TrainRecipe, merged(plan.scale.recipe, nested(values)))
    else:
        recipe = replaced(decode(TrainRecipe, plan.scale.recipe), values)
    more: dict[str, Any] = {"training.seed": cell.seed, "output_dir": output_dir}
    if start is not None and cell.setting.transfer is None:
        more |= {"prompt.initializer.name": "prompt", "prompt.initializer.prompt": start}
    return replaced(recipe, more)


def _with_seed(value: Any, seed: int) -> Any:
    return seed if value == "{seed}" else value


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-")
