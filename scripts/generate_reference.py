"""Write docs/reference/{recipe,presets,cli,errors,tasks}.md from the code; ``make reference`` runs it, a test looks."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import typer

from softprompts import config, errors
from softprompts.cli.main import VERBS, verb_function
from softprompts.config.presets import PRESETS
from softprompts.tasks.catalog import get_task, load_catalog

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made by `make reference` from the code; a test checks that it is current. -->\n\n"


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        path = ROOT / "docs" / "reference" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(), encoding="utf-8")


# --- recipe keys -----------------------------------------------------------------------------------------------------


def recipe_page() -> str:
    """Describe every key of a recipe: type, default, meaning."""
    lines = [
        "# Recipe keys",
        "",
        "A recipe of `softprompts train` is a YAML file with these keys. Every key may be left out. `--set a.b=c`",
        "overrides one of them; an unknown key is refused, and the nearest known one is named.",
        "",
    ]
    return NOTE + "\n".join([*lines, *keys_of(config.TrainRecipe)])


def transfer_page() -> str:
    """Describe every key of a recipe of ``transfer models``; sections of other recipes are left to their page."""
    lines = [
        "# Recipe keys of transfer across models",
        "",
        "A recipe of `softprompts transfer models` is a YAML file with these keys; `--set a.b=c` overrides one.",
        "`source_model`, `target_model`, `match.task`, `optimizer`, `schedule` and `training` are the sections of",
        "[other recipes](recipe.md).",
        "",
    ]
    return NOTE + "\n".join([*lines, *keys_of(config.TransferRecipe)])


def keys_of(recipe: type) -> Iterator[str]:
    """Write the tables of a recipe's sections: those whose keys are defined beside it."""
    source = Path(inspect.getfile(recipe))
    notes = attribute_notes(source.read_text(encoding="utf-8"))
    for path, cls in sections(recipe):
        if Path(inspect.getfile(cls)) != source:
            continue
        lines = []
        title = f"`{path}`" if path else "Top level"
        lines += [f"## {title}", "", inspect.getdoc(cls) or "", ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            note = notes.get((cls.__name__, item.name), "")
            if dataclasses.is_dataclass(hints[item.name]):
                inner = f"{path}.{item.name}" if path else item.name
                elsewhere = "" if Path(inspect.getfile(hints[item.name])) == source else "recipe.md"
                anchor = "" if elsewhere else f"#{inner.replace('.', '')}"
                lines.append(f"| `{item.name}` | section | | see [`{inner}`]({elsewhere}{anchor}) |")
            else:
                kind, default = type_words(hints[item.name]), default_words(item)
                lines.append(f"| `{item.name}` | {kind} | `{default}` | {cell(note).replace('`None`', '`null`')} |")
        yield from [*lines, ""]


def sections(cls: type, path: str = "") -> Iterator[tuple[str, type]]:
    """Walk the dataclasses of a recipe, each with the path of its section."""
    yield path, cls
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from sections(hints[item.name], f"{path}.{item.name}" if path else item.name)


def attribute_notes(source: str) -> dict[tuple[str, str], str]:
    """Read the string below each field, which Python itself does not keep."""
    notes = {}
    for cls in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for field, after in zip(cls.body, cls.body[1:], strict=False):
            is_note = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if is_note and isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                notes[cls.name, field.target.id] = inspect.cleandoc(str(after.value.value))
    return notes


def type_words(hint: Any) -> str:
    """Say in words what a value of this type looks like in YAML."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{item}`" for item in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {type_words(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {', '.join(map(type_words, arguments))}"
    if origin is Mapping:
        return "mapping of keys to values"
    if dataclasses.is_dataclass(hint):
        return f"mappings with {' and '.join(f'`{item.name}`' for item in dataclasses.fields(hint))}"
    if arguments:
        return " or ".join(type_words(argument) for argument in arguments)
    return {int: "whole number", float: "number", str: "text", bool: "`true` or `false`", type(None): "`null`"}[hint]


def default_words(item: dataclasses.Field[Any]) -> str:
    """Write a default as YAML has it."""
    value = item.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value) or "''"


def cell(text: str) -> str:
    """Fit a note into one cell of a table."""
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


# --- presets ---------------------------------------------------------------------------------------------------------


def presets_page() -> str:
    """Write every preset down: its values, and what depends on the recipe."""
    lines = [
        "# Presets",
        "",
        "`preset: NAME` at the top of a recipe, or `softprompts train RECIPE --preset NAME`. The recipe's own keys win",
        "over the preset's, `--set` wins over both, and what neither names has its [default](recipe.md). The resolved",
        "recipe, with the name of its preset, is kept with every run and prompt.",
        "",
    ]
    for name, preset in PRESETS.items():
        lines += [f"## `{name}`", "", preset.description, "", "| key | value |", "|---|---|"]
        lines += [f"| `{key}` | {yaml_words(value)} |" for key, value in preset.values.items()]
        for case in preset.cases:
            where = " and ".join(
                f"`{key}` is {', '.join(map(yaml_words, wanted)) if isinstance(wanted, tuple) else yaml_words(wanted)}"
                for key, wanted in case.where.items()
            )
            lines += ["", f"Where {where}:", "", "| key | value |", "|---|---|"]
            lines += [f"| `{key}` | {yaml_words(value)} |" for key, value in case.values.items()]
        lines.append("")
    return NOTE + "\n".join(lines)


def yaml_words(value: Any) -> str:
    """Write a value as YAML has it."""
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value).strip(chr(34))}`"


# --- command line ----------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Describe every verb that is there, with its arguments and options."""
    lines = [
        "# Command line",
        "",
        "`softprompts [--debug] VERB ...`. Exit codes: 0 done, 2 a mistake that the message tells how to mend,",
        "130 interrupted, 1 anything else. `--debug` (or `SOFTPROMPTS_DEBUG=1`) shows the traceback of every error.",
        "",
    ]
    for verb in VERBS:
        if importlib.util.find_spec(verb.module) is not None:
            function = verb_function(verb)
            lines += [f"## `softprompts {verb.name}`", "", prose(function), "", *parameters(function), ""]
    return NOTE + "\n".join(lines)


def prose(function: Callable[..., Any]) -> str:
    """The function's docstring without the sections that are for programmers."""
    text = inspect.getdoc(function) or ""
    for heading in ("\nArgs:", "\nRaises:", "\nReturns:"):
        text = text.split(heading)[0]
    return text.replace("``", "`").strip()


def parameters(function: Callable[..., Any]) -> list[str]:
    """One row per argument and option."""
    app = typer.Typer(add_completion=False)
    app.command()(function)
    rows = ["| argument or option | default | meaning |", "|---|---|---|"]
    for item in typer.main.get_command(app).params:
        if item.name == "help":
            continue
        is_option = item.param_type_name == "option"
        words = [*item.opts, *item.secondary_opts] if is_option else [item.name.upper()]
        names = ", ".join(f"`{word}`" for word in words)
        empty = item.default is None or item.default is False or item.default in ((), [], ...)
        default = "required" if item.required else "" if empty or callable(item.default) else f"`{item.default}`"
        rows.append(f"| {names} | {default} | {cell(getattr(item, 'help', None) or '')} |")
    return rows


# --- errors ----------------------------------------------------------------------------------------------------------


def errors_page() -> str:
    """The tree of errors, as the module draws it."""
    tree = [line[4:] for line in (errors.__doc__ or "").splitlines() if line.startswith("    ")]
    lines = [
        "# Errors",
        "",
        "Each error also is the standard error in parentheses, so `except ValueError` keeps working. The command line",
        "prints the message as one paragraph and exits with 2 (an interruption with 130).",
        "",
        "```",
        *tree,
        "```",
        "",
        "```python",
        "from softprompts.errors import PromptMismatchError, SoftPromptsError",
        "```",
        "",
    ]
    return NOTE + "\n".join(lines)


# --- tasks -----------------------------------------------------------------------------------------------------------


def tasks_page() -> str:
    """The catalog as a table: what a task is, where its splits come from, how it is judged."""
    lines = [
        "# Tasks",
        "",
        "`task.name` of a recipe, `--task` of `evaluate` and `score`. *Picks* is what the best checkpoint is chosen",
        "by. A split is read from the data folder (environment variable `SOFTPROMPTS_DATA`) where it is there, else",
        "from the Hugging Face hub; `task.train=FILE`, `task.dev=FILE` and `task.test=FILE` take a file instead.",
        "",
        "| task | what | splits | metrics | picks | decoding | hub |",
        "|---|---|---|---|---|---|---|",
    ]
    settings = []
    for name in load_catalog():
        task = get_task(name)
        hub = sorted({place.removeprefix("datasets:").split("?")[0] for place in task.source.hub.values()})
        metrics = ", ".join(f"`{metric}`" for metric in task.metrics)
        decoding = f"beam {task.decoding.beams}" if task.decoding.strategy == "beam" else task.decoding.strategy
        splits = ", ".join(task.splits) or "yours"
        cells = [f"`{name}`", cell(task.description), splits, metrics, f"`{task.selection}`"]
        where = f"`{hub[0]}`" if hub else "in this package" if task.source.packaged else ""
        lines.append(f"| {' | '.join([*cells, f'{decoding}, {task.decoding.max_new_tokens} tokens', where])} |")
        settings += [(name, key, setting) for key, setting in task.settings.items()]
    lines += [
        "",
        "## Settings",
        "",
        "Named settings of the papers (`task.setting.name`). Others are values: `task.setting.low_data`,",
        "`task.setting.train_on`, `task.setting.judge_task`; see [`task.setting`](recipe.md#tasksetting).",
        "What is trained on is never judged.",
        "",
        "| task | setting | trained on | judged on |",
        "|---|---|---|---|",
    ]
    for name, key, setting in settings:
        trained = ", ".join(setting.train_on) or "all"
        judged = ", ".join(setting.judge_on) or "the rest"
        lines.append(f"| `{name}` | `{key}` | {cell(trained)} | {cell(judged)} |")
    return NOTE + "\n".join([*lines, ""])


PAGES = {
    "recipe.md": recipe_page,
    "transfer-recipe.md": transfer_page,
    "presets.md": presets_page,
    "cli.md": cli_page,
    "errors.md": errors_page,
    "tasks.md": tasks_page,
}

if __name__ == "__main__":
    main()
