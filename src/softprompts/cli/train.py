"""``softprompts train RECIPE``: a prompt, several prompts at once, or a whole model as their yardstick."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from softprompts.cli.loading import TargetOption, TemplateOption, template_overrides
from softprompts.cli.output import JsonOption, console_for, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from softprompts.cli.training_runs import Plan, PreparedRun
    from softprompts.config import TrainRecipe
    from softprompts.models import FrozenLM
    from softprompts.training import Event, FitResult, PromptObjective

__all__ = ["run_recipe", "train"]


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file, for example recipes/prefix_tuning/e2e.yaml.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one value of the recipe; repeatable.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", metavar="NAME", help="Values that hold where the recipe gives none; docs: presets."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="N,N,...", help="One prompt per seed, trained together.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="A.B=C,D,...", help="One prompt per value, or combination of values, together."),
    ] = None,
    format: TemplateOption = None,
    target: TargetOption = None,
    from_library: Annotated[
        Path | None,
        typer.Option("--from-library", metavar="DIR", help="Start from the best prompt of a folder, of another task."),
    ] = None,
    by: Annotated[
        str, typer.Option("--by", help="What is best: zero-shot (score on dev), or a similarity: cosine, neurons, ...")
    ] = "zero-shot",
    like: Annotated[
        Path | None, typer.Option("--like", metavar="DIR", help="For a similarity: a prompt of the task itself.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint, exactly.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="The run's folder, instead of the recipe's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how much memory training would take; train and write nothing.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Train what a recipe describes, keep the best on the dev split, and save it.

    The folder holds prompt/ (or model/ for a fine-tuned model), recipe.yaml with every setting, events.jsonl and the
    checkpoints. Stop with Ctrl-C at any time: the state is saved, and the same command with --resume goes on exactly.
    Several prompts (--seeds, --vary, or the recipe's list "together") share one model and its forward passes, and each
    gets such a folder of its own, as if it had been trained alone.
    """
    from softprompts.config import TrainRecipe, load_recipe, varied

    named = [f"preset={preset}"] if preset is not None else []
    config = load_recipe(recipe, TrainRecipe, [*named, *template_overrides(format, target), *(set_ or [])])
    if from_library is not None:
        from softprompts.cli.transfer_tasks import warm_start

        config = warm_start(config, from_library, by, like)
    config = varied(config, seeds, vary or [])
    if output is not None:
        config = dataclasses.replace(config, output_dir=str(output))
    console = console_for(json)
    if dry_run:
        from softprompts.cli.dry_run import dry_run as foretell

        result = foretell(config, console)
    else:
        result = run_recipe(config, resume=resume, console=console)
        _conclude(result, console)
    write_json(json, result)


def run_recipe(config: TrainRecipe, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Train what a recipe describes.

    Args:
        config: The recipe.
        resume: Go on from the last checkpoint in its ``output_dir``, if there is one.
        console: Where progress is shown; ``None`` shows nothing.

    Returns:
        What ``--json`` writes: plain data. Of a recipe with ``together``: this per prompt, below ``prompts``.

    Raises:
        SoftPromptsError: Any of the errors of :mod:`softprompts.errors` that a recipe can lead to.
    """
    from softprompts.cli.training_runs import plan
    from softprompts.config import member_recipes
    from softprompts.folder_lock import alone_in

    members = member_recipes(config) if config.together else {"": config}
    plans = [plan(member, name) for name, member in members.items()]
    with alone_in(Path(config.output_dir), *(one.directory for one in plans)):
        return _run(config, plans, resume, console)


def _run(config: TrainRecipe, plans: Sequence[Plan], resume: bool, console: Console | None) -> dict[str, Any]:
    from softprompts.cli.loading import load_frozen
    from softprompts.cli.training_runs import prepare, save, write_recipes
    from softprompts.training import refuse_unfinished_run

    def refuse_unfinished() -> None:
        for one in plans:
            refuse_unfinished_run(one.directory, one.config.training)

    write_recipes([config, *(one.config for one in plans if one.name)], resume, refuse_unfinished)
    frozen = load_frozen(config.model)
    runs = prepare(plans, frozen)
    if _is_compiled(config, frozen):
        for model in {run.objective.prompted.frozen for run in runs}:  # the frozen one, or its copy that is tuned
            model.compile()
    if console is not None:
        _introduce(runs, frozen, console)
    results = _fit(config, runs, resume, console)
    saved = {run.plan.name: save(run, frozen, result) for run, result in zip(runs, results, strict=True)}
    if not config.together:
        return saved[""]
    seconds, tokens = sum(result.seconds for result in results), sum(result.tokens for result in results)
    return {
        "verb": "train",
        "model": frozen.name,
        "output_dir": config.output_dir,
        "prompts": saved,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds if seconds else None,
    }


def _conclude(result: Mapping[str, Any], console: Console) -> None:
    """Say how it went and where the result is."""
    for name, one in result["prompts"].items() if "prompts" in result else [("", result)]:
        numbers = "  ".join(f"{metric} {value:.4g}" for metric, value in one["metrics"].items())
        best = f"; best on dev at step {one['best_step']}: {numbers}" if numbers else ""
        of = f"{name}: " if name else ""
        console.print(f"{of}{one['steps']} steps in {one['seconds']:.0f} s ({one['reason']}){best}", markup=False)
    console.print(f"saved in {result['saved'] if 'saved' in result else result['output_dir']}", markup=False)


def _is_compiled(config: TrainRecipe, frozen: FrozenLM) -> bool:
    from softprompts.models.precision import worth_compiling

    if config.model.compile != "auto":
        return config.model.compile == "yes"
    return worth_compiling(frozen.device, frozen.training_dtype, config.training.max_steps)


def _introduce(runs: Sequence[PreparedRun], frozen: FrozenLM, console: Console) -> None:
    for run in runs:
        rows, trained = run.rows, run.trained_parameters
        of = f"{run.plan.name}: " if run.plan.name else ""
        console.print(
            f"{of}{run.plan.task.name}: {len(rows.train)} rows to train on, {len(rows.dev)} dev; {trained:,} "
            f"parameters to train, {100 * trained / frozen.parameter_count:.3g} % of {frozen.name}; loss without them "
            f"{rows.reference_loss:.4f}",
            markup=False,
        )
        if rows.kept_bytes:
            console.print(
                f"{of}keys and values of the inputs are kept: {rows.kept_bytes / 2**20:,.0f} MiB", markup=False
            )


def _fit(config: TrainRecipe, runs: Sequence[PreparedRun], resume: bool, console: Console | None) -> list[FitResult]:
    """Train all runs, with their listeners."""
    from softprompts.cli.validation import validator
    from softprompts.training import SharedPasses, fit_together

    passes = None
    if len(runs) > 1:
        objectives = [cast("PromptObjective", run.objective) for run in runs]
        passes = SharedPasses(objectives, rows_per_pass=config.training.rows_per_pass)
    with ExitStack() as stack:
        listeners = _listeners([run.plan for run in runs], console, stack)
        return fit_together(
            [run.member(listener) for run, listener in zip(runs, listeners, strict=True)],
            gradients=passes.gradients if passes is not None else None,
            validate=validator(runs, passes),
            resume=resume,
        )


def _listeners(plans: Sequence[Plan], console: Console | None, stack: ExitStack) -> list[Callable[[Event], None]]:
    """Open TensorBoard for every run and one progress line for all of them."""
    from softprompts.training import show_progress, show_shared_progress, to_tensorboard

    shown: Callable[[str, Event], None] | None = None
    if console is not None and len(plans) > 1:
        steps = {one.name: one.config.training.max_steps for one in plans}
        shown = stack.enter_context(show_shared_progress(console, steps))
    elif console is not None:
        alone = stack.enter_context(
            show_progress(console, plans[0].config.training.max_steps, score=plans[0].selection.metric)
        )
        shown = lambda name, event: alone(event)  # noqa: E731

    def listener(one: Plan) -> Callable[[Event], None]:
        board = stack.enter_context(to_tensorboard(one.directory / "tensorboard"))

        def on_event(event: Event) -> None:
            board(event)
            if shown is not None:
                shown(one.name, event)

        return on_event

    return [listener(one) for one in plans]
