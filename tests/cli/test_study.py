"""`softprompts study` on a real, tiny model: cells are what train and evaluate say; a killed one goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from softprompts.cli import study_runs
from softprompts.cli.evaluate import evaluate
from softprompts.cli.main import main
from softprompts.cli.study_runs import CellRunner
from softprompts.cli.train import run_recipe
from softprompts.studies.catalog import Plan, get_study, recipe_of
from softprompts.studies.results import read_results
from softprompts.studies.sweep import is_left_out, sweep, write_study
from tiny_study import tiny_plan
from tiny_world import animal_task, animal_world, model_section


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return animal_world(tmp_path_factory.mktemp("world"), tokenizer, "llama")


def plan_of(world: Path, **changes: Any) -> Plan:
    recipe = {
        "model": model_section(world),
        "task": animal_task(world),
        "prompt": {"kind": "embedding", "length": 3, "initializer": {"name": "uniform"}},
        "training": {"max_steps": 4, "batch_size": 2, "validate_every_steps": 1, "checkpoint_every_steps": 2},
        "evaluation": {"metrics": ["rouge_score_l"], "selection": "loss", "decoding": {"max_new_tokens": 3}},
    }
    settings: dict[str, Any] = {
        "series": [{"name": "soft"}],
        "points": [{"name": "P=3"}],
        "judges": [
            {"split": "dev"},
            {"name": "train", "split": "train", "set": {"evaluation.metrics": ["exact_match"]}},
        ],
        "metrics": ["rouge_score_l"],
        "seeds": [0, 1],
    }
    return tiny_plan(recipe=recipe, **{**settings, **changes})


def run(plan: Plan, place: Path) -> dict[str, dict[str, Any]]:
    write_study(plan, place, {"command": ""})
    return sweep(plan, place, CellRunner(plan, place))


def test_cells_are_what_train_and_evaluate_say(world: Path, tmp_path: Path):
    plan = plan_of(world)
    cells = run(plan, tmp_path / "study")
    assert sorted(cells) == ["soft--P=3--seed-0", "soft--P=3--seed-1"]
    for cell in plan.cells:
        found = cells[cell.name]
        alone = run_recipe(recipe_of(plan, cell, str(tmp_path / f"alone-{cell.seed}")))
        said = tmp_path / "said.json"
        evaluate(Path(alone["saved"]), split="dev", json=str(said))
        metrics = json.loads(said.read_text())["metrics"]
        assert found["metrics"]["loss"] == pytest.approx(metrics["loss"]["value"], rel=1e-4)
        assert found["metrics"]["rouge_score_l"] == pytest.approx(metrics["rouge_score_l"]["value"])
        assert found["metrics"]["score"] == found["metrics"]["rouge_score_l"]
        assert "train/exact_match" in found["metrics"]
        assert found["metrics"]["stored_parameters"] == 3 * 32
        assert [one["step"] for one in found["history"]] == [0, 1, 2, 3, 4][-len(found["history"]) :]
        assert found["history"][-1]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=1e-2)
        assert found["metrics"]["gained_early"] <= 1
        assert found["samples"][0]["references"] == ["moo"]
        assert (tmp_path / "study" / found["train"]["saved"]).is_dir()  # written down as the study's own folder
        assert not Path(found["train"]["saved"]).is_absolute()
        assert not Path(found["train"]["output_dir"]).is_absolute()


def test_killed_between_training_and_judging_nothing_is_trained_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_of(world)
    whole = run(plan, tmp_path / "whole")
    judged = CellRunner._judged
    calls: list[str] = []

    def killed(self: CellRunner, recipe: Any, trained: Any) -> Any:
        calls.append(recipe.output_dir)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return judged(self, recipe, trained)

    monkeypatch.setattr(CellRunner, "_judged", killed)
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "killed")
    monkeypatch.setattr("softprompts.cli.train.run_recipe", None)  # nothing is left to train
    again = run(plan, tmp_path / "killed")
    timed = ("seconds",)
    for name, cell in whole.items():
        mine = {key: value for key, value in again[name]["metrics"].items() if key not in timed}
        assert mine == {key: value for key, value in cell["metrics"].items() if key not in timed}


def test_seeds_that_are_added_are_what_they_are_alone(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(plan_of(world), tmp_path / "grown")
    trained: list[list[int]] = []
    real = study_runs._train_together
    monkeypatch.setattr(study_runs, "_train_together", lambda *given: (trained.append(list(given[1])), real(*given)))
    grown = run(plan_of(world, seeds=[0, 1, 2, 3]), tmp_path / "grown")
    assert trained == [[2, 3]]
    alone = run(plan_of(world, seeds=[2]), tmp_path / "alone")["soft--P=3--seed-2"]
    found = ([one["loss"] for one in cell["history"]] for cell in (grown["soft--P=3--seed-2"], alone))
    assert next(found) == pytest.approx(next(found))
    assert len({cell["metrics"]["loss"] for cell in grown.values()}) == 4


def test_baselines_and_starts_from_other_settings(world: Path, tmp_path: Path):
    series = [
        {"name": "tuned", "set": {"method": "fine_tuning", "optimizer.learning_rate": 1e-3}},
        {"name": "top", "set": {"method": "top_layers", "baseline.top_layers.layers": 1}},
        {
            "name": "examples",
            "set": {"method": "few_shot", "baseline.few_shot.count": 2, "baseline.few_shot.seed": "{seed}"},
        },
        {"name": "warm", "start": "soft/P=3"},
        {"name": "soft"},
    ]
    cells = run(plan_of(world, series=series, seeds=[1]), tmp_path)
    assert not any("error" in cell for cell in cells.values())
    assert cells["tuned--P=3--seed-1"]["metrics"]["stored_parameters"] > 10_000
    assert 1000 < cells["top--P=3--seed-1"]["metrics"]["stored_parameters"] < 30_000
    assert cells["examples--P=3--seed-1"]["metrics"]["loss"] > 0
    assert cells["examples--P=3--seed-1"]["metrics"]["stored_parameters"] == 0
    warm = json.loads((tmp_path / "runs/warm--P=3/seed-1/prompt/prompt.json").read_text())
    start = warm["origin"]["recipe"]["prompt"]["initializer"]
    assert start["prompt"] == str(tmp_path / "runs/soft--P=3/seed-1/prompt")


def test_a_start_that_one_seed_lacks_leaves_the_other_seeds(world: Path, tmp_path: Path):
    series = [{"name": "soft"}, {"name": "warm", "start": "soft/P=3"}]
    points = [{"name": "P=3", "set": {"training.max_steps": 1}}]
    plan = plan_of(world, series=series, points=points)
    run(plan_of(world, points=points), tmp_path / "first")
    (tmp_path / "first" / "study.json").unlink()
    (tmp_path / "first" / "runs/soft--P=3/seed-0/train.json").unlink()
    cells = run(plan, tmp_path / "first")
    assert "was not trained" in cells["warm--P=3--seed-0"]["error"]["message"]
    assert "loss" in cells["warm--P=3--seed-1"]["metrics"]


def test_ensembles_and_a_model_that_is_missing(world: Path, tmp_path: Path):
    points = [
        {"name": "three", "members": 3},
        {"name": "nowhere", "set": {"model.name_or_path": str(world / "nothing")}},
    ]
    cells = run(plan_of(world, points=points, seeds=[0]), tmp_path)
    assert cells["soft--three--seed-0"]["model"].keys() >= {"name", "fingerprint"}
    metrics = cells["soft--three--seed-0"]["metrics"]
    assert {"ensemble/rouge_score_l", "average/rouge_score_l", "best/rouge_score_l"} <= set(metrics)
    assert metrics["best/rouge_score_l"] >= metrics["average/rouge_score_l"]
    assert "nothing" in cells["soft--nowhere--seed-0"]["error"]["message"]
    assert is_left_out(cells["soft--nowhere--seed-0"])


def test_a_transfer_between_models(world: Path, tmp_path: Path):
    series = [{"name": "own"}, {"name": "moved", "start": "own/P=3", "own": "own/P=3"}]
    points = [{"name": "P=3"}, {"name": "copied", "transfer": {"method": "copy", "judge": {"measure": "loss"}}}]
    skip = ["own/copied", "moved/P=3"]
    plan = plan_of(world, series=series, points=points, skip=skip, seeds=[0], judges=[{"split": "dev"}])
    cells = run(plan, tmp_path)
    assert cells["moved--copied--seed-0"]["model"]["fingerprint"] == cells["own--P=3--seed-0"]["model"]["fingerprint"]
    metrics = cells["moved--copied--seed-0"]["metrics"]
    assert metrics["recovery"] == pytest.approx(1.0)  # to the same model, so nothing is lost
    assert metrics["transferred"] == pytest.approx(metrics["own"])


def test_the_command_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    plan = plan_of(world, seeds=[0])
    monkeypatch.setattr("softprompts.studies.catalog.get_study", lambda name: plan.study)

    def softprompts(*words: str) -> Any:
        monkeypatch.setattr("sys.argv", ["softprompts", *words])
        with pytest.raises(SystemExit) as end:
            main([*words, "--json", str(tmp_path / "said.json")])
        assert end.value.code == 0, capsys.readouterr().err
        return json.loads((tmp_path / "said.json").read_text())

    place = str(tmp_path / "study")
    foretold = softprompts("study", "tiny", "--dry-run")
    assert [row["cell"] for row in foretold["cells"]] == ["soft--P=3--seed-0"]
    assert not (tmp_path / "study").exists()
    assert softprompts("study", "tiny", "--out", place)["failed"] == []
    assert "[1/1" in capsys.readouterr().out
    done = softprompts("study", "tiny", "--out", place, "--dry-run")
    assert (done["cells"][0]["state"], done["seconds"]) == ("done", 0)
    said = softprompts("report", place)
    assert said["studies"][0]["cells"] == {"planned": 1, "done": 1, "failed": 0, "left_out": 0}
    assert (tmp_path / "study" / "report.html").exists()
    page = tmp_path / "verdicts.md"
    assert softprompts("report", str(tmp_path), "--verdicts", str(page))["written"] == str(page)
    assert "| [tiny](study/report.md) | 1 of 1 |" in page.read_text()
    assert not (tmp_path / "report.html").exists()
    assert read_results(tmp_path / "study")[0].facts["command"].startswith("softprompts ")


def test_gain_after_a_quarter_of_the_steps():
    history = [{"step": step, "loss": loss} for step, loss in ((10, 3.0), (30, 2.0), (100, 1.0))]
    assert study_runs._gained_early(history, 5.0, 100) == pytest.approx(0.75)
    assert study_runs._gained_early(history, 0.5, 100) is None
    assert study_runs._gained_early([], 5.0, 100) is None


def test_mistakes_are_one_paragraph(capsys: pytest.CaptureFixture[str]):
    for words, said in (
        (["study", "prefix-length"], "name it with --out"),
        (["study", "prefix-length", "--dry-run", "--seeds", "a"], "expected whole numbers"),
        (["report", "/nowhere"], "holds no study"),
    ):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert dataclasses.is_dataclass(get_study("prefix-length"))
