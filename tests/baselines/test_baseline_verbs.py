"""The baselines from the command line: the same recipe, the same verbs, the same keys in what they report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from softprompts.cli.train import run_recipe
from softprompts.config import TrainRecipe
from softprompts.models import FrozenLM


def test_top_layers_are_trained_saved_small_and_judged_like_a_prompt(
    recipe: Callable[..., TrainRecipe], command: Callable[..., str], world: Path
) -> None:
    prompt = run_recipe(recipe(evaluation={"selection": "loss"}, output_dir=str(world / "prompt")))
    result = run_recipe(
        recipe(method="top_layers", baseline={"top_layers": {"embeddings": False}}, evaluation={"selection": "loss"})
    )
    assert set(result) == set(prompt)
    assert result["stored_parameters"] == result["trained_parameters"] < result["model_parameters"] / 2
    assert result["metrics"]["loss"] < result["reference_loss"]
    assert result["peak_memory_bytes"] > 10_000_000
    assert Path(result["saved"]).name == "delta"

    reports = [
        json.loads(command("evaluate", "--prompt", one["saved"], "--split", "dev", "--json", "-"))
        for one in (prompt, result)
    ]
    assert [set(one) for one in reports] == [set(reports[0])] * 2
    assert [one["method"] for one in reports] == ["prompt", "top_layers"]
    assert [one["stored_parameters"] for one in reports] == [3 * 32, result["stored_parameters"]]
    for one, trained in zip(reports, (prompt, result), strict=True):
        assert one["metrics"]["loss"]["value"] == pytest.approx(trained["metrics"]["loss"], rel=1e-5)
    assert reports[0]["model"] == reports[1]["model"]

    (world / "lines.txt").write_text("fine film\nno story\n")
    alone = command("generate", world / "lines.txt", "--prompt", result["saved"])
    assert alone.count("\n") == 2
    (world / "null.txt").write_text('{"prompt": null, "input": "fine film"}\n')
    assert "leave --prompt out" in command("generate", world / "null.txt", "--prompt", result["saved"], code=2)
    both = ["--prompt", result["saved"], "--prompt", prompt["saved"]]
    (world / "named.txt").write_text('{"prompt": "delta", "input": "fine film"}\n')
    assert "only prompts can be mixed" in " ".join(command("generate", world / "named.txt", *both, code=2).split())


@pytest.mark.parametrize("method", ["prompt", "fine_tuning", "top_layers"])
def test_what_is_trained_is_what_is_compiled(
    method: str, recipe: Callable[..., TrainRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[FrozenLM] = []
    monkeypatch.setattr(FrozenLM, "compile", lambda self: compiled.append(self))
    run_recipe(recipe(method=method, model={"compile": "yes"}, evaluation={"selection": "loss"}))
    (model,) = compiled
    assert any(weight.requires_grad for weight in model.model.parameters()) == (method != "prompt")
