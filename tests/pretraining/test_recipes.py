from __future__ import annotations

from pathlib import Path

import pytest

from softprompts.config import load_recipe
from softprompts.pretraining.objectives import OBJECTIVES
from softprompts.pretraining.recipe import PretrainRecipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "pretraining").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_is_openly_licensed(path: Path) -> None:
    recipe = load_recipe(path, PretrainRecipe)
    assert recipe.corpus.sources
    for source in recipe.corpus.sources:
        assert source.objective in OBJECTIVES
        assert source.license != "unstated"
        assert not any("research_only" in file for file in source.files)


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"bundled", "tiny", "gpu_60m"}
