"""``softprompts convert SOURCE TARGET``: a saved prompt into the format of PEFT, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softprompts.cli.output import JsonOption, console_for, write_json

__all__ = ["convert"]


def convert(
    source: Annotated[Path, typer.Argument(help="Directory of a saved prompt, ours or PEFT's.")],
    target: Annotated[Path, typer.Argument(help="Directory to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="M", help="From PEFT: the model that the prompt is for. PEFT does not say it for certain."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier conversion wrote.")] = False,
    json: JsonOption = None,
) -> None:
    """Convert a prompt of ours for PEFT, or a prompt of PEFT for us; SOURCE tells which."""
    from softprompts.errors import ConfigError
    from softprompts.storage import load_prompt, save_prompt
    from softprompts.storage.peft import export_peft, import_peft, is_peft

    console = console_for(json)
    if is_peft(source):
        if model is None:
            raise ConfigError(f"'{source}' comes from PEFT: say with --model which model it was made for")
        from softprompts.cli.loading import load_frozen
        from softprompts.config import ModelConfig

        frozen = load_frozen(ModelConfig(name_or_path=model))
        prompt = import_peft(source, frozen)
        written = save_prompt(prompt, target, frozen=frozen, overwrite=overwrite)
        form = "softprompts"
    else:
        loaded = load_prompt(source)
        prompt = loaded.prompt
        written = export_peft(prompt, target, model_name=loaded.info.model.name, overwrite=overwrite)
        form = "peft"
    console.print(f"{prompt.kind} of length {prompt.length}, in the format of {form}, lies in {written}", markup=False)
    write_json(json, {"format": form, "kind": prompt.kind, "length": prompt.length, "directory": written})
