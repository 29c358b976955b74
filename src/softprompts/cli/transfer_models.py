"""Transfer across models: what ``softprompts transfer models`` makes of a recipe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from softprompts.cli.judging import Judgement
    from softprompts.cli.transfer_tasks import SavedPrompt
    from softprompts.config import TransferRecipe
    from softprompts.models import FrozenLM
    from softprompts.prompts import SoftPrompt
    from softprompts.transfer import Projector
    from softprompts.types import MetricValue

__all__ = ["transfer_models"]

_RESULT_FILE = "result.json"


@dataclasses.dataclass(frozen=True)
class _Work:
    """What all prompts of a run share."""

    recipe: TransferRecipe
    source: FrozenLM
    target: FrozenLM
    projector: Projector | None
    resume: bool
    console: Console | None


def transfer_models(recipe: TransferRecipe, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Make prompts for the target model, judge and save them.

    Args:
        recipe: What and how.
        resume: Go on where a run in ``output_dir`` was stopped: finished prompts and projectors are kept.
        console: Where progress is shown; ``None`` shows nothing.

    Returns:
        What ``--json`` writes: plain data.

    Raises:
        SoftPromptsError: Any of the errors of :mod:`softprompts.errors` that a recipe can lead to.
    """
    from softprompts.cli.transfer_tasks import saved_prompts
    from softprompts.folder_lock import alone_in

    saved = saved_prompts(Path(place) for place in recipe.prompts)
    _check(recipe, len(saved))
    folder = Path(recipe.output_dir)
    with alone_in(folder):
        return _transfer(recipe, saved, folder, resume, console)


def _transfer(
    recipe: TransferRecipe, saved: Sequence[SavedPrompt], folder: Path, resume: bool, console: Console | None
) -> dict[str, Any]:
    from softprompts.cli.loading import load_frozen
    from softprompts.cli.output import read_json, write_json

    _keep_recipe(recipe, folder, resume)
    source, target = load_frozen(recipe.source_model), load_frozen(recipe.target_model)
    projector = None
    if recipe.method == "projector" or (recipe.method == "match" and recipe.match.start == "projector"):
        projector = _projector(recipe, source, target, resume, console)
    work = _Work(recipe, source, target, projector, resume, console)
    results = []
    for number, one in enumerate(saved):
        place = folder / one.name / _RESULT_FILE
        if not (resume and place.exists()):
            own = Path(recipe.judge.own[number]) if recipe.judge.own else None
            write_json(place, _transferred(work, one, own, folder / one.name))
        results.append(read_json(place))
    return {
        "verb": "transfer models",
        "method": recipe.method,
        "source_model": {"name": source.name, "fingerprint": source.fingerprint},
        "target_model": {"name": target.name, "fingerprint": target.fingerprint},
        "output_dir": recipe.output_dir,
        "prompts": results,
    }


def _check(recipe: TransferRecipe, prompts: int) -> None:
    from softprompts.errors import ConfigError

    if recipe.judge.own and len(recipe.judge.own) != prompts:
        raise ConfigError(
            f"judge.own names {len(recipe.judge.own)} prompts for {prompts} to be transferred; name as many"
        )
    if not 0 <= recipe.match.alpha <= 1:
        raise ConfigError(f"match.alpha is {recipe.match.alpha}, expected a number from 0 to 1")
    wants = recipe.method == "projector" or (recipe.method == "match" and recipe.match.start == "projector")
    if wants and not recipe.pairs and recipe.projector.path is None:
        raise ConfigError(
            "a projector needs something to learn from: set pairs to the prompts of other tasks, or projector.path to "
            "a trained one"
        )


def _keep_recipe(recipe: TransferRecipe, folder: Path, resume: bool) -> None:
    """Write the resolved recipe down; refuse to go on with another one."""
    import yaml

    from softprompts.config import to_dict
    from softprompts.errors import CheckpointError
    from softprompts.storage.directory import replace_file
    from softprompts.training import changed_keys

    path = folder / "recipe.yaml"
    plain = json.loads(json.dumps(to_dict(recipe)))
    if resume and path.exists():
        free = ("output_dir", "source_model.device", "target_model.device")
        changed = changed_keys(yaml.safe_load(path.read_text(encoding="utf-8")), plain)
        changed = [item for item in changed if not item.startswith(free)]
        if changed:
            raise CheckpointError(
                f"the run in '{folder}' was started with another recipe: {'; '.join(changed)}; resume with its own "
                f"('{path}'), or choose another directory"
            )
    replace_file(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode("utf-8"))


def _projector(
    recipe: TransferRecipe, source: FrozenLM, target: FrozenLM, resume: bool, console: Console | None
) -> Projector:
    """Load a projector, or train one and save it."""
    from softprompts.cli.transfer_training import train_projector
    from softprompts.transfer import load_projector
    from softprompts.transfer.projector_files import MANIFEST_FILE

    place = Path(recipe.output_dir) / "projector"
    if recipe.projector.path is not None:
        place = Path(recipe.projector.path)
    elif not (resume and (place / MANIFEST_FILE).exists()):
        train_projector(recipe, source, target, place, resume=resume, console=console)
    return load_projector(place, source=source, target=target).projector


def _transferred(work: _Work, one: SavedPrompt, own: Path | None, folder: Path) -> dict[str, Any]:
    """Transfer one prompt, judge it and save it."""
    from softprompts.cli.transfer_training import match
    from softprompts.storage import load_prompt

    recipe, source, target = work.recipe, work.source, work.target
    prompt = load_prompt(one.path, source).prompt
    matches = recipe.method == "match"
    start = _start(work, recipe.match.start if matches else recipe.method, prompt)
    trained: dict[str, Any] = {}
    final = start
    if matches:
        final, trained = match(recipe, prompt, start, source, target, folder, resume=work.resume, console=work.console)
    own_prompt = None if own is None else load_prompt(own, target).prompt
    candidates = [final, *([start] if matches else []), *([own_prompt] if own_prompt is not None else [])]
    found = _judged(recipe, one, target, candidates)
    numbers = _numbers(found, has_own=own_prompt is not None, has_start=matches)
    facts = {"name": one.name, "task": one.task, "source": str(one.path)}
    saved = _save(work, one, final, found, folder / "prompt")
    return {**facts, "saved": str(saved), **numbers, "training": trained}


def _start(work: _Work, way: str, prompt: SoftPrompt) -> SoftPrompt:
    from softprompts.transfer import copied, least_squares, projected_prompt, random_start

    seed = work.recipe.training.seed
    if way == "copy":
        return copied(prompt, work.target)
    if way == "least_squares":
        return least_squares(prompt, work.source, work.target, seed=seed)
    if way == "random":
        return random_start(prompt, work.target, seed=seed)
    assert work.projector is not None
    return projected_prompt(work.projector, prompt).fold()


def _judged(
    recipe: TransferRecipe, one: SavedPrompt, target: FrozenLM, prompts: Sequence[SoftPrompt]
) -> Judgement | None:
    """Judge on the source prompt's task; ``None`` where it does not say which that is."""
    from softprompts.cli.judging import judge
    from softprompts.cli.transfer_tasks import recipe_of

    trained_by = recipe_of(one)
    return None if trained_by is None else judge(target, prompts, trained_by.task, recipe.judge)


def _numbers(found: Judgement | None, *, has_own: bool, has_start: bool) -> dict[str, Any]:
    from softprompts.transfer import recovery

    if found is None:
        unknown = ("records", "none", "transferred", "start", "own", "recovery", "start_recovery")
        return {"measure": "", **dict.fromkeys(unknown)}
    final = found.prompts[0]
    start = found.prompts[1] if has_start else None
    own = found.prompts[-1] if has_own else None

    def recovered(value: MetricValue | None) -> float | None:
        if own is None or value is None:
            return None
        return recovery(value.value, found.none.value, own.value, higher_is_better=found.higher_is_better)

    named: Mapping[str, MetricValue | None] = {"none": found.none, "transferred": final, "start": start, "own": own}
    return {
        "measure": found.measure,
        "records": found.records,
        **{key: None if one is None else {"value": one.value, "stderr": one.stderr} for key, one in named.items()},
        "recovery": recovered(final),
        "start_recovery": recovered(start),
    }


def _save(work: _Work, one: SavedPrompt, prompt: SoftPrompt, found: Judgement | None, place: Path) -> Path:
    """Save an ordinary prompt; its recipe is that of the source prompt, on the target model."""
    from softprompts.cli.transfer_tasks import recipe_of
    from softprompts.storage import save_prompt

    recipe, source = work.recipe, work.source
    trained_by = recipe_of(one)
    if trained_by is not None:
        trained_by = dataclasses.replace(trained_by, model=recipe.target_model, output_dir=str(place.parent))
    way = f"match from {recipe.match.start}" if recipe.method == "match" else recipe.method
    origin = f"transferred by {way} from prompt {one.name[:60]} ({one.info.tensors.sha256[:16]})"
    return save_prompt(
        prompt,
        place,
        frozen=work.target,
        task=one.info.origin.task,
        recipe=trained_by,
        metrics={} if found is None else {found.measure: found.prompts[0]},
        seed=recipe.training.seed,
        source=f"{origin} of {source.name[:60]} ({source.fingerprint})",
        overwrite=True,
    )
