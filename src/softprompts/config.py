"""Recipes: YAML files that map to frozen dataclasses.

``load_recipe(path, TrainRecipe, overrides)`` reads a file, applies ``a.b=c`` overrides, refuses unknown keys with the
nearest known one and checks every type. ``to_dict`` gives the resolved recipe back; it is saved with every run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from softprompts.errors import ConfigError, DataNotFoundError, nearest

__all__ = [
    "DecodingConfig",
    "EvaluationConfig",
    "InitConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PromptConfig",
    "ReparamConfig",
    "ScheduleConfig",
    "TaskConfig",
    "TrainRecipe",
    "TrainingConfig",
    "decode",
    "load_recipe",
    "override",
    "parse_override",
    "to_dict",
]

C = TypeVar("C")


@dataclass(frozen=True)
class ModelConfig:
    """Which frozen model, and how it is loaded."""

    name_or_path: str = "bundled"
    """A Hugging Face name, a directory, or ``bundled`` for the small LM inside this package."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    revision: str | None = None
    quantization: str | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class TaskConfig:
    """Which records, and how many of them."""

    name: str = "records"
    """A task of the catalog (``softprompts.tasks.catalog``)."""
    train: str | None = None
    """File or data set of the training split; ``None`` takes the task's own, below ``SOFTPROMPTS_DATA``."""
    dev: str | None = None
    test: str | None = None
    format: str | None = None
    """Template for the input, ``"Review: {text} Sentiment:"``; only for the task ``records``."""
    target: str | None = None
    """Template for the target, ``"{label}"``; only for the task ``records``."""
    separator: str | None = None
    """Text between input and target, ``eos`` for the end-of-sequence token; ``None`` takes the task's own."""
    max_length: int = 512
    """Longest row in tokens, prompt not counted."""
    on_long: Literal["error", "truncate"] = "error"
    """What happens to a text longer than ``max_length``: refuse it, or cut its input (never its target)."""
    limit_train: int | None = None
    limit_dev: int | None = None


@dataclass(frozen=True)
class ReparamConfig:
    """How the prompt is parametrized while it is trained."""

    name: Literal["none", "mlp", "residual"] = "none"
    hidden_size: int = 512
    """Units of the tanh layer (paper: 512 for table-to-text, 800 for summarization)."""
    start: Literal["none", "closed_form", "regression"] = "none"
    """How an ``mlp`` is made to start at the initializer's values (``residual`` starts there by construction)."""
    regression_steps: int = 500
    regression_learning_rate: float = 1e-4


@dataclass(frozen=True)
class InitConfig:
    """What the prompt starts from."""

    name: Literal["uniform", "vocabulary", "labels", "text", "prompt"] = "vocabulary"
    text: str | None = None
    """For ``text``: the words; repeated or cut to the prompt's length."""
    labels: tuple[str, ...] = ()
    """For ``labels``: the class words; the rest of the prompt is filled as by ``vocabulary``."""
    prompt: str | None = None
    """For ``prompt``: directory of a saved prompt."""
    scale: float = 0.5
    """For ``uniform``: the range is [-scale, scale]."""
    population: int = 5000
    """For ``vocabulary``: how many of the most common tokens are sampled from."""


@dataclass(frozen=True)
class PromptConfig:
    """The soft prompt itself."""

    kind: Literal["prefix", "embedding"] = "prefix"
    length: int | None = 10
    """P. ``None`` with the initializer ``text`` means as many positions as the text has tokens."""
    reparametrization: ReparamConfig = field(default_factory=ReparamConfig)
    initializer: InitConfig = field(default_factory=InitConfig)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of the prompt's parameters."""

    name: Literal["adamw", "adafactor", "sgd"] = "adamw"
    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW."""
    eps: float = 1e-8
    decay_rate: float = 0.8
    """Adafactor: exponent of the second moment's decay."""
    factored: bool = False
    """Adafactor: factor the second moment (prompt-tuning paper: not for the prompt)."""
    momentum: float = 0.0
    """SGD."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the steps."""

    name: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    """Share of the learning rate that is left at the last step."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long, on what batches, and when to stop."""

    max_steps: int = 1000
    batch_size: int = 16
    accumulation_steps: int = 1
    clip_norm: float | None = 1.0
    loss: Literal["token_mean", "sentence_sum"] = "token_mean"
    """``sentence_sum``: per-sentence sum of token losses, mean over the batch (prefix-tuning's official code)."""
    validate_every_steps: int = 200
    patience: int | None = None
    """Validations without a better dev score after which training stops; ``None``: never early."""
    checkpoint_every_steps: int = 200
    max_seconds: float | None = None
    """Stop after so many seconds of training, validation not counted."""
    seed: int = 0


@dataclass(frozen=True)
class DecodingConfig:
    """How outputs are generated."""

    strategy: Literal["greedy", "sample", "beam"] = "greedy"
    max_new_tokens: int = 100
    min_new_tokens: int = 0
    beams: int = 5
    length_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    banned: tuple[str, ...] = ()
    """Strings that are never produced (the paper bans newlines)."""
    batch_size: int = 32


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and on how many records."""

    metrics: tuple[str, ...] = ()
    """Names of metrics; empty means the task's own."""
    selection: str | None = None
    """The metric that picks the best checkpoint: a task metric, or ``loss`` (the default)."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    limit: int | None = None


@dataclass(frozen=True)
class TrainRecipe:
    """Everything that `softprompts train` needs to know."""

    method: Literal["prompt", "fine_tuning"] = "prompt"
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output_dir: str = "runs/default"


def load_recipe(path: str | Path, cls: type[C], overrides: Sequence[str] = ()) -> C:
    """Read a recipe.

    Args:
        path: A YAML file with one mapping.
        cls: The dataclass that the mapping becomes.
        overrides: ``"a.b=c"`` strings, applied in order; values are read as YAML.

    Raises:
        DataNotFoundError: There is no such file.
        ConfigError: The file is no YAML mapping, a key is unknown or a value has the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise DataNotFoundError(
            f"recipe '{path}' does not exist; give the path of a YAML file, such as one of recipes/"
        )
    try:
        mapping = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe '{path}' is no valid YAML in UTF-8: {error}") from error
    mapping = {} if mapping is None else mapping
    if not isinstance(mapping, dict):
        raise ConfigError(f"recipe '{path}' holds a {type(mapping).__name__}, expected a mapping of keys to values")
    for override in overrides:
        _set(mapping, *parse_override(override, cls), override)
    try:
        return decode(cls, mapping)
    except ConfigError as error:
        raise ConfigError(f"recipe '{path}': {error}") from error


def override(config: C, overrides: Sequence[str]) -> C:
    """Return a config with ``"a.b=c"`` strings applied in order.

    Raises:
        ConfigError: An override is malformed, names an unknown key or has a value of the wrong type.
    """
    mapping = to_dict(config)
    for text in overrides:
        _set(mapping, *parse_override(text, type(config)), text)
    return decode(type(config), mapping)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag == "tag:yaml.org,2002:str"]
        for key in sorted(keys):
            if keys.count(key) > 1:
                raise yaml.YAMLError(
                    f"the key '{key}' is given twice in the section at line {node.start_mark.line + 1}"
                )
        return super().construct_mapping(node, deep)


def parse_override(text: str, cls: type | None = None) -> tuple[list[str], Any]:
    """Split ``"a.b=c"`` into ``(["a", "b"], value)``, the value read as YAML.

    Args:
        text: The override.
        cls: The dataclass that it is for. Where its field is text, a value that YAML would read as something else
            (``Review: {text}``, ``12``) is taken as it stands; only ``null`` stays nothing.
    """
    name, equals, words = text.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"override '{text}' is not of the form a.b=c, for example training.max_steps=500")
    for_text = _is_text(cls, keys)
    try:
        value = yaml.safe_load(words)
    except yaml.YAMLError as error:
        if for_text:
            return keys, words
        raise ConfigError(f"the value of override '{text}' is no valid YAML: {error}") from error
    return keys, words if for_text and words and value is not None and not isinstance(value, str) else value


def _is_text(cls: Any, keys: list[str]) -> bool:
    for key in keys:
        cls = typing.get_type_hints(cls).get(key) if dataclasses.is_dataclass(cls) else None
    optional = typing.get_origin(cls) in (typing.Union, types.UnionType)
    return cls is str or (optional and str in typing.get_args(cls))


def _set(mapping: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        inner = mapping.setdefault(key, {})
        if inner is None:
            inner = mapping[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override '{override}': '{key}' is a value, not a section")
        mapping = inner
    mapping[keys[-1]] = value


def decode(cls: type[C], mapping: Mapping[str, Any], where: str = "") -> C:
    """Turn a mapping into a dataclass, recursively.

    Raises:
        ConfigError: A key is unknown (the nearest one is named) or a value has the wrong type.
    """
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    known = {item.name for item in dataclasses.fields(cls) if item.init}
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise ConfigError(f"unknown key '{place}': {nearest(str(key), known)}")
        values[key] = _convert(hints[key], value, place)
    required = {
        item.name
        for item in dataclasses.fields(cls)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - values.keys())
    if missing:
        raise ConfigError(f"missing key '{f'{where}.' if where else ''}{missing[0]}' of type {hints[missing[0]]}")
    return cls(**values)


def _convert(hint: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        if len(options) == 1:
            return _convert(options[0], value, place)
        for option in options:
            try:
                return _convert(option, value, place)
            except ConfigError:
                continue
        raise _wrong(value, hint, place)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"'{place}' is {value!r}: {nearest(str(value), [str(item) for item in arguments])}")
        return value
    if origin in (tuple, list):
        return _convert_sequence(origin, arguments, value, place)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(value, hint, place)
        return {_convert(arguments[0], k, place): _convert(arguments[1], v, f"{place}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        value = {} if value is None else value  # a section whose keys are all commented out
        if not isinstance(value, Mapping):
            raise ConfigError(f"'{place}' is {value!r}, expected a section with keys of {hint.__name__}")
        return decode(hint, value, place)
    return _convert_scalar(hint, value, place)


def _convert_sequence(origin: Any, arguments: tuple[Any, ...], value: Any, place: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _wrong(value, "a list", place)
    fixed = origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis)
    if fixed and len(value) != len(arguments):
        raise ConfigError(f"'{place}' has {len(value)} entries, expected {len(arguments)}")
    hints = arguments if fixed else (arguments[0],) * len(value)
    items = [_convert(hint, item, f"{place}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True))]
    return tuple(items) if origin is tuple else items


def _convert_scalar(hint: Any, value: Any, place: str) -> Any:
    if hint is Any:
        return value
    if hint in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)  # YAML 1.1 reads 1e-3 and 1e4 as strings
            if hint is float and not math.isnan(number):
                return number
            if hint is int and number.is_integer():
                return value if isinstance(value, int) else int(number)
        raise _wrong(value, hint, place)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise _wrong(value, hint, place)


def _wrong(value: Any, hint: Any, place: str) -> ConfigError:
    expected = "text (in quotes)" if hint is str else getattr(hint, "__name__", str(hint))
    return ConfigError(f"'{place}' is {value!r} of type {type(value).__name__}, expected {expected}")


def to_dict(config: Any) -> Any:
    """Turn a config back into plain mappings, lists and scalars (the inverse of :func:`decode`)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {item.name: to_dict(getattr(config, item.name)) for item in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    return str(config) if isinstance(config, Path) else config
