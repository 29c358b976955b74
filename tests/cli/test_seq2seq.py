"""Encoder-decoders from the command line: a prompt is trained, judged in both ways, asked and looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import byte_tokenizer, tiny_model
from softprompts.cli import main as cli
from zoo_seq2seq import tiny_seq2seq

ROWS = [
    ("good film", "1"), ("bad film", "0"), ("a good day", "1"), ("a bad day", "0"), ("so good", "1"), ("so bad", "0"),
    ("good", "1"), ("not good", "1"),
]  # fmt: skip
PROMPTS: dict[str, dict[str, Any]] = {
    "prefix": {"kind": "prefix", "length": 3},
    "embedding": {"kind": "embedding", "length": 4, "initializer": {"name": "labels"}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three models and a few labelled lines."""
    folder = tmp_path_factory.mktemp("seq2seq")
    for shape in ("t5", "bart"):
        tiny_seq2seq(shape).save_pretrained(folder / shape)
        byte_tokenizer().save_pretrained(folder / shape)
    lines = [json.dumps({"text": text, "stars": stars}) for text, stars in ROWS]
    tiny_model("gpt2").save_pretrained(folder / "gpt2")
    byte_tokenizer().save_pretrained(folder / "gpt2")
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.main([str(argument) for argument in arguments])
    code = exit_info.value.code or 0
    assert isinstance(code, int)
    return code


def recipe(place: Path, shape: str, prompt: dict[str, Any], out: Path, **evaluation: Any) -> Path:
    rows = str(place / "rows.jsonl")
    content = {
        "model": {"name_or_path": str(place / shape), "device": "cpu"},
        "task": {
            "name": "records", "train": rows, "dev": rows, "test": rows,
            "format": "review: {text}", "target": "{stars:0=no|1=yes}",
        },
        "prompt": prompt,
        "optimizer": {"learning_rate": 0.05},
        "training": {"max_steps": 6, "batch_size": 4, "validate_every_steps": 3},
        "evaluation": evaluation,
        "output_dir": str(out),
    }  # fmt: skip
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(("shape", "kind"), [("t5", "prefix"), ("bart", "embedding")])
def test_train_evaluate_generate_inspect(place: Path, tmp_path: Path, capsys, shape: str, kind: str):
    out = tmp_path / f"{shape}-{kind}"
    path = recipe(place, shape, PROMPTS[kind], out, selection="ranked/accuracy")
    assert run("train", path, "--json", tmp_path / "train.json") == 0, capsys.readouterr().err
    trained = json.loads((tmp_path / "train.json").read_text())
    assert trained["steps"] == 6
    assert set(trained["metrics"]) == {"loss", "ranked/accuracy"}

    prompt = out / "prompt"
    answers = ["--output", tmp_path / "out", "--json", tmp_path / "judged.json"]
    assert run("evaluate", "--prompt", prompt, "--set", "decoding.max_new_tokens=5", *answers) == 0
    shown = capsys.readouterr().out
    judged = json.loads((tmp_path / "judged.json").read_text())
    assert set(judged["metrics"]) == {
        f"{way}{metric}" for way in ("", "ranked/", "majority/") for metric in ("exact_match", "rouge_score_l")
    } | {"illegal", "loss", "perplexity"}  # fmt: skip
    assert judged["metrics"]["ranked/exact_match"]["value"] == pytest.approx(trained["metrics"]["ranked/accuracy"])
    assert judged["metrics"]["loss"]["value"] == pytest.approx(trained["metrics"]["loss"], rel=1e-4)
    assert judged["majority"] == {"label": "yes", "counted_on": "train", "share": 5 / 8}
    assert f"{judged['illegal']['count']} of 8 answers" in shown
    assert "majority: 'yes', 62.5 % of the train split" in shown
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    for one in samples:
        assert one["ranked"] == max(one["choices"], key=one["choices"].get)

    (tmp_path / "lines").write_text("good film\n")
    assert run("generate", tmp_path / "lines", "--prompt", prompt, "--set", "decoding.max_new_tokens=5") == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert run("inspect", prompt) == 0
    shown = capsys.readouterr().out
    assert kind in shown
    assert shape in shown


def test_ranking_selects_among_prompts_that_are_trained_together(place: Path, tmp_path: Path):
    """Two seeds in one pass measure on dev what each measures alone."""
    together = recipe(place, "t5", PROMPTS["prefix"], tmp_path / "both", prediction="rank")
    assert (
        run("train", together, "--seeds", "0,1", "--set", "evaluation.selection=accuracy", "--json", tmp_path / "b")
        == 0
    )
    found = json.loads((tmp_path / "b").read_text())["prompts"]
    alone = recipe(place, "t5", PROMPTS["prefix"], tmp_path / "one", selection="ranked/accuracy")
    assert run("train", alone, "--set", "training.seed=1", "--json", tmp_path / "o") == 0
    one = json.loads((tmp_path / "o").read_text())
    assert found["seed-1"]["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    assert found["seed-1"]["best_step"] == one["best_step"]


def test_the_ways_of_ranking(place: Path, tmp_path: Path):
    """Alone, per token and over an empty input, without a prompt; none of them generates."""
    rows = place / "rows.jsonl"
    records = [
        "--task",
        "records",
        "--set",
        f"task.test={rows}",
        "--format",
        "{text}",
        "--target",
        "{stars:0=no|1=yes}",
    ]
    scores = {}
    for by in ("sum", "mean", "prior"):
        sets = ["--set", "evaluation.prediction=rank", "--set", f"evaluation.ranking={by}"]
        out = tmp_path / by
        assert run("evaluate", "--model", place / "gpt2", *records, *sets, "--output", out) == 0
        content = json.loads((out / "evaluation.json").read_text())
        assert (content["ranked_by"], content["generated"], content["illegal"]) == (by, False, None)
        assert content["majority"]["counted_on"] == "test"
        scores[by] = [json.loads(line)["choices"] for line in (out / "samples.jsonl").read_text().splitlines()]
    for total, mean in zip(scores["sum"], scores["mean"], strict=True):
        assert mean == pytest.approx({"no": total["no"] / 3, "yes": total["yes"] / 4})
    gains = [total["no"] - prior["no"] for total, prior in zip(scores["sum"], scores["prior"], strict=True)]
    assert gains == pytest.approx([gains[0]] * len(gains), abs=1e-4)  # the same empty input for all


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{recipe}", "--set", "task.target={{text}}"], "has no choices to rank"),
        (["train", "{recipe}", "--set", "evaluation.selection=ranked/acuracy"], "did you mean 'accuracy'"),
    ],
)
def test_what_cannot_be_ranked_is_refused(place: Path, tmp_path: Path, capsys, arguments: list[str], message: str):
    path = recipe(place, "t5", PROMPTS["prefix"], tmp_path / "run", prediction="rank", selection="accuracy")
    assert run(*(one.format(recipe=path) for one in arguments)) == 2
    assert message in capsys.readouterr().err


def test_a_task_without_choices_is_not_ranked(place: Path, capsys):
    rows = place / "rows.jsonl"
    records = ["--task", "records", "--set", f"task.test={rows}", "--format", "{text}", "--target", "{stars}"]
    assert run("evaluate", "--model", place / "t5", *records, "--set", "evaluation.prediction=rank") == 2
    assert "task 'records' has no choices to rank" in capsys.readouterr().err
