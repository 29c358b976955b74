"""Every recipe that the project ships can be read, and names things that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from softprompts.cli.quickstart import quickstart_recipe
from softprompts.config import TrainRecipe, load_recipe
from softprompts.evaluation.scorers import METRICS
from softprompts.pretraining.recipe import PretrainRecipe
from softprompts.tasks import get_task

RECIPES = Path(__file__).parents[1] / "recipes"
PRETRAIN = sorted((RECIPES / "pretraining").rglob("*.yaml"))
TRAIN = sorted(set(RECIPES.rglob("*.yaml")) - set(PRETRAIN))


def test_there_are_recipes() -> None:
    assert len(TRAIN) >= 4
    assert PRETRAIN


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: str(path.relative_to(RECIPES)))
def test_train_recipe(path: Path) -> None:
    recipe = load_recipe(path, TrainRecipe)
    assert get_task(recipe.task).name == recipe.task.name
    for metric in recipe.evaluation.metrics:
        METRICS.get(metric)


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_pretrain_recipe(path: Path) -> None:
    assert load_recipe(path, PretrainRecipe).training.total_tokens > 0


def test_quickstart_is_its_recipe() -> None:
    recipe = load_recipe(RECIPES / "quickstart.yaml", TrainRecipe)
    assert recipe == quickstart_recipe(Path("runs/quickstart"), steps=recipe.training.max_steps)
