from __future__ import annotations

import json
from pathlib import Path

import yaml
from typer.testing import CliRunner

from softprompts.cli.main import build_app
from softprompts.config import to_dict
from tiny_pretraining import make_recipe


def test_pretrain_from_the_command_line(corpus_dir: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(to_dict(make_recipe(corpus_dir, tmp_path / "run"))), encoding="utf-8")
    arguments = ["pretrain", str(recipe), "--set", "training.total_tokens=512", "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(build_app(arguments), arguments)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written["tokens"] == 512
    assert written["held_out"]["all"]["perplexity"] > 1
    more = ["pretrain", str(recipe), "--set", "training.total_tokens=1024", "--resume", "--json", "-"]
    result = CliRunner().invoke(build_app(more), more)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tokens"] == 1024


def test_mistakes_are_one_paragraph(corpus_dir: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(to_dict(make_recipe(corpus_dir, tmp_path / "run"))), encoding="utf-8")
    arguments = ["pretrain", str(recipe), "--set", "training.total_token=512"]
    result = CliRunner().invoke(build_app(arguments), arguments)
    assert result.exit_code == 2
    assert "did you mean 'total_tokens'" in result.stderr
