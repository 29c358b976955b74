"""Transfer across tasks: the cross-task matrix, the best prompt to start from, and what a warm start saves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from softprompts.cli.judging import Judgement
    from softprompts.config import JudgeConfig, ModelConfig, TaskConfig, TrainRecipe
    from softprompts.models import FrozenLM
    from softprompts.prompts import SoftPrompt
    from softprompts.storage import PromptInfo
    from softprompts.transfer import TaskTransfer

__all__ = ["SavedPrompt", "cross_task", "recipe_of", "saved_prompts", "steps_of_runs", "warm_start"]

_RUN_FOLDER = "prompt"
"""What ``softprompts train`` calls a prompt's directory in the folder of its run; the run's name says more."""
_NEURONS = "neurons"


@dataclasses.dataclass(frozen=True)
class SavedPrompt:
    """A prompt on disk that transfer may start from."""

    name: str
    path: Path
    info: PromptInfo

    @property
    def task(self) -> str:
        """Name of the task that it was trained on; empty where that is not on record."""
        return self.info.origin.task or ""


def saved_prompts(places: Iterable[Path]) -> list[SavedPrompt]:
    """Find prompts: directories of prompts, and folders that hold some (directly, or as ``RUN/prompt``).

    Raises:
        ArtifactError: A directory is damaged.
        ConfigError: There is none, or two have the same name.
    """
    from softprompts.errors import ConfigError
    from softprompts.storage import read_info
    from softprompts.storage.artifact import MANIFEST_FILE

    listed = list(places)
    found: dict[str, SavedPrompt] = {}
    for place in listed:
        inside = [place] if (place / MANIFEST_FILE).exists() else sorted(path.parent for path in _manifests(place))
        for path in inside or [place]:  # a place without prompts is refused by read_info, with the reason
            name = path.resolve().parent.name if path.resolve().name == _RUN_FOLDER else path.resolve().name
            if name in found and found[name].path.resolve() != path.resolve():
                raise ConfigError(
                    f"two prompts are called '{name}': '{found[name].path}' and '{path}'; rename one of them"
                )
            found[name] = SavedPrompt(name, path, read_info(path))
    if not found:
        raise ConfigError("no prompt is given; name directories of saved prompts, or a folder that holds some")
    return list(found.values())


def _manifests(folder: Path) -> list[Path]:
    from softprompts.storage.artifact import MANIFEST_FILE

    return [*folder.glob(f"*/{MANIFEST_FILE}"), *folder.glob(f"*/{_RUN_FOLDER}/{MANIFEST_FILE}")]


def recipe_of(saved: SavedPrompt) -> TrainRecipe | None:
    """The recipe that a prompt was trained by, where it is on record."""
    from softprompts.config import TrainRecipe, decode
    from softprompts.errors import ArtifactError, ConfigError

    if saved.info.origin.recipe is None:
        return None
    try:
        return decode(TrainRecipe, saved.info.origin.recipe)
    except ConfigError as error:
        raise ArtifactError(f"the recipe in '{saved.path}/prompt.json' is none of this version: {error}") from error


# --------------------------------------------------------------------------------------------------------------------
# The matrix
# --------------------------------------------------------------------------------------------------------------------


def cross_task(
    places: Sequence[Path],
    tasks: Sequence[str],
    judging: JudgeConfig,
    folder: Path,
    model: str | None,
    types: Mapping[str, str],
    similarities: Sequence[str],
    console: Console,
) -> dict[str, Any]:
    """Judge every prompt on every task; what an earlier call has measured alike is read from its cells.

    Args:
        places: Prompts and folders of prompts.
        tasks: Names of the tasks; empty for all that the prompts were trained on.
        judging: Split, limit, measure.
        folder: Where cells are kept.
        model: The frozen model, if not the one on record.
        types: From tasks to their types; empty for no means over types.
        similarities: Names of measures to correlate with transfer.
        console: For people.
    """
    from softprompts.cli.loading import load_frozen
    from softprompts.cli.output import write_json
    from softprompts.storage import load_prompt

    saved = saved_prompts(places)
    configs = _tasks(saved, tasks)
    frozen = load_frozen(_model(saved, model))
    prompts = [load_prompt(one.path, frozen).prompt for one in saved]
    judgements = [_judged(frozen, saved, prompts, config, judging, folder) for config in configs.values()]
    matrix = _matrix(saved, list(configs), judgements)
    result: dict[str, Any] = {
        "verb": "transfer tasks",
        "model": {"name": frozen.name, "fingerprint": frozen.fingerprint},
        "split": judging.split,
        "limit": judging.limit,
        "matrix": dataclasses.asdict(matrix),
        "stderr_KM": [[one.prompts[k].stderr for one in judgements] for k in range(len(saved))],
        "measures": [one.measure for one in judgements],
        "records": [one.records for one in judgements],
        "relative_KM": matrix.relative_KM(),
        "relative_none_M": matrix.relative_none_M(),
        "best_source": {name: _best(matrix, task) for task, name in enumerate(matrix.tasks)},
        "type_means": dataclasses.asdict(matrix.type_means(types)) if types else None,
        "correlation": _correlations(frozen, prompts, matrix, similarities),
    }
    write_json(folder / "transfer.json", result)
    _show(matrix, result, console)
    return result


def _tasks(saved: Sequence[SavedPrompt], names: Sequence[str]) -> dict[str, TaskConfig]:
    """The tasks to judge on, each as a prompt that was trained on it has it."""
    from softprompts.config import TaskConfig
    from softprompts.errors import ConfigError

    known = {one.task: recipe.task for one in reversed(saved) if one.task and (recipe := recipe_of(one)) is not None}
    wanted = list(names) or list(dict.fromkeys(one.task for one in saved if one.task))
    if not wanted:
        raise ConfigError("the prompts do not say what they were trained on; name the tasks with --task")
    return {name: known.get(name, TaskConfig(name=name, on_long="truncate")) for name in wanted}


def _model(saved: Sequence[SavedPrompt], model: str | None) -> ModelConfig:
    from softprompts.cli.prompt_files import window_of
    from softprompts.cli.steering import model_name
    from softprompts.config import ModelConfig

    recipe, info = recipe_of(saved[0]), saved[0].info
    recorded = ModelConfig(name_or_path=info.model.name, window=window_of(info.geometry))
    config = recorded if recipe is None else recipe.model
    name = model_name(model, config.name_or_path, saved[0].path)
    return dataclasses.replace(config, name_or_path=name, gradient_checkpointing=False)


def _judged(
    frozen: FrozenLM,
    saved: Sequence[SavedPrompt],
    prompts: Sequence[SoftPrompt],
    config: TaskConfig,
    judging: JudgeConfig,
    folder: Path,
) -> Judgement:
    """One column of the matrix; only prompts without a cell are run, all of them in shared batches."""
    from softprompts.cli.judging import Judgement, judge
    from softprompts.cli.output import read_json, write_json
    from softprompts.types import MetricValue

    files = [_cell(frozen, one, config, judging, folder) for one in saved]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    if missing:
        found = judge(frozen, [prompts[number] for number in missing], config, judging)
        for number, value in zip(missing, found.prompts, strict=True):
            cell = {"prompt": saved[number].name, "task": config.name, "value": value.value, "stderr": value.stderr}
            facts = {"measure": found.measure, "higher_is_better": found.higher_is_better, "records": found.records}
            alone = {"value": found.none.value, "stderr": found.none.stderr}
            write_json(files[number], {**cell, **facts, "none": alone})
    cells = [read_json(file) for file in files]
    first = cells[0]
    values = tuple(MetricValue(_score(cell), cell["stderr"], cell["measure"]) for cell in cells)
    none = MetricValue(_score(first["none"]), first["none"]["stderr"], first["measure"])
    return Judgement(first["measure"], first["higher_is_better"], first["records"], none, values)


def _score(found: Mapping[str, Any]) -> float:
    """The score in a cell; JSON knows no NaN and says ``null`` for it."""
    return math.nan if found["value"] is None else found["value"]


def _cell(frozen: FrozenLM, saved: SavedPrompt, config: TaskConfig, judging: JudgeConfig, folder: Path) -> Path:
    """The file of one cell; its name holds a digest of all that the score depends on."""
    from softprompts.config import to_dict

    facts = {
        "model": [frozen.fingerprint, frozen.quantization, str(frozen.dtype)],
        "prompt": saved.info.tensors.sha256,
        "task": to_dict(config),
        "judging": {**to_dict(judging), "own": None, "batch_size": None},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return folder / "cells" / config.name / f"{saved.name}-{digest}.json"


def _matrix(saved: Sequence[SavedPrompt], tasks: Sequence[str], judgements: Sequence[Judgement]) -> TaskTransfer:
    from softprompts.transfer import TaskTransfer

    return TaskTransfer(
        prompts=tuple(one.name for one in saved),
        trained_on=tuple(one.task for one in saved),
        tasks=tuple(tasks),
        scores_KM=tuple(tuple(one.prompts[k].value for one in judgements) for k in range(len(saved))),
        none_M=tuple(one.none.value for one in judgements),
        higher_is_better=tuple(one.higher_is_better for one in judgements),
    )


def _best(matrix: TaskTransfer, task: int) -> str | None:
    scored = [k for k, row in enumerate(matrix.scores_KM) if not math.isnan(row[task])]
    others = [k for k in scored if matrix.trained_on[k] != matrix.tasks[task]]
    return matrix.prompts[matrix.best_source(task, others)] if others else None


def _correlations(
    frozen: FrozenLM, prompts: Sequence[SoftPrompt], matrix: TaskTransfer, names: Sequence[str]
) -> dict[str, Any]:
    found = {}
    for name in names:
        similarity_KK = _similarity(frozen, prompts, name)
        found[name] = {**dataclasses.asdict(matrix.correlation(similarity_KK)), "similarity_KK": similarity_KK}
    return found


def _similarity(frozen: FrozenLM, prompts: Sequence[SoftPrompt], name: str) -> list[list[float]]:
    """How alike prompts are, by one of the measures of their numbers or by the neurons that they activate."""
    from softprompts.errors import ConfigError, nearest
    from softprompts.transfer.neurons import activated_neurons
    from softprompts.transfer.similarity import MEASURES

    if name != _NEURONS and name not in MEASURES:
        raise ConfigError(f"unknown similarity '{name}': {nearest(name, [*MEASURES, _NEURONS])}")
    matrix_KK = activated_neurons(prompts, frozen).overlap() if name == _NEURONS else MEASURES.get(name).matrix(prompts)
    rows: list[list[float]] = matrix_KK.tolist()
    return rows


def _show(matrix: TaskTransfer, result: Mapping[str, Any], console: Console) -> None:
    from rich.table import Table

    table = Table("prompt", *matrix.tasks)
    table.add_row("(none)", *(f"{score:.3g}" for score in matrix.none_M))
    for name, row in zip(matrix.prompts, matrix.scores_KM, strict=True):
        table.add_row(name, *(f"{score:.3g}" for score in row))
    console.print(table)
    if result["type_means"]:
        means = [result["type_means"][key] for key in ("same_type", "cross_type")]
        words = ["-" if mean is None else f"{mean:.3f}" for mean in means]
        console.print(f"relative to the own prompt: same type {words[0]}, other types {words[1]}", markup=False)
    for name, found in result["correlation"].items():
        rho = "-" if found["rho"] is None else f"{found['rho']:.2f}"
        console.print(f"Spearman's rho of {name} with transfer: {rho} ({found['cells']} cells)", markup=False)


# --------------------------------------------------------------------------------------------------------------------
# Warm starts
# --------------------------------------------------------------------------------------------------------------------


def warm_start(config: TrainRecipe, library: Path, by: str, like: Path | None = None) -> TrainRecipe:
    """Let a recipe start from the best prompt of a library.

    Args:
        config: The recipe; its prompt's length becomes that of the source.
        library: Folder of prompts. Those of other models and kinds, and those of the same task, are left out.
        by: ``zero-shot``: the best score on the dev split without training; or a similarity, to the prompt ``like``.
        like: A prompt of the task, however shortly trained.

    Raises:
        ConfigError: No prompt of the library fits, or ``like`` is missing.
    """
    from softprompts.cli.loading import load_frozen
    from softprompts.config import replaced
    from softprompts.errors import ConfigError
    from softprompts.storage import load_prompt

    frozen = load_frozen(config.model)
    wanted = (config.prompt.kind, config.prompt.placement, frozen.fingerprint)
    saved = [
        one
        for one in saved_prompts([library])
        if (one.info.kind, one.info.placement, one.info.model.fingerprint) == wanted and one.task != config.task.name
    ]
    if not saved:
        raise ConfigError(
            f"'{library}' holds no {config.prompt.kind} prompt for '{frozen.name}' that was trained on another task "
            f"than '{config.task.name}'; train some first"
        )
    prompts = [load_prompt(one.path, frozen).prompt for one in saved]
    place = _chosen(frozen, prompts, config, by, like)
    values = {"prompt.initializer.name": "prompt", "prompt.initializer.prompt": str(saved[place].path.resolve())}
    return replaced(config, {**values, "prompt.length": saved[place].info.length})


def _chosen(frozen: FrozenLM, prompts: Sequence[SoftPrompt], config: TrainRecipe, by: str, like: Path | None) -> int:
    from softprompts.cli.judging import judge
    from softprompts.config import JudgeConfig
    from softprompts.errors import ConfigError
    from softprompts.storage import load_prompt

    if by == "zero-shot":
        judging = JudgeConfig(split="dev", limit=config.task.limit_dev)
        found = judge(frozen, prompts, config.task, judging)
        sign = 1 if found.higher_is_better else -1
        return _largest([sign * one.value for one in found.prompts])
    if like is None:
        raise ConfigError(f"--by {by} compares with a prompt of the task itself; name one with --like DIR")
    target = load_prompt(like, frozen).prompt
    row = _similarity(frozen, [target, *prompts], by)[0]
    return _largest(row[1:])


def _largest(values: Sequence[float]) -> int:
    """Place of the largest number; what is none (a loss that overflows, a prompt of zeros) is not chosen.

    Raises:
        ConfigError: There is no number among them.
    """
    from softprompts.errors import ConfigError

    known = [place for place, value in enumerate(values) if not math.isnan(value)]
    if not known:
        raise ConfigError("no prompt of the library has a score that is a number; train others first")
    return max(known, key=lambda place: values[place])


def steps_of_runs(runs: Sequence[Path], own: Path, metric: str, console: Console) -> dict[str, Any]:
    """Say after how many updates each run first reached the best dev score of another one.

    Args:
        runs: Folders of training runs.
        own: The run that sets the score.
        metric: Dev metric.
        console: For people.

    Raises:
        DataNotFoundError: A folder holds no events.
    """
    from softprompts.transfer import steps_to_reach

    maximize = metric != "loss"
    values = [event["metrics"].get(metric) for event in _events(own) if event["event"] == "validation"]
    measured = [value for value in values if value is not None]
    steps_to_reach(_events(own), 0.0, metric=metric)  # refuses a run that did not measure it
    score = (max if maximize else min)(measured)
    found = {str(run): steps_to_reach(_events(run), score, metric=metric, maximize=maximize) for run in [own, *runs]}
    for run, steps in found.items():
        console.print(f"{run}: {'never' if steps is None else f'{steps} steps'} to {metric} {score:.4g}", markup=False)
    return {"verb": "transfer steps", "metric": metric, "score": score, "own": str(own), "steps": found}


def _events(run: Path) -> list[dict[str, Any]]:
    from softprompts.errors import DataNotFoundError
    from softprompts.training import read_events

    path = run / "events.jsonl"
    if not path.is_file():
        raise DataNotFoundError(f"'{run}' holds no events.jsonl; give the folder of a training run")
    return read_events(path)
