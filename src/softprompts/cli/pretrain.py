"""``softprompts pretrain RECIPE``: a small language model from raw text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softprompts.cli.output import JsonOption, console_for, write_json

__all__ = ["pretrain"]


def pretrain(
    recipe: Annotated[Path, typer.Argument(help="YAML file, for example recipes/pretraining/tiny.yaml.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one value of the recipe; repeatable.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in the recipe's output folder.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Train a tokenizer and a small language model, Llama-type or T5-type, from text files.

    Stop with Ctrl-C at any time: the state is saved, and the same command with --resume goes on exactly. While
    resuming, training.total_tokens may be raised or lowered; the learning rate then decays towards the new end.
    """
    from softprompts.config import load_recipe
    from softprompts.pretraining.recipe import PretrainRecipe

    parsed = load_recipe(recipe, PretrainRecipe, set_ or [])
    from softprompts.pretraining.pretrain import pretrain as run

    console = console_for(json)
    result = run(parsed, resume=resume, report=lambda line: console.print(line, markup=False))
    everything = result.held_out.get("all")
    quality = f", held-out perplexity {everything['perplexity']:.1f}" if everything else ""
    console.print(f"{result.state.tokens / 1e6:.1f} M tokens{quality}; the model lies in {result.folder}", markup=False)
    write_json(json, result.to_json())
