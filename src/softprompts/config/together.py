"""Recipes of prompts that are trained together: one recipe, and the keys in which each prompt differs from it."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from softprompts.config.merging import flat
from softprompts.config.reading import parse_override, replaced
from softprompts.config.schema import TrainRecipe
from softprompts.errors import ConfigError

__all__ = ["member_recipes", "varied"]

_SHARED = {
    "model": "the prompts share one frozen model",
    "method": "only prompts can share a model",
    "output_dir": "each prompt has a folder of its own below the recipe's; give it a name",
    "together": "a list inside of the list means nothing",
    "training.rows_per_pass": "a forward pass belongs to all prompts",
}
"""Keys that are the same for all prompts, and why."""


def member_recipes(recipe: TrainRecipe) -> dict[str, TrainRecipe]:
    """Write the recipe of every prompt as if it were trained alone.

    Args:
        recipe: With ``together``.

    Returns:
        By name; each one's ``output_dir`` is the folder of that name below the recipe's.

    Raises:
        ConfigError: A key cannot differ or is unknown, a value has the wrong type, two prompts have the same name, or
            the recipe is one of fine-tuning.
    """
    if recipe.method != "prompt":
        raise ConfigError(
            f"method '{recipe.method}' trains a whole model, and every run would need a copy of its own; 'together' is "
            "for prompts: set method=prompt, or train one after the other"
        )
    shared = dataclasses.replace(recipe, together=())
    changes_of = [flat(changes) for changes in recipe.together]
    keys = list(dict.fromkeys(key for changes in changes_of for key in changes if key != "name"))
    members: dict[str, TrainRecipe] = {}
    for number, changes in enumerate(changes_of):
        values = {key: value for key, value in changes.items() if key != "name"}
        _refuse_shared(values, f"together[{number}]")
        name = str(changes["name"]) if "name" in changes else _name(values, keys)
        if not re.fullmatch(r"[\w+][\w.+-]*", name):
            raise ConfigError(
                f"together[{number}] is called '{name}', expected letters, digits, '.', '_', '+' and '-': it becomes a "
                "folder; give it another name"
            )
        if name in members:
            raise ConfigError(f"together[{number}] is called '{name}' like one before it; give one of them a name")
        try:
            member = replaced(shared, values)
        except ConfigError as error:
            raise ConfigError(f"together[{number}] ('{name}'): {error}") from error
        members[name] = dataclasses.replace(member, output_dir=f"{recipe.output_dir}/{name}")
    return members


def varied(recipe: TrainRecipe, seeds: str | None = None, vary: Sequence[str] = ()) -> TrainRecipe:
    """Multiply a recipe: every combination of some values, each a prompt of ``together``.

    Args:
        recipe: With or without ``together``; every prompt that is there already is multiplied.
        seeds: ``"0,1,2"``, values of ``training.seed``.
        vary: ``"a.b=v1,v2"`` strings; the values are the entries of a YAML list.

    Raises:
        ConfigError: A string is not of that form, or names a key twice.
    """
    axes: list[tuple[str, list[Any]]] = []
    for text in [*vary, *([f"training.seed={seeds}"] if seeds is not None else [])]:
        key, _, words = text.partition("=")
        names, _ = parse_override(f"{key}=0" if "=" in text else text)
        listed = words if words.strip().startswith("[") else f"[{words}]"
        try:
            values = yaml.safe_load(listed)
        except yaml.YAMLError as error:
            raise ConfigError(f"the values of '{text}' are no list in YAML: {error}") from error
        if not values:
            raise ConfigError(f"'{text}' names no value; expected some with commas between them, {key}=1,2")
        axes.append((".".join(names), values))
    given = [key for key, _ in axes]
    twice = next((key for key in given if given.count(key) > 1), None)
    if twice is not None:
        raise ConfigError(f"'{twice}' is varied twice; give all of its values at once")
    if not axes:
        return recipe
    return dataclasses.replace(recipe, together=tuple(_combinations(recipe.together or ({},), axes)))


def _combinations(
    members: Sequence[Mapping[str, Any]], axes: Sequence[tuple[str, list[Any]]]
) -> Iterator[dict[str, Any]]:
    keys = [key for key, _ in axes]
    for member in members:
        for combination in itertools.product(*(values for _, values in axes)):
            values = dict(zip(keys, combination, strict=True))
            named = {"name": f"{member['name']}_{_name(values, keys)}"} if "name" in member else {}
            yield {**member, **values, **named}


def _refuse_shared(values: Mapping[str, Any], place: str) -> None:
    for key in values:
        for shared, reason in _SHARED.items():
            if key == shared or key.startswith(f"{shared}."):
                raise ConfigError(f"'{key}' cannot differ ({place}): {reason}")


def _name(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Name a prompt by what differs: ``seed-1_length-20``."""
    leaves = [_leaf(key) for key in keys]
    parts = []
    for key, value in values.items():
        word = _leaf(key) if leaves.count(_leaf(key)) == 1 else key
        parts.append(re.sub(r"[^\w.+-]+", "-", f"{word}-{value}"))
    return "_".join(parts) or "base"


def _leaf(key: str) -> str:
    """Last word of a key; of ``task.name`` the word in front, which says more."""
    words = key.split(".")
    return words[-2] if words[-1] == "name" and len(words) > 1 else words[-1]
