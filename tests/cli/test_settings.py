"""Settings from the command line: ``--set task.setting...`` trains on the rows asked for; every result records it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from softprompts.cli.main import main
from tiny_world import model_section, save_model, write_records

FIXTURES = Path(__file__).parents[1] / "tasks" / "fixtures"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A paraphrase task of twelve records on a tiny model."""
    root = tmp_path_factory.mktemp("settings")
    save_model(root, tokenizer)
    rows = [{"question1": f"a {i}?", "question2": f"b {i}?", "label": i % 2, "topic": "xy"[i % 2]} for i in range(12)]
    for split in ("train", "dev"):
        write_records(root / f"{split}.jsonl", rows)
    task = {"name": "glue_qqp", "train": str(root / "train.jsonl"), "dev": str(root / "dev.jsonl")}
    settings = {
        "model": model_section(root),
        "task": {**task, "test": str(FIXTURES / "glue_mrpc.jsonl")},
        "prompt": {"length": 2},
        "training": {"max_steps": 1, "batch_size": 2},
        "evaluation": {"selection": "loss", "decoding": {"max_new_tokens": 2}},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return root / "recipe.yaml"


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0)


def test_a_setting_is_trained_recorded_and_judged(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    wanted = {"low_data": 4, "subsample": 3, "dev_fraction": 0.5, "judge_task": "glue_mrpc"}
    given = [word for key, value in wanted.items() for word in ("--set", f"task.setting.{key}={value}")]
    assert run("train", str(recipe), *given, "--output", str(folder)) == 0
    assert "4 rows to train on, 2 dev" in capsys.readouterr().out
    kept = yaml.safe_load((folder / "recipe.yaml").read_text())["task"]["setting"]
    assert {key: kept[key] for key in wanted} == wanted
    out = tmp_path / "out"
    # The prompt carries its recipe, so the domain it is judged on needs no second mention.
    assert run("evaluate", "--prompt", str(folder / "prompt"), "--split", "test", "--output", str(out)) == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert report["records"] == 2
    assert report["setting"] == kept
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["references"] for sample in samples] == [["duplicate"], ["not_duplicate"]]
    assert samples[0]["input"].startswith("sentence1: The mayor")


def test_a_setting_that_is_none_is_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for word, message in {
        "low_date=5": "did you mean 'low_data'",
        "low_data=50": "low_data is 50, but the train split has 12 rows",
        "name=unseen": "the task has no setting 'unseen'",
    }.items():
        assert run("train", str(recipe), "--set", f"task.setting.{word}", "--output", str(tmp_path / "run")) == 2
        assert message in " ".join(capsys.readouterr().err.split())
