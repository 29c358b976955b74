"""`softprompts ensemble train|predict|evaluate`, whole, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from softprompts.cli.main import main
from softprompts.evaluation.ensemble import majority_vote
from softprompts.models import FrozenLM
from softprompts.storage import load_prompt
from softprompts.types import Example, Prediction
from tiny_world import animal_task, animal_world, model_section

LINES = ["The cat says", "The long-eared owl says", "A"]


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    return int(exit_info.value.code or 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model, records, a recipe, and an ensemble of three that was trained with it."""
    root = animal_world(tmp_path_factory.mktemp("ensemble"), tokenizer)
    recipe = {
        "model": model_section(root),
        "task": animal_task(root),
        "prompt": {"kind": "embedding", "length": 3},
        "optimizer": {"learning_rate": 0.3},
        "training": {"max_steps": 4, "batch_size": 2, "validate_every_steps": 2, "seed": 4},
        "evaluation": {"metrics": ["exact_match", "rouge_score_l"], "decoding": {"max_new_tokens": 4}},
        "output_dir": str(root / "nowhere"),
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code = run(
        "ensemble", "train", root / "recipe.yaml", "--members", 3, "--combine", "vote", "--output", root / "run",
        "--json", root / "train.json",
    )  # fmt: skip
    assert code == 0
    return root


def test_members_are_ordinary_prompts_of_different_seeds(place: Path):
    written = json.loads((place / "run" / "ensemble.json").read_text())
    names = ["seed-4/prompt", "seed-5/prompt", "seed-6/prompt"]
    assert (written["members"], written["combine"], written["task"]) == (names, "vote", "records")
    said = json.loads((place / "train.json").read_text())
    assert said["verb"] == "ensemble train"
    assert said["ensemble"]["members"] == names
    frozen = FrozenLM.load(place / "model", device="cpu")
    tables = [load_prompt(place / "run" / name, frozen).prompt.table_PW for name in names]
    assert not any(torch.equal(tables[0], other) for other in tables[1:])
    assert not (place / "nowhere").exists()


def test_lines_are_answered_by_the_majority_of_what_each_member_says(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "lines.txt").write_text("\n".join([*LINES[:2], json.dumps({"input": LINES[2]})]))
    assert run("ensemble", "predict", place / "run", tmp_path / "lines.txt", "--jsonl") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["input"] for one in found] == LINES
    assert run("ensemble", "predict", place / "run", tmp_path / "lines.txt") == 0
    assert capsys.readouterr().out.splitlines() == [" ".join(one["prediction"].split()) for one in found]
    own = []
    for seed in (4, 5, 6):
        (tmp_path / "plain.txt").write_text("\n".join(LINES))
        assert run("generate", tmp_path / "plain.txt", "--prompt", place / f"run/seed-{seed}/prompt", "--jsonl") == 0
        own.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    for index, one in enumerate(found):
        answers = [run_[index] for run_ in own]
        assert [member["output"] for member in one["members"]] == [answer["output"] for answer in answers]
        assert [m["logprob"] for m in one["members"]] == pytest.approx([a["logprob"] for a in answers], rel=1e-4)
        vote = majority_vote([Prediction(Example("", ""), a["output"], a["logprob"]) for a in answers])
        assert one["prediction"] == answers[vote.winner]["output"]
        assert one["votes"] == vote.votes


@pytest.mark.parametrize("how", ["likeliest", "average"])
def test_other_ways_can_be_asked_for(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str):
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    assert run("ensemble", "predict", place / "run", tmp_path / "lines.txt", "--jsonl", "--combine", how) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(one["members"]) for one in found] == [3, 3, 3]
    assert all("votes" not in one for one in found)
    assert run("ensemble", "predict", place / "run", tmp_path / "lines.txt", "--combine", how) == 0
    assert capsys.readouterr().out.splitlines() == [" ".join(one["prediction"].split()) for one in found]


@pytest.mark.parametrize("how", [None, "average"])
def test_evaluation_shows_average_best_and_ensemble(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str | None
):
    chosen = [] if how is None else ["--combine", how]
    options = ["--split", "dev", "--output", tmp_path / "out", "--json", tmp_path / "result.json", *chosen]
    assert run("ensemble", "evaluate", place / "run", *options) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("average", "best", "ensemble", "rouge_score_l", "best by exact_match: seed-"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (result["verb"], result["split"], result["records"], result["combine"]) == (
        "ensemble evaluate", "dev", 4, how or "vote",
    )  # fmt: skip
    assert [one["seed"] for one in result["members"]] == [4, 5, 6]
    assert set(result["metrics"]) == {"exact_match", "rouge_score_l"}
    for number, name in enumerate(("seed-4", "seed-5", "seed-6")):
        alone = tmp_path / f"{name}.json"
        assert run("evaluate", "--prompt", place / "run" / name / "prompt", "--split", "dev", "--json", alone) == 0
        expected = json.loads(alone.read_text())["metrics"]
        for metric, values in result["metrics"].items():
            assert values["members"][number] == pytest.approx(expected[metric])
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [len(one["members"]) for one in samples] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{place}/recipe.yaml", "--set", "together=[{{training.seed: 1}}]"], "has a list 'together'"),
        (["train", "{place}/recipe.yaml", "--members", "1"], "--members"),
        (["predict", "{place}/model"], "holds no ensemble.json"),
        (["evaluate", "{place}/run", "--split", "dev", "--combine", "rank"], "without choices cannot be ranked"),
        (["evaluate", "{place}/run", "--split", "dev", "--combine", "best"], "best"),
        (["evaluate", "{place}/run", "--split", "dev", "--combine", "average", "--set", "decoding.strategy=beam"],
         "beam search"),
        (["retrain"], "retrain"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert run("ensemble", *(word.format(place=place) for word in arguments)) == 2
    assert message in capsys.readouterr().err


def test_training_goes_on_where_it_was(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["ensemble", "train", place / "recipe.yaml", "--members", 2, "--output", tmp_path / "run"]
    assert run(*command, "--set", "training.max_steps=2") == 0
    first = json.loads((tmp_path / "run" / "ensemble.json").read_text())
    assert first["combine"] == "likeliest"  # the task has no choices
    assert run(*command, "--set", "training.max_steps=2", "--resume") == 0
    assert json.loads((tmp_path / "run" / "ensemble.json").read_text()) == first
    assert "2 members in" in capsys.readouterr().out
