"""``softprompts evaluate`` and ``softprompts generate``: what a saved prompt does."""

from __future__ import annotations

import contextlib
import json as json_module
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompts.cli.loading import TargetOption, TemplateOption, template_overrides
from softprompts.cli.output import JsonOption, console_for, write_json
from softprompts.config import DecodingConfig, TaskConfig, TrainRecipe, decode, override, to_dict
from softprompts.errors import ArtifactError, ConfigError, DataError, DataNotFoundError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from softprompts.evaluation.classification import Majority
    from softprompts.evaluation.evaluate import EvaluationReport
    from softprompts.evaluation.predict import Ranking
    from softprompts.models import FrozenLM
    from softprompts.storage.manifest import PromptInfo
    from softprompts.tasks.task import Task
    from softprompts.types import Encoded, Example

__all__ = ["evaluate", "generate", "read_lines", "recipe_of"]

_ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Name, directory or 'bundled' (default: that of the prompt)."),
]
_SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Change a value: decoding.beams=3, task.test=FILE; repeatable."),
]
_SHOWN_SAMPLES = 3


def evaluate(
    prompt: Annotated[
        Path | None, typer.Option("--prompt", metavar="DIR", help="A saved prompt (default: the frozen model alone).")
    ] = None,
    model: _ModelOption = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="Name of the task (default: the prompt's own).")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train, dev or test.")] = "test",
    format: TemplateOption = None,
    target: TargetOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="A random sample of so many records.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling and of the bootstrap.")] = 0,
    set_: _SetOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Where samples.jsonl and evaluation.json go.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Answer every record, and report metrics, loss and perplexity with standard errors.

    A task with label words is judged in both ways: by what the model writes (what is no label is counted, and wrong),
    and by the label that it finds likeliest (ranked/...); --set evaluation.prediction=generate or rank takes one of
    them. What the most common label would get stands beside it (majority/...).
    """
    recipe = recipe_of(prompt, model, task, [*template_overrides(format, target), *(set_ or [])])
    if limit is not None:
        recipe = replace(recipe, task=replace(recipe.task, limit_train=limit, limit_dev=limit))
    console = console_for(json)

    from softprompts.evaluation.evaluate import write_report

    report = _report(recipe, split, prompt, seed, console)
    _show(report, console)
    if output is not None:
        console.print(f"written to {write_report(report, output)}", markup=False)
    write_json(json, report.to_dict())


def _report(recipe: TrainRecipe, split: str, prompt: Path | None, seed: int, console: Console) -> EvaluationReport:
    """Load what a recipe names, answer every record, and score."""
    from rich.progress import Progress

    from softprompts.cli.loading import encode_rows, load_frozen
    from softprompts.evaluation.evaluate import evaluate as run
    from softprompts.inference import Engine
    from softprompts.prompted import PromptedLM
    from softprompts.storage.artifact import load_prompt
    from softprompts.tasks import get_task

    chosen, way = get_task(recipe.task), recipe.evaluation.prediction
    examples = chosen.load(split, recipe.task)
    scored = not _keeps_labels_secret(examples)
    if not scored:
        console.print(f"the labels of the {split} split are secret: nothing is scored", markup=False)
    frozen = load_frozen(recipe.model)
    loaded = None if prompt is None else load_prompt(prompt, frozen)
    own = -1 if loaded is None else 0
    inputs = encode_rows(examples, chosen, frozen, recipe.task, prompt=own, with_target=False)
    ranking = _ranking(inputs, chosen, frozen, recipe)
    with Progress(console=console, transient=True) as progress:
        ways = (way != "rank") + (ranking is not None)
        bar = progress.add_task("answering", total=len(examples) * ways)
        return run(
            Engine(PromptedLM(frozen, [] if loaded is None else [loaded.prompt])),
            inputs,
            encode_rows(examples, chosen, frozen, recipe.task, prompt=own) if scored else None,
            metrics=(recipe.evaluation.metrics or chosen.metrics) if scored else (),
            decoding=recipe.evaluation.decoding,
            generating=way != "rank",
            ranking=ranking,
            majority=_majority(chosen, recipe.task, split, examples) if scored else None,
            seed=seed,
            facts=_facts(chosen, split, recipe, frozen, prompt, None if loaded is None else loaded.info),
            on_progress=lambda count: progress.advance(bar, count),
        )


def _keeps_labels_secret(examples: Sequence[Example]) -> bool:
    from softprompts.types import UNLABELLED

    return any(UNLABELLED in (example.target, *example.references) for example in examples)


def _ranking(inputs: Sequence[Encoded], task: Task, frozen: FrozenLM, recipe: TrainRecipe) -> Ranking | None:
    """Encode the choices of the inputs, where they have some and are to be ranked."""
    from softprompts.cli.loading import ranking_of

    evaluation = recipe.evaluation
    if evaluation.prediction == "generate":
        return None
    ranking = ranking_of(inputs, task, frozen, recipe.task, evaluation.ranking)
    if evaluation.prediction == "rank" and ranking is None:
        raise ConfigError(f"task '{task.name}' has no choices to rank: set evaluation.prediction=generate")
    return ranking


def _majority(task: Task, config: TaskConfig, split: str, examples: Sequence[Example]) -> Majority | None:
    """Find the most common label: of the training split where it lies on this machine, else of the one judged."""
    from softprompts.evaluation.classification import majority_of

    if not task.choices:
        return None
    if split != "train" and task.source.is_at_hand("train"):
        with contextlib.suppress(DataError, ConfigError):  # a yardstick is no reason to fail on another split's records
            return majority_of(task.load("train", replace(config, limit_train=None)), "train")
    return majority_of(examples, split)


def recipe_of(prompt: Path | None, model: str | None, task: str | None, overrides: Sequence[str]) -> TrainRecipe:
    """Put the recipe of an evaluation together: the prompt's own, then the options, then the overrides."""
    recipe = TrainRecipe() if prompt is None else _saved_recipe(prompt)
    if task is None and not _names_task(recipe):
        raise ConfigError("no task is named: give --task, such as --task gazette, or a prompt that was trained on one")
    if task is not None and task != recipe.task.name:
        recipe = replace(recipe, task=TaskConfig(name=task), evaluation=TrainRecipe().evaluation)
    name = model or recipe.model.name_or_path
    if not name:
        raise ConfigError(f"it is not on record which model the prompt in '{prompt}' is for: name it with --model")
    recipe = replace(recipe, model=replace(recipe.model, name_or_path=name, gradient_checkpointing=False))
    return _with_decoding(recipe, overrides)


def _with_decoding(recipe: TrainRecipe, overrides: Sequence[str]) -> TrainRecipe:
    """Apply overrides on top of the recipe's decoding or, where it says nothing about it, of the task's."""
    from softprompts.tasks import get_task

    overrides = [f"evaluation.{text}" if text.startswith("decoding.") else text for text in overrides]
    final = override(recipe, overrides)
    if recipe.evaluation.decoding != DecodingConfig() or not _names_task(final):
        return final
    own = get_task(final.task).decoding
    return override(replace(recipe, evaluation=replace(recipe.evaluation, decoding=own)), overrides)


def _names_task(recipe: TrainRecipe) -> bool:
    """Whether a recipe says anything about its task; the default is 'records' without any."""
    return recipe.task != TaskConfig()


def _saved_recipe(prompt: Path) -> TrainRecipe:
    """Read the recipe of a prompt; one that was saved without says at least which model, and perhaps which task."""
    from softprompts.storage.artifact import read_info

    info = read_info(prompt)
    if info.origin.recipe is None:
        model = replace(TrainRecipe().model, name_or_path=info.model.name)
        task = TaskConfig() if info.origin.task is None else TaskConfig(name=info.origin.task)
        return replace(TrainRecipe(), model=model, task=task)
    try:
        return decode(TrainRecipe, info.origin.recipe)
    except ConfigError as error:
        raise ArtifactError(f"the recipe in '{prompt}/prompt.json' is none of this version: {error}") from error


def _facts(
    task: Task, split: str, recipe: TrainRecipe, frozen: FrozenLM, prompt: Path | None, info: PromptInfo | None
) -> dict[str, Any]:
    from softprompts import __version__

    facts: dict[str, Any] = {
        "task": task.name,
        "split": split,
        "setting": to_dict(recipe.task.setting),
        "limit": recipe.task.limit_train if split == "train" else recipe.task.limit_dev,
        "model": {"name": frozen.name, "fingerprint": frozen.fingerprint, "parameters": frozen.parameter_count},
        "prompt": None,
        "dtype": recipe.model.dtype,
        "quantization": recipe.model.quantization,
        "device": str(frozen.device),
        "version": __version__,
    }
    if info is not None:
        facts["prompt"] = {
            "directory": str(prompt),
            "kind": info.kind,
            "placement": info.placement,
            "length": info.length,
            "stored_parameters": info.parameters.stored,
            "sha256": info.tensors.sha256,
        }
    return facts


def _show(report: EvaluationReport, console: Console) -> None:
    from rich.table import Table

    table = Table("metric", "value", "standard error")
    for name, metric in report.metrics.items():
        table.add_row(name, f"{metric.value:.4g}", "" if metric.stderr is None else f"{metric.stderr:.2g}")
    console.print(table)
    for one in report.predictions[:_SHOWN_SAMPLES]:
        console.print(f"input      {one.example.input}", markup=False)
        console.print(f"prediction {one.text}", markup=False)
        if one.ranked is not None:
            console.print(f"likeliest  {one.ranked}", markup=False)
        console.print(f"reference  {one.example.all_references[0]}\n", markup=False)
    for line in _notes(report):
        console.print(line, markup=False)


def _notes(report: EvaluationReport) -> Iterator[str]:
    """What is said below the table."""
    records, illegal, majority = len(report.predictions), report.illegal, report.majority
    if illegal is not None:
        often = "".join(f"; most often {text!r} ({count})" for text, count in illegal.commonest[:1])
        yield f"{illegal.count} of {records} answers ({illegal.share.value:.3g} %) are no label{often}"
    if majority is not None:
        yield f"majority: '{majority.label}', {100 * majority.share:.3g} % of the {majority.counted_on} split"
    cut = sum(one.finished is False for one in report.predictions)
    length = f"; {cut} outputs were cut at {report.decoding.max_new_tokens} tokens" if report.generated else ""
    yield f"{records} records in {sum(report.seconds.values()):.1f} s{length}"


# --------------------------------------------------------------------------------------------------------------------
# generate
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """One line of input."""

    input: str
    prompt: int
    """Index into the prompts, -1 for none."""


def generate(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Lines of input (default: standard input).")
    ] = None,
    prompt: Annotated[
        list[Path] | None, typer.Option("--prompt", metavar="DIR", help="A saved prompt; repeatable.")
    ] = None,
    model: _ModelOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling.")] = 0,
    set_: _SetOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take the lines as they are, add no separator.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="One JSON object per line, with log-probability.")] = False,
) -> None:
    r"""Lines in, lines out.

    A line is plain text, for the only prompt given, or a JSON object that names its prompt by the last part of its
    directory: {"prompt": "notices", "input": "name : Blue Spice"}. {"prompt": null} asks the frozen model alone.
    Lines with different prompts share batches. What follows an input in the prompt's task (a line break, say) is added.
    """
    directories = prompt or []
    names = _prompt_names(directories)
    saved = [_saved_recipe(path) for path in directories] or [TrainRecipe()]
    recipes = [_with_decoding(recipe, set_ or []) for recipe in saved]
    requests = list(_read_requests(read_lines(file), str(file or "standard input"), names))

    from softprompts.cli.loading import load_frozen
    from softprompts.inference import Engine
    from softprompts.prompted import PromptedLM
    from softprompts.storage.artifact import load_prompt

    config = recipes[0].model
    frozen = load_frozen(replace(config, name_or_path=model or config.name_or_path, gradient_checkpointing=False))
    engine = Engine(PromptedLM(frozen, [load_prompt(path, frozen).prompt for path in directories]))
    rows = [_encode(request, recipes[max(request.prompt, 0)], frozen, raw) for request in requests]
    # Rows of one batch share their decoding options; prompts of one task usually do.
    decodings = [recipes[max(request.prompt, 0)].evaluation.decoding for request in requests]
    texts: dict[int, str] = {}
    states = engine.fold()
    for decoding in dict.fromkeys(decodings):
        indices = [index for index, own in enumerate(decodings) if own == decoding]
        outputs = engine.generate([rows[index] for index in indices], decoding, states=states, seed=seed)
        for index, one in zip(indices, outputs, strict=True):
            name = names[requests[index].prompt] if requests[index].prompt >= 0 else None
            line = {"prompt": name, "input": requests[index].input, "output": one.text.strip()}
            more = {"logprob": one.logprob, "finished": one.finished}
            full = json_module.dumps({**line, **more}, ensure_ascii=False)
            texts[index] = full if jsonl else " ".join(one.text.split())
    sys.stdout.writelines(texts[index] + "\n" for index in range(len(requests)))


def _prompt_names(directories: Sequence[Path]) -> list[str]:
    names = [path.resolve().name for path in directories]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two prompts are called '{twice}' (the last part of their directories); rename one of them")
    return names


def read_lines(file: Path | None) -> list[str]:
    """Read the lines of a file, or of standard input for ``None`` and ``-``."""
    try:
        text = sys.stdin.read() if file is None or str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataNotFoundError(f"'{file}' cannot be read: {error.strerror or error}; give a file of lines") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{file or 'standard input'}' is no text in UTF-8: {error}") from error
    return text.removesuffix("\n").split("\n") if text else []


def _read_requests(lines: Sequence[str], place: str, names: Sequence[str]) -> Iterator[_Request]:
    only = names[0] if len(names) == 1 else None
    for number, line in enumerate(lines, start=1):
        content = _as_object(line)
        if content is None and len(names) > 1:
            raise DataError(
                f"{place}, line {number}: {len(names)} prompts are loaded and this line names none; write "
                f'{{"prompt": "{names[0]}", "input": "..."}}'
            )
        content = {"input": line.rstrip("\r")} if content is None else content
        text, name = content.get("input"), content.get("prompt", only)
        if not isinstance(text, str):
            raise DataError(f"{place}, line {number}: 'input' is {text!r}, expected text")
        if name is not None and name not in names:
            raise DataError(f"{place}, line {number}: unknown prompt {name!r}: {nearest(str(name), names)}")
        yield _Request(text, -1 if name is None else names.index(name))


def _as_object(line: str) -> dict[str, Any] | None:
    """Read a line as a JSON object; ``None`` if it is plain text."""
    if not line.lstrip().startswith("{"):
        return None
    try:
        content = json_module.loads(line)
    except json_module.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None


def _encode(request: _Request, recipe: TrainRecipe, frozen: FrozenLM, raw: bool) -> Encoded:
    from softprompts.cli.loading import encode_rows
    from softprompts.tasks import get_task
    from softprompts.types import Encoded, Example

    example = Example(request.input, "", id=request.input[:40])
    if raw or not _names_task(recipe):
        ids = (*frozen.bos_ids, *frozen.tokenize(request.input), *(frozen.end_ids or ()))
        return Encoded(ids, len(ids), example, request.prompt)
    task = get_task(recipe.task)
    return encode_rows([example], task, frozen, recipe.task, prompt=request.prompt, with_target=False)[0]
