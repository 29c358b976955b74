from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompts.errors import CheckpointError, ConfigError, DataError, StorageError, TrainingInterrupted
from softprompts.folder_lock import alone_in
from softprompts.pretraining.pretrain import Run, pretrain
from softprompts.pretraining.recipe import LMConfig, LMTrainingConfig, PretrainRecipe
from softprompts.pretraining.trainer import Rows
from tiny_pretraining import losses, make_recipe, quiet, with_training


@pytest.fixture
def recipe(corpus_dir: Path, tmp_path: Path, tokens: Path) -> PretrainRecipe:
    (tmp_path / "tokens").symlink_to(tokens)
    return make_recipe(corpus_dir, tmp_path)


def test_killed_at_any_step_and_resumed_is_bit_identical(recipe: PretrainRecipe, tmp_path: Path) -> None:
    whole = pretrain(recipe, report=quiet)
    weights = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    expected = losses(whole.state.history)
    assert len(expected) == 12
    for stop in (1, 2, 5, 9, 11):  # warm-up, stable phase, first and last step of the decay
        (tmp_path / "checkpoint.pt").unlink()
        with pytest.raises(TrainingInterrupted, match=f"stopped at step {stop} of 12"):
            pretrain(recipe, report=quiet, max_steps=stop)
        result = pretrain(recipe, resume=True, report=quiet)
        assert losses(result.state.history) == expected
        resumed = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
        assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_killed_without_a_chance_to_save_goes_on_from_the_last_checkpoint(
    recipe: PretrainRecipe, tmp_path: Path
) -> None:
    expected = losses(pretrain(recipe, report=quiet).state.history)
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(TrainingInterrupted):
        pretrain(recipe, report=quiet, max_steps=4)
    run = Run(recipe, quiet)
    run.resume()
    inner = run.loss_function

    def die_in_step_8(ids: torch.Tensor) -> torch.Tensor:
        if run.state.step == 7:
            raise KeyboardInterrupt
        return inner(ids)

    run.loss_function = die_in_step_8
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert len((tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 7
    assert losses(pretrain(recipe, resume=True, report=quiet).state.history) == expected
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["step"] for event in events] == list(range(1, 13))


def test_a_signal_saves_and_stops(recipe: PretrainRecipe, tmp_path: Path) -> None:
    run = Run(recipe, quiet)
    inner, calls = run.loss_function, 0

    def loss_then_signal(ids: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(ids)

    run.loss_function = loss_then_signal
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match="step 3 of 12"):
        run.train()
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = Run(recipe, quiet)
    resumed.resume()
    assert resumed.state.step == 3


def test_a_new_end_starts_the_decay_and_the_stable_state_can_go_on(recipe: PretrainRecipe, tmp_path: Path) -> None:
    row = recipe.training.batch_rows * recipe.model.context
    long = with_training(recipe, total_tokens=40 * row)
    with pytest.raises(TrainingInterrupted):
        pretrain(long, report=quiet, max_steps=10)
    assert not (tmp_path / "checkpoint-stable.pt").exists()
    short = with_training(recipe, total_tokens=14 * row, decay_fraction=4 / 14)
    result = pretrain(short, resume=True, report=quiet)
    rates = [event["rate"] for event in result.state.history if "rate" in event]
    assert rates[9:] == [1.0, 1.0, 0.75, 0.5, 0.25]
    # From before the decay, the longer run goes on as if it had never been shortened.
    stable = dataclasses.replace(long, output=dataclasses.replace(long.output, resume_from="stable"))
    with pytest.raises(TrainingInterrupted):
        pretrain(stable, resume=True, report=quiet, max_steps=4)
    continued = Run(long, quiet)
    continued.resume()
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(TrainingInterrupted):
        pretrain(long, report=quiet, max_steps=14)
    straight = Run(long, quiet)
    straight.resume()
    assert losses(continued.state.history) == losses(straight.state.history)


@pytest.mark.parametrize("other", ["model", "tokenizer"])
def test_a_checkpoint_of_another_model_is_refused_and_nothing_of_it_is_touched(
    corpus_dir: Path, tokens: Path, tmp_path: Path, other: str
) -> None:
    shutil.copytree(tokens, tmp_path / "tokens")
    recipe = make_recipe(corpus_dir, tmp_path)
    with pytest.raises(TrainingInterrupted):
        pretrain(recipe, report=quiet, max_steps=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in before} >= {"recipe.json", "corpus.json", "train.bin", "checkpoint.pt"}
    changed = {"model": {"layers": 1}, "tokenizer": {"vocab_size": 390}}[other]
    another = dataclasses.replace(recipe, **{other: dataclasses.replace(getattr(recipe, other), **changed)})
    with pytest.raises(CheckpointError, match="belongs to another model shape"):
        pretrain(another, resume=True, report=quiet)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_corpus_shorter_than_a_row_is_refused(recipe: PretrainRecipe, tmp_path: Path) -> None:
    count = len(Run(recipe, quiet).files.train())
    long = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, context=count))
    with pytest.raises(DataError, match=rf"holds {count} tokens, and a row needs {count + 1}.*add text"):
        Run(long, quiet)
    short = dataclasses.replace(long, model=dataclasses.replace(long.model, context=count - 1))
    assert Run(short, quiet).rows.count == 1


def test_a_run_is_not_started_over_by_accident(recipe: PretrainRecipe) -> None:
    with pytest.raises(TrainingInterrupted):
        pretrain(recipe, report=quiet, max_steps=1)
    with pytest.raises(CheckpointError, match="add --resume to go on"):
        pretrain(recipe, report=quiet)


def test_a_folder_that_another_run_writes_to_is_left_alone(recipe: PretrainRecipe) -> None:
    with alone_in(Path(recipe.output.output_dir)), pytest.raises(StorageError, match="another run writes to"):
        pretrain(recipe, report=quiet)
    assert not (Path(recipe.output.output_dir) / "recipe.json").exists()


def test_nothing_to_resume_from_and_damage_are_said(recipe: PretrainRecipe, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="start without --resume"):
        pretrain(recipe, resume=True, report=quiet)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(CheckpointError, match="cannot be read"):
        pretrain(recipe, resume=True, report=quiet)


def test_a_finished_run_leaves_a_model_for_transformers(recipe: PretrainRecipe, tmp_path: Path) -> None:
    run = Run(recipe, quiet)
    result = run.train()
    model = AutoModelForCausalLM.from_pretrained(result.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.use_cache
    ids = torch.tensor([tokenizer("The kitchen in Rome serves")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, run.model.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    assert {p.name for p in result.folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    saved = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert saved["tokens"] == recipe.training.total_tokens
    assert set(saved["held_out"]) == {"talk", "book", "records", "all"}
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert losses(events) == losses(result.state.history)


def test_it_learns(recipe: PretrainRecipe) -> None:
    run = Run(with_training(recipe, total_tokens=60 * 4 * 32), quiet)
    before = run.evaluate()["all"]["loss"]
    after = run.train().held_out["all"]["loss"]
    assert before > 5.5
    assert after < before - 2.0


def test_micro_batches_sum_to_the_whole_batch(recipe: PretrainRecipe, tmp_path: Path) -> None:
    whole = losses(pretrain(recipe, report=quiet).state.history)
    (tmp_path / "checkpoint.pt").unlink()
    parts = losses(pretrain(with_training(recipe, micro_batch_rows=2), report=quiet).state.history)
    assert whole == pytest.approx(parts, rel=1e-2)
    assert whole[0] == pytest.approx(parts[0], rel=1e-6)
    with pytest.raises(ConfigError, match="no multiple"):
        LMTrainingConfig(batch_rows=4, micro_batch_rows=3)


def test_short_rows_keep_the_tokens_of_a_step(recipe: PretrainRecipe, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        pretrain(with_training(recipe, row_tokens=8), report=quiet, max_steps=5)
    run = Run(recipe, quiet)
    run.resume()
    assert (run.state.step, run.state.tokens) == (5, 5 * 4 * 32)
    assert run.train().state.tokens == recipe.training.total_tokens
    with pytest.raises(ConfigError, match=r"expected a divisor of model\.context 32"):
        with_training(recipe, row_tokens=7)


def test_rows_cover_the_file_once_an_epoch() -> None:
    import numpy as np

    rows = Rows(np.arange(1001, dtype=np.uint16), context=10, seed=1)
    assert rows.count == 100
    firsts = [int(rows[i][0]) for i in range(200)]
    assert sorted(firsts[:100]) == sorted(firsts[100:]) == list(range(0, 1000, 10))
    assert firsts[:100] != firsts[100:]
    assert rows[37].tolist() == list(range(firsts[37], firsts[37] + 11))


def test_shape_of_the_model() -> None:
    from softprompts.pretraining.model import build_model

    training = LMTrainingConfig(device="cpu")
    model = build_model(LMConfig(), 6144, training)
    assert 7.9e6 < sum(p.numel() for p in model.parameters()) < 8.1e6
    again = build_model(LMConfig(), 6144, training)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
