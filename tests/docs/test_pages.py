"""What the pages show can be typed: verbs, options, imports and recipe keys exist."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

import softprompts
from softprompts.cli.main import VERBS, build_app, verb_function
from softprompts.config import TrainRecipe, TransferRecipe, decode, parse_override
from softprompts.tasks.catalog import load_catalog

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
APP = build_app()
AVAILABLE = {command.name for command in [*APP.registered_commands, *APP.registered_groups]}


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        fenced = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for block in fenced:
            yield str(page.relative_to(ROOT)), block


def commands(program: str) -> list[str]:
    lines = [line.split("  #")[0].split("    #")[0].strip() for _, block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.split(" ")[0] == program]


def test_the_pages_show_commands_recipes_and_code():
    assert len(commands("softprompts")) >= 5
    assert len(commands("make")) >= 4
    assert len(list(blocks("yaml"))) >= 3
    assert len(list(blocks("python"))) >= 2


@pytest.mark.parametrize("line", sorted({line for line in commands("softprompts") if "VERB" not in line}))
def test_command_has_the_verb_and_the_options_it_is_shown_with(line: str):
    name, *words = shlex.split(line)[1:]
    if name == "--help":
        return
    if name not in AVAILABLE:
        pytest.skip(f"{name} is not in this build")
    verbs = {verb.name: verb for verb in VERBS}
    verb = verbs[name] if name in verbs else verbs[f"{name} {words[0]}"]
    app = typer.Typer(add_completion=False)
    app.command()(verb_function(verb))
    known = {option for item in typer.main.get_command(app).params for option in item.opts}
    assert {word for word in words if word.startswith("--")} <= known
    for flag, value in itertools.pairwise(words):
        if flag == "--set":
            of = TransferRecipe if verb.name == "transfer models" else TrainRecipe
            keys, read = parse_override(value, of)
            nested: object = read
            for key in reversed(keys):
                nested = {key: nested}
            assert decode(of, nested) != of()


@pytest.mark.parametrize("line", sorted(set(commands("make"))))
def test_make_has_the_target(line: str):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE)


@pytest.mark.parametrize(("page", "block"), list(blocks("yaml")))
def test_recipe_is_accepted(page: str, block: str):
    content = yaml.safe_load(block)
    if "source_model" in content:
        assert decode(TransferRecipe, content).prompts, page
        return
    assert decode(TrainRecipe, content).task.name in set(load_catalog()), page


@pytest.mark.parametrize(("page", "block"), list(blocks("python")))
def test_code_names_what_exists(page: str, block: str):
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], page
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sp":
            assert node.attr in softprompts.__all__, page
