"""A task: where its records are, how they become text, and how answers are judged. The catalog holds the known ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from softprompts.config import DecodingConfig, TaskConfig
from softprompts.errors import ConfigError, DataError, DataNotFoundError, nearest
from softprompts.registry import Registry
from softprompts.tasks.formats import Format, TextFormat, parse_separator
from softprompts.tasks.sources import PlacedRecord, data_root, iter_records
from softprompts.types import Example

__all__ = ["SPLITS", "TASKS", "Source", "Task", "register"]

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Source:
    """Where the splits of a task are. For each split the first of the three that has it is taken."""

    packaged: Mapping[str, str] = field(default_factory=dict)
    """Split -> path of a file that comes with this package."""
    local: Mapping[str, str] = field(default_factory=dict)
    """Split -> path below the data folder (environment variable ``SOFTPROMPTS_DATA``)."""
    hub: Mapping[str, str] = field(default_factory=dict)
    """Split -> ``datasets:OWNER/NAME?...`` on the Hugging Face hub."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are known here, in the order train, dev, test."""
        return tuple(s for s in SPLITS if s in self.packaged or s in self.local or s in self.hub)

    def locate(self, split: str) -> str:
        """Return the source string of a split.

        Raises:
            DataNotFoundError: The split is neither packaged nor in the data folder, and the hub does not have it.
        """
        if split in self.packaged:
            return self.packaged[split]
        root = data_root()
        path = root / self.local[split] if root is not None and split in self.local else None
        if path is not None and path.exists():
            return str(path)
        if split in self.hub:
            return self.hub[split]
        missing = f"'{path}' does not exist" if path else "SOFTPROMPTS_DATA is not set or has no such split"
        raise DataNotFoundError(
            f"split '{split}' cannot be found: {missing}; set SOFTPROMPTS_DATA or task.{split}=FILE"
        )


@dataclass(frozen=True)
class Task:
    """One benchmark, or a user's own records. See ``docs/how-to/add-a-task.md``."""

    name: str
    description: str
    format: Format
    source: Source = field(default_factory=Source)
    metrics: tuple[str, ...] = ("exact_match",)
    selection: str = "loss"
    """What picks the best checkpoint: one of ``metrics``, or ``loss`` on the dev split."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    choices: tuple[str, ...] = ()
    """The legal answers of a classification task; an example may bring its own."""
    merge_inputs: bool = False
    """Outside training, make one example of all records with the same input; their references are collected."""
    configure: Callable[[Task, TaskConfig], Task] | None = None
    """For tasks whose format depends on the recipe (templates): called by :meth:`configured`."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that :meth:`load` can be asked for, in the order train, dev, test."""
        return self.source.splits

    def configured(self, config: TaskConfig) -> Task:
        """Return the task as a recipe wants it: its sources, templates and separator. Doing it twice changes nothing.

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
        own = {"train": config.train, "dev": config.dev, "test": config.test}
        given = {split: place for split, place in own.items() if place is not None}
        return replace(task, source=replace(task.source, packaged={**task.source.packaged, **given})) if given else task

    def load(self, split: str, config: TaskConfig | None = None) -> list[Example]:
        """Read a split.

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
        if split not in task.source.splits:
            has = ", ".join(task.source.splits) or "none"
            raise DataNotFoundError(f"task '{self.name}' has no '{split}' split (it has: {has}); set task.{split}=FILE")
        place = task.source.locate(split)
        examples = list(task._examples(iter_records(place, split), split))
        if not examples:
            raise DataError(f"'{place}' holds no records; expected at least one for the {split} split of '{self.name}'")
        if task.merge_inputs and split != "train":
            examples = _merge(examples)
        limit = {"train": config.limit_train, "dev": config.limit_dev, "test": config.limit_dev}[split]
        return _sample(examples, limit, f"limit_{'train' if split == 'train' else 'dev'}")

    def _examples(self, records: Iterator[PlacedRecord], split: str) -> Iterator[Example]:
        for number, (place, record) in enumerate(records):
            try:
                found = self.format.read(record, split)
                for part, example in enumerate(found):
                    suffix = f"-{part}" if len(found) > 1 else ""
                    identity = f"{example.id or f'{self.name}-{split}-{number}'}{suffix}"
                    yield from _rows(replace(example, id=identity, choices=example.choices or self.choices), split)
            except DataError as error:
                raise DataError(f"{place}: {error}") from error


def _rows(example: Example, split: str) -> Iterator[Example]:
    if not example.target.strip() or not all(reference.strip() for reference in example.references):
        raise DataError(f"the target of record '{example.id}' is empty; every record needs an answer (or remove it)")
    if example.choices and example.target not in example.choices:
        raise DataError(
            f"the target of record '{example.id}' is no legal answer: {nearest(example.target, example.choices)}"
        )
    if split != "train" or len(example.references) < 2:
        yield example
        return
    for number, reference in enumerate(example.references):
        yield replace(example, target=reference, references=(), id=f"{example.id}-{number}")


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
