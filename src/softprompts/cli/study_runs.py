"""What ``softprompts study`` does with one lot of cells: train, transfer, judge, with the code of the other verbs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompts.config import TrainRecipe
    from softprompts.evaluation.evaluate import EvaluationReport
    from softprompts.studies.catalog import Cell, Plan
    from softprompts.studies.sweep import Found

__all__ = ["CellRunner"]

_TRAINED = "train.json"
_SAMPLES = 3
"""Records of every cell that the report shows."""
_TRAINING_FACTS = ("steps", "best_step", "seconds", "trained_parameters", "stored_parameters")
"""What training says of itself that is reported like a metric."""

_UNTRAINED: Mapping[str, Any] = {
    "method": "few_shot",
    "saved": None,
    "metrics": {},
    "reference_loss": None,
    "stored_parameters": 0,
    "trained_parameters": 0,
    "seconds": 0.0,
}
"""What training says of a method that trains nothing."""


class CellRunner:
    """Runs the cells of one study; a runner of :func:`softprompts.studies.sweep.sweep`.

    Args:
        plan: The study.
        directory: Its folder.
    """

    def __init__(self, plan: Plan, directory: Path) -> None:
        self._plan = plan
        self._runs = directory.resolve() / "runs"
        self._lots = plan.lots()

    def __call__(self, missing: Sequence[Cell], folder: Path) -> Iterable[tuple[Cell, Found]]:
        """Run the missing cells of one lot; what an earlier, killed call has trained is used."""
        folder = folder.resolve()
        setting = missing[0].setting
        if setting.transfer is not None:
            return ((cell, self._transferred(cell, folder)) for cell in missing)
        if setting.members is not None:
            return ((cell, self._ensemble(cell, folder)) for cell in missing)
        return self._trained(missing, folder)

    def _trained(self, missing: Sequence[Cell], folder: Path) -> Iterator[tuple[Cell, Found]]:
        from softprompts.errors import SoftPromptsError

        lot = self._lots[missing[0].lot]
        places = {cell.name: folder / f"seed-{cell.seed}" for cell in lot}
        together, others = False, [cell for cell in lot if cell not in missing]
        # Once one of them has failed, each is on its own.
        if len(missing) > 1 and all((places[cell.name] / _TRAINED).exists() for cell in others):
            with contextlib.suppress(SoftPromptsError):  # a recipe that cannot be made says so when its turn comes
                recipes = [self._recipe(cell, places[cell.name]) for cell in missing]
                together = all(recipe.method == "prompt" for recipe in recipes)
        if together:
            _train_together(recipes, [cell.seed for cell in missing], folder)
        for cell in missing:
            place = places[cell.name]
            recipe = self._recipe(cell, place)
            if recipe.method == "few_shot":
                yield cell, self._judged(recipe, _UNTRAINED)
                continue
            if not together:
                _train_alone(recipe)
            found = json.loads((place / _TRAINED).read_text(encoding="utf-8"))
            yield cell, self._judged(recipe, found) if found["saved"] else _diverged(self._facts(found))

    def _recipe(self, cell: Cell, place: Path) -> TrainRecipe:
        from softprompts.studies.catalog import recipe_of

        start = None if cell.setting.start is None else str(self._prompt_of(cell.setting.start, cell))
        return recipe_of(self._plan, cell, str(place), start)

    def _prompt_of(self, name: str, cell: Cell) -> Path:
        """Find the prompt that another setting trained on the same task with the same seed."""
        from softprompts.errors import ConfigError, DataNotFoundError
        from softprompts.studies.catalog import Cell

        source = Cell(self._plan.setting(name), cell.task, cell.seed)
        path = self._runs / source.lot / f"seed-{cell.seed}" / _TRAINED
        saved = json.loads(path.read_text(encoding="utf-8"))["saved"] if path.exists() else None
        if saved is None:
            said = f"'{cell.setting.name}' needs the prompt of '{name}'"
            if not path.exists():
                raise DataNotFoundError(f"{said}, which was not trained")
            raise ConfigError(f"{said} with seed {cell.seed}, whose training left none")
        return Path(saved)

    def _judged(self, recipe: TrainRecipe, trained: Mapping[str, Any]) -> Found:
        """Judge what was trained in every way that the study names."""
        from softprompts.cli.evaluate import report_of
        from softprompts.config import replaced
        from softprompts.training import read_events

        metrics: dict[str, float | None] = {key: trained.get(key) for key in _TRAINING_FACTS}
        metrics |= {f"dev/{name}": value for name, value in trained["metrics"].items()}
        samples, records, model = [], {}, None
        whole = trained["method"] in ("fine_tuning", "few_shot")  # a model of its own, or the frozen one alone
        prompt = None if whole else Path(trained["saved"])
        for judge in self._plan.scale.judges:
            values: dict[str, Any] = {"model.gradient_checkpointing": False, **judge.set}
            if trained["method"] == "fine_tuning":
                values["model.name_or_path"] = trained["saved"]
            report = report_of(replaced(recipe, values), judge.split, prompt, 0, _quiet())
            before = f"{judge.name}/" if judge.name else ""
            metrics |= {f"{before}{name}": _finite(value) for name, value in _values(report).items()}
            samples += [{"judge": judge.name, **sample} for sample in _samples(report)]
            records[judge.name or judge.split] = len(report.predictions)
            model = report.facts["model"]
        log = Path(recipe.output_dir) / "events.jsonl"
        history = _history(read_events(log)) if log.exists() else []
        metrics["gained_early"] = _gained_early(history, trained["reference_loss"], recipe.training.max_steps)
        return {
            "metrics": metrics,
            "train": self._facts(trained),
            "records": records,
            "model": model,
            "samples": samples,
            "history": history,
        }

    def _facts(self, trained: Mapping[str, Any]) -> dict[str, Any]:
        """What training said; folders as the study sees them: where it lies on this machine is nobody's business."""
        facts = {key: value for key, value in trained.items() if key != "metrics"}
        for key in ("saved", "output_dir"):
            if facts.get(key) is not None:
                facts[key] = Path(facts[key]).relative_to(self._runs.parent).as_posix()
        return facts

    def _ensemble(self, cell: Cell, folder: Path) -> Found:
        """Train the members in one pass and judge average, best and all together."""
        import yaml

        from softprompts.cli import ensemble
        from softprompts.config import to_dict
        from softprompts.storage.directory import replace_file

        members, place = cell.setting.members or 0, folder / f"seed-{cell.seed}"
        recipe = self._recipe(cell, place / "run")
        first = dataclasses.replace(recipe.training, seed=members * cell.seed)
        plain = json.loads(json.dumps(to_dict(dataclasses.replace(recipe, training=first))))
        path = replace_file(place / "recipe.yaml", yaml.safe_dump(plain, sort_keys=False).encode())
        said, judge = place / _TRAINED, self._plan.scale.judges[0]
        with contextlib.redirect_stdout(None):
            if not said.exists():
                ensemble.train(path, members, resume=_started(place), json=str(place / "ensemble-train.json"))
                (place / "ensemble-train.json").replace(said)
            judged, changes = place / "judged.json", [f"{key}={json.dumps(value)}" for key, value in judge.set.items()]
            ensemble.evaluate(place / "run", split=judge.split, set_=changes, output=place, json=str(judged))
        found = json.loads(judged.read_text(encoding="utf-8"))
        trained = json.loads(said.read_text(encoding="utf-8"))
        metrics: dict[str, float | None] = {"seconds": trained["seconds"]}
        for name, score in found["metrics"].items():
            metrics |= {f"{way}/{name}": score[way]["value"] for way in ("average", "best", "ensemble")}
        train = {"members": members, "seconds": trained["seconds"]}
        return {"metrics": metrics, "train": train, "model": found["model"], "samples": []}

    def _transferred(self, cell: Cell, folder: Path) -> Found:
        """Bring another setting's prompt to this one's model, and judge it there."""
        from softprompts.cli.transfer_models import transfer_models
        from softprompts.config import TransferRecipe, decode, to_dict
        from softprompts.studies.catalog import Cell, recipe_of

        setting, place = cell.setting, folder / f"seed-{cell.seed}"
        assert setting.start is not None
        assert setting.transfer is not None
        source = recipe_of(self._plan, Cell(self._plan.setting(setting.start), cell.task, cell.seed), "")
        target = recipe_of(self._plan, cell, "")
        own = () if setting.own is None else (str(self._prompt_of(setting.own, cell)),)
        judge, transfer = self._plan.scale.judges[0], dict(setting.transfer)
        limit = judge.set.get("task.limit_dev", target.task.limit_dev)
        content = {
            "source_model": to_dict(source.model),
            "target_model": to_dict(target.model),
            "prompts": [str(self._prompt_of(setting.start, cell))],
            "optimizer": to_dict(target.optimizer),
            "schedule": to_dict(target.schedule),
            "training": to_dict(target.training),
            **transfer,
            "judge": {"split": judge.split, "limit": limit, "own": own, **transfer.get("judge", {})},
            "output_dir": str(place),
        }
        said = transfer_models(decode(TransferRecipe, content), resume=(place / "recipe.yaml").exists())
        found = said["prompts"][0]
        metrics = {key: found[key]["value"] for key in ("none", "transferred", "own") if found.get(key)}
        metrics |= {"recovery": found["recovery"]}
        train = {"method": transfer.get("method", "match")}
        return {"metrics": metrics, "train": train, "model": said["target_model"], "samples": []}


def _train_together(recipes: Sequence[TrainRecipe], seeds: Sequence[int], folder: Path) -> None:
    """Train one prompt per recipe in one pass; each leaves its ``train.json``, once all are done."""
    from softprompts.cli.train import run_recipe
    from softprompts.config import to_dict
    from softprompts.config.merging import flat

    places = [folder / f"seed-{seed}" for seed in seeds]
    if all((place / _TRAINED).exists() for place in places):
        return
    values = [flat(to_dict(recipe)) for recipe in recipes]
    varying = [key for key in values[0] if key != "output_dir" and any(own[key] != values[0][key] for own in values)]
    members = tuple(
        {"name": place.name, **{key: own[key] for key in varying}} for place, own in zip(places, values, strict=True)
    )
    config = dataclasses.replace(recipes[0], output_dir=str(folder), together=members)
    found = run_recipe(config, resume=any(map(_started, places)))["prompts"]
    for place in places:
        _keep(place, found[place.name])


def _train_alone(recipe: TrainRecipe) -> None:
    from softprompts.cli.train import run_recipe

    place = Path(recipe.output_dir)
    if not (place / _TRAINED).exists():
        _keep(place, run_recipe(recipe, resume=_started(place)))


def _keep(place: Path, found: Mapping[str, Any]) -> None:
    from softprompts.storage.directory import replace_file

    plain = {key: _finite(value) if isinstance(value, float) else value for key, value in found.items()}
    plain["metrics"] = {name: _finite(value) for name, value in found["metrics"].items()}
    replace_file(place / _TRAINED, json.dumps(plain, default=str).encode())


def _started(place: Path) -> bool:
    """Whether a killed run left a state to go on from."""
    return any(place.rglob("last.pt"))


def _diverged(trained: dict[str, Any]) -> Found:
    message = f"training left nothing to judge: {trained['reason']} after {trained['steps']} steps"
    return {"error": {"type": "DivergedError", "message": message, "trace": ""}, "train": trained}


def _values(report: EvaluationReport) -> dict[str, float]:
    """Metrics by name, and the mean of those that can be averaged as ``score``."""
    from softprompts.errors import ConfigError
    from softprompts.evaluation.classification import RANKED
    from softprompts.evaluation.selection import averageable

    found = {name: metric.value for name, metric in report.metrics.items()}
    for before in ("", RANKED):
        names = [name.removeprefix(before) for name in report.scores if name.startswith(before)]
        with contextlib.suppress(ConfigError):
            own = averageable([name for name in names if "/" not in name])
            found.setdefault("score", sum(found[f"{before}{name}"] for name in own) / len(own))
    return found


def _samples(report: EvaluationReport) -> list[dict[str, Any]]:
    keys = ("input", "prediction", "ranked", "references")
    return [{key: one[key] for key in keys if key in one} for one in report.samples()[:_SAMPLES]]


def _history(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The validations, each with the seconds of training before it."""
    found, seconds = [], 0.0
    for event in events:
        if event["event"] == "step":
            seconds = event.get("seconds", seconds)
        elif event["event"] == "validation":
            found.append({"step": event["step"], "seconds": seconds, **event["metrics"]})
    return found


def _gained_early(history: Sequence[Mapping[str, Any]], reference_loss: float | None, steps: int) -> float | None:
    """Share of what training gains in dev loss over the model alone that is there after a quarter of the steps.

    Measured at the first validation from there on; ``None`` where nothing was gained.
    """
    losses = [(one["step"], one["loss"]) for one in history if one.get("loss") is not None]
    early = next((loss for step, loss in losses if 4 * step >= steps), None)
    if early is None or reference_loss is None:
        return None
    gained = reference_loss - min(loss for _, loss in losses)
    return (reference_loss - early) / gained if gained > 0 else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _quiet() -> Any:
    from rich.console import Console

    return Console(quiet=True)
