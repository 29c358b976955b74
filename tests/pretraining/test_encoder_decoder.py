"""Encoder-decoders: span corruption, LM adaptation from it, kept and published models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from softprompts.cli.loading import encode_rows, ranking_of
from softprompts.config import DecodingConfig, SettingConfig, TaskConfig
from softprompts.errors import CheckpointError, ConfigError, DataNotFoundError, TrainingInterrupted
from softprompts.inference import Engine
from softprompts.models import FrozenLM
from softprompts.models.seq2seq_check import verify_seq2seq
from softprompts.pretraining.pretrain import Run, pretrain
from softprompts.pretraining.recipe import LMConfig, ObjectiveConfig, PretrainRecipe
from softprompts.pretraining.trainer import PairRows
from softprompts.prompted import PromptedLM
from softprompts.tasks import get_task
from softprompts.types import Example
from tiny_pretraining import losses, make_recipe, quiet, with_training

ROW = 4 * 32
SHAPE = LMConfig(kind="encoder_decoder", width=32, layers=2, decoder_layers=1, heads=2, mlp_width=48, context=32)


@pytest.fixture
def recipe(corpus_dir: Path, tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainRecipe:
    monkeypatch.setenv("SOFTPROMPTS_CACHE", str(tmp_path / "cache"))
    made = dataclasses.replace(make_recipe(corpus_dir, tmp_path / "sc"), model=SHAPE)
    return with_output(made, tokens_dir=str(tokens))


def with_output(recipe: PretrainRecipe, **changes: Any) -> PretrainRecipe:
    return dataclasses.replace(recipe, output=dataclasses.replace(recipe.output, **changes))


def adapted(recipe: PretrainRecipe, tmp_path: Path, **training: Any) -> PretrainRecipe:
    aim = ObjectiveConfig("prefix_lm")
    return with_output(
        with_training(dataclasses.replace(recipe, objective=aim), **training), output_dir=str(tmp_path / "lm")
    )


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm"])
def test_killed_at_any_step_and_resumed_is_bit_identical(recipe: PretrainRecipe, objective: Any) -> None:
    recipe = dataclasses.replace(recipe, objective=ObjectiveConfig(objective))
    folder = Path(recipe.output.output_dir)
    whole = pretrain(recipe, report=quiet)
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    for stop in (2, 10):
        (folder / "checkpoint.pt").unlink()
        with pytest.raises(TrainingInterrupted, match=f"stopped at step {stop} of 12"):
            pretrain(recipe, report=quiet, max_steps=stop)
        result = pretrain(recipe, resume=True, report=quiet)
        assert losses(result.state.history) == losses(whole.state.history)
        resumed = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
        assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_rows_are_new_pairs_in_every_epoch_and_the_same_in_every_run(recipe: PretrainRecipe) -> None:
    run, again = Run(recipe, quiet), Run(recipe, quiet)
    assert isinstance(run.rows, PairRows)
    assert torch.equal(run.rows.batch(5, 4), again.rows.batch(5, 4))
    first, second = run.rows.formed(3, 3), run.rows.formed(3, 3 + run.rows.count)
    assert (first != second).any()
    border = run.rows.pairing.input_length
    for row in (first, second):
        restored = run.rows.pairing.restore(row[:border], row[border:])  # type: ignore[attr-defined]
        assert (restored == run.rows.at(3)[:32]).all()


def test_the_loss_is_that_of_transformers(recipe: PretrainRecipe, tmp_path: Path) -> None:
    for aim in ("span_corruption", "prefix_lm"):
        run = Run(dataclasses.replace(recipe, objective=ObjectiveConfig(aim)), quiet)  # type: ignore[arg-type]
        assert isinstance(run.rows, PairRows)
        batch, border = run.rows.batch(0, 4), run.rows.pairing.input_length
        inputs = batch[:, :border]
        with torch.no_grad():
            own = run.model(
                input_ids=inputs, attention_mask=(inputs != 1).long(), labels=batch[:, border:].contiguous()
            ).loss
            torch.testing.assert_close(run.loss_function(batch), own, rtol=1e-5, atol=1e-5)


def test_both_objectives_learn_and_the_models_load_by_name(recipe: PretrainRecipe, tmp_path: Path) -> None:
    recipe = with_output(with_training(recipe, total_tokens=80 * ROW), publish_as="tiny-sc")
    run = Run(recipe, quiet)
    before = run.evaluate()["all"]["loss"]
    after = run.train().held_out["all"]["loss"]
    assert before > 5.5
    assert after < before - 2.0

    lm = adapted(recipe, tmp_path, start_from="family/tiny-sc", schedule="constant", total_tokens=40 * ROW)
    lm = with_output(lm, keep_at_steps=(10, 20, 40), publish_as=None, publish_steps_as="tiny-lm")
    scratch = Run(with_training(lm, start_from=None), quiet).evaluate()["all"]["loss"]
    started = Run(lm, quiet)
    started.start()
    unadapted = started.evaluate()["all"]["loss"]
    result = pretrain(lm, report=quiet)
    assert unadapted < scratch - 0.5
    assert result.held_out["all"]["loss"] < unadapted - 0.5

    frozen = FrozenLM.load("family/tiny-lm3")
    assert frozen.name == "family/tiny-lm3"
    assert frozen.pair is not None
    verify_seq2seq(frozen.pair, frozen.geometry.vocab_size)
    final = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "lm" / "final").state_dict()
    by_name = frozen.model.state_dict()
    assert all(torch.equal(final[key], by_name[key]) for key in final)
    earlier = FrozenLM.load("family/tiny-lm1").model.state_dict()
    assert not torch.equal(earlier["shared.weight"], by_name["shared.weight"])
    card = (tmp_path / "cache" / "models" / "tiny-lm2" / "README.md").read_text(encoding="utf-8")
    assert "20 steps" in card
    assert "It started from `family/tiny-sc`." in card
    with pytest.raises(DataNotFoundError, match=r"softprompts pretrain recipes/pretraining/family/tiny_adapt\.yaml"):
        FrozenLM.load("family/tiny-lm4")


def test_exported_model_and_tokenizer(recipe: PretrainRecipe) -> None:
    run = Run(with_training(recipe, total_tokens=2 * ROW), quiet)
    folder = run.train().folder
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.architectures == ["T5ForConditionalGeneration"]
    assert model.config.is_gated_act
    assert run.sentinels == 2  # 5 tokens of 32 are noise, in 2 spans
    plain = run.files.tokenizer
    text = "The kitchen in Rome serves bread."
    ids = tokenizer(text)["input_ids"]
    assert ids == [*plain.encode(text).ids, 0]
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"]) == [400, 401]
    marked = tokenizer("<extra_id_0> bread", add_special_tokens=False)["input_ids"]
    assert marked == [400, *plain.encode(" bread").ids]
    assert tokenizer.decode(marked, skip_special_tokens=True) == " bread"
    inputs = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=inputs, decoder_input_ids=inputs).logits
        own = run.model.eval()(input_ids=inputs, decoder_input_ids=inputs).logits
    torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-5)
    assert logits.shape[-1] == len(tokenizer) == 402
    summary = json.loads((folder.parent / "corpus.json").read_text(encoding="utf-8"))
    assert summary["vocab_size"] == 400


def test_what_does_not_fit_is_refused(recipe: PretrainRecipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective\.name 'causal' is not for model\.kind 'encoder_decoder'"):
        dataclasses.replace(recipe, objective=ObjectiveConfig("causal"))
    with pytest.raises(ConfigError, match="of kind 'encoder_decoder' has none"):
        LMConfig(kind="encoder_decoder", kv_heads=2)
    with pytest.raises(ConfigError, match="rising numbers"):
        with_output(recipe, keep_at_steps=(4, 2))
    with pytest.raises(ConfigError, match="ends the run at step 12"):
        Run(with_output(recipe, keep_at_steps=(13,)), quiet)
    with pytest.raises(ConfigError, match="no name for a model of the family"):
        with_output(recipe, publish_as="../elsewhere")
    pretrain(with_training(recipe, total_tokens=ROW), report=quiet)
    wider = dataclasses.replace(SHAPE, mlp_width=64)
    other = adapted(dataclasses.replace(recipe, model=wider), tmp_path, start_from=recipe.output.output_dir)
    with pytest.raises(CheckpointError, match="another shape"):
        pretrain(other, report=quiet)
    longer = dataclasses.replace(SHAPE, context=64)
    other = adapted(dataclasses.replace(recipe, model=longer), tmp_path, start_from=recipe.output.output_dir)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        pretrain(other, report=quiet)
    with pytest.raises(ConfigError, match=r"objective\.sentinels is 1, but a row of 32 tokens has 2 spans"):
        Run(dataclasses.replace(recipe, objective=ObjectiveConfig(sentinels=1)), quiet)
    with pytest.raises(DataNotFoundError, match="holds no model"):
        pretrain(adapted(recipe, tmp_path, start_from=str(tmp_path / "nowhere")), report=quiet)


def test_a_model_is_adapted_on_longer_rows_if_the_sentinels_are_as_many(recipe: PretrainRecipe, tmp_path: Path) -> None:
    few = dataclasses.replace(recipe, objective=ObjectiveConfig(sentinels=5))
    pretrain(with_training(few, total_tokens=ROW), report=quiet)
    longer = dataclasses.replace(recipe, model=dataclasses.replace(SHAPE, context=64))
    lm = adapted(longer, tmp_path, start_from=recipe.output.output_dir, total_tokens=4 * ROW)
    lm = dataclasses.replace(lm, objective=ObjectiveConfig("prefix_lm", sentinels=5, target_tokens=8))
    assert pretrain(lm, report=quiet).state.step == 2


def test_runs_share_the_tokens_in_the_cache(recipe: PretrainRecipe, tmp_path: Path) -> None:
    lines: list[str] = []
    first = Run(with_output(recipe, tokens_dir="cache"), lines.append)
    assert "training the tokenizer" in lines
    lines.clear()
    second = Run(with_output(recipe, tokens_dir="cache", output_dir=str(tmp_path / "other")), lines.append)
    assert lines == []
    assert (
        first.files.folder == second.files.folder == tmp_path / "cache" / "tokens" / first.files.summary["fingerprint"]
    )
    assert not (tmp_path / "sc" / "tokens").exists()


def test_a_sentinel_stands_before_every_target_and_in_no_text(recipe: PretrainRecipe) -> None:
    frozen = FrozenLM.load(pretrain(with_training(recipe, total_tokens=ROW), report=quiet).folder)
    config = TaskConfig(name="superglue_rte", setting=SettingConfig(target_prefix="<extra_id_0>"))
    task = get_task(config).configured(config)
    example = Example("premise: a", "entailment", choices=("entailment", "not_entailment"))
    (row,) = encode_rows([example], task, frozen, config)
    (plain,) = encode_rows([example], get_task(TaskConfig(name="superglue_rte")), frozen, TaskConfig())
    assert row.ids == plain.ids
    assert row.decoder_ids == (400, *frozen.tokenize(" entailment"), 0)
    ranking = ranking_of([row], task, frozen, config, "sum")
    assert ranking is not None
    assert [choice[0] for choice in ranking.choices[0]] == [400, 400]
    assert ranking.choices[0][0] == row.decoder_ids
    # A model that has learned to say the sentinel first: its texts are compared with the bare label.
    model = AutoModelForSeq2SeqLM.from_pretrained(recipe.output.output_dir + "/final")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs, labels = torch.tensor([row.ids]), torch.tensor([row.decoder_ids])
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()
    engine = Engine(PromptedLM(FrozenLM.from_model(model, frozen.tokenizer), []))
    (asked,) = encode_rows([example], task, frozen, config, prompt=-1, with_target=False)
    (said,) = engine.generate([asked], DecodingConfig(max_new_tokens=20))
    assert said.ids == row.decoder_ids[:-1]
    assert said.text.strip() == "entailment"
    with pytest.raises(ConfigError, match="is text to the tokenizer"):
        encode_rows([example], task, frozen, TaskConfig(setting=SettingConfig(target_prefix="answer:")))
