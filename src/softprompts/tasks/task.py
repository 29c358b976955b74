"""A task: where its records are, how they become text, and how answers are judged. The catalog holds the known ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from softprompts.config import DecodingConfig, SettingConfig, TaskConfig
from softprompts.errors import ConfigError, DataError, DataNotFoundError, nearest
from softprompts.registry import Registry
from softprompts.tasks.formats import Format, TextFormat, parse_separator, text_field
from softprompts.tasks.settings import CATEGORY, cut, in_categories, low_data, resolve, with_label_words
from softprompts.tasks.sources import PlacedRecord, data_root, iter_records
from softprompts.types import UNLABELLED, Example

__all__ = ["SPLITS", "TASKS", "Source", "Task", "register"]

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Source:
    """Where the splits of a task are. For each split the first of the three that has it is taken."""

    packaged: Mapping[str, str] = field(default_factory=dict)
    """Split -> path of a file that comes with this package."""
    local: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Split -> path below the data folder (environment variable ``SOFTPROMPTS_DATA``), or several that are joined."""
    hub: Mapping[str, str] = field(default_factory=dict)
    """Split -> ``datasets:OWNER/NAME?...`` on the Hugging Face hub."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Split -> share, for data published in one piece: splits in the same place are cut from it, always alike."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are known here, in the order train, dev, test."""
        return tuple(s for s in SPLITS if s in self.packaged or s in self.local or s in self.hub)

    def locate(self, split: str) -> tuple[str, ...]:
        """Return the source strings of a split, nearly always one.

        Raises:
            DataNotFoundError: The split is neither packaged nor in the data folder, and the hub does not have it.
        """
        if split in self.packaged:
            return (self.packaged[split],)
        root = data_root()
        named = self.local.get(split, ())
        paths = [root / name for name in ((named,) if isinstance(named, str) else named)] if root is not None else []
        missing = next((path for path in paths if not path.exists()), None)
        if paths and missing is None:
            return tuple(map(str, paths))
        if split in self.hub:
            return (self.hub[split],)
        reason = f"'{missing}' does not exist" if missing else "SOFTPROMPTS_DATA is not set or has no such split"
        raise DataNotFoundError(f"split '{split}' cannot be found: {reason}; set SOFTPROMPTS_DATA or task.{split}=FILE")

    def is_at_hand(self, split: str) -> bool:
        """Whether a split lies on this machine, in files."""
        try:
            places = self.locate(split)
        except DataNotFoundError:
            return False
        return all(Path(place).expanduser().exists() for place in places)

    def records(self, split: str) -> Iterator[PlacedRecord]:
        """Yield the records of a split, cut from the whole where several splits are in one place."""
        places = self.locate(split)
        found = (placed for place in places for placed in iter_records(place, split))
        if split in self.packaged:
            return found
        own = replace(self, packaged={})  # a file given for train does not change what dev is cut from
        together = {other: share for other, share in self.shares.items() if own.locate(other) == places}
        return iter(cut(list(found), together, split)) if len(together) > 1 else found


@dataclass(frozen=True)
class Task:
    """One benchmark, or a user's own records. See ``docs/how-to/add-a-task.md``.

    What metrics find in an example, where a score is more than a comparison of texts:

    * ``choices`` are the label words in the order of the label ids, by which a domain shift maps them.
    * ``metadata["group"]``: examples that are judged as one (MultiRC: the question that an answer belongs to).
    * ``references`` are all acceptable texts. Of WSC they are the label, ``True`` or ``False``, and the phrase it is
      about: a prediction names a phrase, and the label says whether it should be that one.
    * ``metadata["category"]``: what ``task.setting`` selects by (:mod:`softprompts.tasks.settings`).
    """

    name: str
    description: str
    format: Format
    source: Source = field(default_factory=Source)
    metrics: tuple[str, ...] = ("exact_match",)
    selection: str = "loss"
    """What picks the best checkpoint: one of ``metrics``, or ``loss`` on the dev split."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    choices: tuple[str, ...] = ()
    """The legal answers of a classification task, by label id; an example may bring its own."""
    prompt_words: tuple[str, ...] = ()
    """Words that a prompt starts from where there are no choices (prompt-tuning paper, footnote 7)."""
    merge_inputs: bool = False
    """Outside training, make one example of all records with the same input; their references are collected."""
    settings: Mapping[str, SettingConfig] = field(default_factory=dict)
    """Settings of the papers that ``task.setting.name`` may ask for."""
    configure: Callable[[Task, TaskConfig], Task] | None = None
    """For tasks whose format depends on the recipe (templates): called by :meth:`configured`."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that :meth:`load` can be asked for, in the order train, dev, test."""
        return self.source.splits

    @property
    def class_words(self) -> tuple[str, ...]:
        """What the initializer ``labels`` starts from: the choices, or the words that stand for them."""
        return self.choices or self.prompt_words

    def configured(self, config: TaskConfig) -> Task:
        """Return the task as a recipe wants it: its sources, templates and marks. Doing it twice changes nothing.

        Raises:
            ConfigError: The recipe sets a template for a task that has its own format.
        """
        task = self
        if self.configure is not None:
            task = self.configure(self, config)
        elif config.format is not None or config.target is not None:
            raise ConfigError(
                f"task '{self.name}' has its own input format; task.format and task.target are for the task 'records'"
            )
        if config.separator is not None:
            if not isinstance(task.format, TextFormat):
                raise ConfigError(f"task '{self.name}' has a fixed separator; leave task.separator out")
            task = replace(task, format=task.format.with_separator(parse_separator(config.separator)))
        if config.setting.target_prefix is not None:
            if not isinstance(task.format, TextFormat):
                raise ConfigError(f"task '{self.name}' has a fixed layout; leave task.setting.target_prefix out")
            task = replace(task, format=task.format.with_target_prefix(config.setting.target_prefix))
        own = {"train": config.train, "dev": config.dev, "test": config.test}
        given = {split: place for split, place in own.items() if place is not None}
        return replace(task, source=replace(task.source, packaged={**task.source.packaged, **given})) if given else task

    def load(self, split: str, config: TaskConfig | None = None) -> list[Example]:
        """Read a split, or the part of it that ``config.setting`` says.

        Training has one example per (input, reference); the other splits have one per record (per input with
        ``merge_inputs``) with all its references. A limit takes a seeded random sample, in the order of the
        file; a smaller limit takes a subset of a larger one's.

        Raises:
            DataNotFoundError: The split or its file does not exist.
            DataError: A record is wrong (the message names file, line and field), or there is none.
            ConfigError: The recipe does not fit the task.
        """
        config = config or TaskConfig(name=self.name)
        task = self.configured(config)
        if split not in SPLITS:
            raise ConfigError(f"unknown split '{split}': {nearest(split, SPLITS)}")
        setting = resolve(config.setting, task.settings)
        if split == "test" and setting.judge_task is not None:
            return task._judged_elsewhere(setting, setting.judge_task, config)
        if split not in task.source.splits:
            has = ", ".join(task.source.splits) or "none"
            raise DataNotFoundError(f"task '{self.name}' has no '{split}' split (it has: {has}); set task.{split}=FILE")
        examples = list(task._examples(split, setting.by))
        if not examples:
            place = "', '".join(task.source.locate(split))
            raise DataError(f"'{place}' holds no records; expected at least one for the {split} split of '{self.name}'")
        examples = in_categories(examples, setting, split)
        if task.merge_inputs and split != "train":
            examples = _merge(examples)
        examples = low_data(examples, setting, split)
        limit = {"train": config.limit_train, "dev": config.limit_dev, "test": config.limit_dev}[split]
        return _sample(examples, limit, f"limit_{'train' if split == 'train' else 'dev'}")

    def _judged_elsewhere(self, setting: SettingConfig, name: str, config: TaskConfig) -> list[Example]:
        """Another task's split in the words of this one; ``task.test`` then is a file of that task."""
        place = {"dev": None, "test": None, setting.judge_split: config.test}
        other = TaskConfig(name=name, dev=place["dev"], test=place["test"], limit_dev=config.limit_dev)
        task = TASKS.get(name)
        return with_label_words(task.load(setting.judge_split, other), task.choices, self.choices)

    def _examples(self, split: str, category_field: str | None) -> Iterator[Example]:
        for number, (place, record) in enumerate(self.source.records(split)):
            try:
                found = self.format.read(record, split)
                distinct = len({example.id for example in found}) == len(found)
                for part, example in enumerate(found):
                    suffix = "" if distinct else f"-{part}"
                    identity = f"{example.id or f'{self.name}-{split}-{number}'}{suffix}"
                    example = replace(example, id=identity, choices=example.choices or self.choices)
                    if category_field is not None:
                        category = {CATEGORY: text_field(record, category_field)}
                        example = replace(example, metadata={**example.metadata, **category})
                    yield from _rows(example, split)
            except DataError as error:
                raise DataError(f"{place}: {error}") from error


def _rows(example: Example, split: str) -> Iterator[Example]:
    if not example.target.strip() or not all(reference.strip() for reference in example.references):
        raise DataError(f"the target of record '{example.id}' is empty; every record needs an answer (or remove it)")
    legal = (*example.choices, UNLABELLED) if split == "test" else example.choices
    if example.choices and example.target not in legal:
        raise DataError(
            f"the target of record '{example.id}' is no legal answer: {nearest(example.target, example.choices)}"
        )
    if split != "train":
        yield example
        return
    for number, target in enumerate(example.all_references):
        suffix = f"-{number}" if len(example.references) > 1 else ""
        yield replace(example, target=target, references=(), id=f"{example.id}{suffix}")


def _merge(examples: list[Example]) -> list[Example]:
    merged: dict[str, Example] = {}
    for example in examples:
        first = merged.setdefault(example.input, example)
        if first is not example:
            merged[example.input] = replace(first, references=first.all_references + example.all_references)
    return list(merged.values())


def _sample(examples: list[Example], limit: int | None, name: str) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    if limit < 1:
        raise ConfigError(f"task.{name} is {limit}, expected at least 1 (or leave it out for all records)")
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    return [examples[index] for index in sorted(order[:limit])]


TASKS: Registry[Task] = Registry("task")


def register(task: Task) -> Task:
    """Enter a task into the catalog under its own name and return it."""
    return TASKS.register(task.name)(task)
