"""Settings of an experiment as values: low data, extrapolation to unseen categories, domain shift.

A :class:`~softprompts.config.SettingConfig` says which part of a task is trained on and which is judged. Everything
here is a pure function of examples and such a value, so the recipe that a run keeps is all it takes to get the same
rows again. Sources: the low-data and extrapolation sections of Li & Liang 2021 (5 subsamples x 2 seeds, dev = 30 %
of train; train on seen categories, judge on unseen ones) and the domain-shift section of Lester et al. 2021.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import TypeVar

from softprompts.config import SettingConfig
from softprompts.errors import ConfigError, DataError, nearest
from softprompts.types import UNLABELLED, Example

__all__ = ["CATEGORY", "cut", "in_categories", "low_data", "resolve", "with_label_words"]

T = TypeVar("T")

CATEGORY = "category"
"""Key of an example's metadata that holds its category."""


def resolve(setting: SettingConfig, named: Mapping[str, SettingConfig]) -> SettingConfig:
    """Fill a setting that asks for one of a task's named ones; what it says itself goes before.

    Raises:
        ConfigError: The task names no such setting, or a number makes no sense.
    """
    if setting.low_data is not None and setting.low_data < 1:
        raise ConfigError(f"task.setting.low_data is {setting.low_data}, expected at least 1")
    if setting.dev_fraction <= 0:
        raise ConfigError(f"task.setting.dev_fraction is {setting.dev_fraction}, expected a share above 0")
    if setting.name is None:
        return setting
    if setting.name not in named:
        raise ConfigError(f"the task has no setting '{setting.name}': {nearest(setting.name, named)}")
    untouched = SettingConfig()
    own = {item.name: getattr(setting, item.name) for item in fields(setting)}
    return replace(
        named[setting.name], **{key: value for key, value in own.items() if value != getattr(untouched, key)}
    )


def in_categories(examples: Sequence[Example], setting: SettingConfig, split: str) -> list[Example]:
    """Keep the categories that a split is to have: those trained on for train and dev, those judged for test.

    Raises:
        DataError: An example has no category, or none is left.
    """
    if not setting.train_on and not setting.judge_on:
        return list(examples)
    kept = []
    for example in examples:
        category = example.metadata.get(CATEGORY)
        if not isinstance(category, str):
            raise DataError(
                f"record '{example.id}' has no category, which task.setting.train_on and judge_on need; name its field "
                f"with task.setting.by"
            )
        trained = _matches(category, setting.train_on)
        judged = (not setting.judge_on or _matches(category, setting.judge_on)) and not trained
        if judged if split == "test" else (trained or not setting.train_on):
            kept.append(example)
    if not kept:
        known = ", ".join(sorted({str(example.metadata[CATEGORY]) for example in examples}))
        raise DataError(
            f"no record of the {split} split is left by task.setting (train_on {list(setting.train_on)}, judge_on "
            f"{list(setting.judge_on)}); its categories: {known}"
        )
    return kept


def _matches(category: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(category, pattern) for pattern in patterns)


def low_data(examples: Sequence[Example], setting: SettingConfig, split: str) -> list[Example]:
    """Draw the rows of a low-data run, in the order of the file; a test split stays whole.

    A dev split that is smaller than its share is taken whole. Rows depend on ``subsample`` alone (not on the seed of
    the training), and those of 50 are among those of 100.

    Raises:
        ConfigError: There are fewer training rows than asked for.
    """
    if setting.low_data is None or split == "test":
        return list(examples)
    size = setting.low_data
    if split == "dev":
        size = min(max(1, round(size * setting.dev_fraction)), len(examples))
    if size > len(examples):
        raise ConfigError(f"task.setting.low_data is {size}, but the train split has {len(examples)} rows")
    return _drawn(examples, f"low data/{split}/{setting.subsample}", 0, size)


def cut(records: Sequence[T], shares: Mapping[str, float], split: str) -> list[T]:
    """Take one split of records that the data set publishes in one piece.

    Args:
        records: All of them.
        shares: Split -> share, in the order of the pieces; normalised to a sum of 1.
        split: Which one to take.
    """
    total = sum(shares.values())
    before = 0.0
    for name, share in shares.items():
        start, before = before, before + share
        if name == split:
            return _drawn(records, "cut", round(len(records) * start / total), round(len(records) * before / total))
    raise ConfigError(f"there is no share for split '{split}': {nearest(split, shares)}")


def _drawn(items: Sequence[T], seed: str, start: int, stop: int) -> list[T]:
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)  # a string is seeded by its SHA-512, the same everywhere
    return [items[index] for index in sorted(order[start:stop])]


def with_label_words(examples: Sequence[Example], theirs: Sequence[str], ours: Sequence[str]) -> list[Example]:
    """Say another task's labels in the words that were trained on, by position (``not_equivalent``: ``not_duplicate``).

    The official code maps predictions to the other task's words before they are scored; mapping the references back
    gives the same scores.

    Raises:
        ConfigError: The tasks have different numbers of labels.
    """
    if tuple(theirs) == tuple(ours) or not (theirs or ours):
        return list(examples)
    if len(theirs) != len(ours):
        raise ConfigError(
            f"task.setting.judge_task has the labels {list(theirs)}, but the task trained on has {list(ours)}; a "
            f"domain shift needs as many of them on both sides"
        )
    words = {**dict(zip(theirs, ours, strict=True)), UNLABELLED: UNLABELLED}
    return [
        replace(
            example,
            target=words[example.target],
            references=tuple(words[reference] for reference in example.references),
            choices=tuple(words[choice] for choice in example.choices),
        )
        for example in examples
    ]
