"""The engine against ``model.generate`` of transformers, and a batch against its rows one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import byte_tokenizer, tiny_model
from softprompts.config import DecodingConfig
from softprompts.errors import ConfigError, LengthError
from softprompts.inference import Engine
from softprompts.inference.passes import SlotForward
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import prompt_from_table
from softprompts.types import Encoded, Example

EOS = 256
START, CALL = PromptedLM.start, SlotForward.__call__
TEXTS = ["the cat", "A", "one two three four", "0123"]
FEW = [[token] for token in range(260) if not 97 <= token < 103 and token != EOS]
"""Bans that leave six tokens and the end, so that the random models end a text now and then."""

OPTIONS = {
    "greedy": DecodingConfig(max_new_tokens=12),
    "greedy-min": DecodingConfig(max_new_tokens=12, min_new_tokens=6),
    "beam-1": DecodingConfig(strategy="beam", beams=1, max_new_tokens=12),
    "beam-3": DecodingConfig(strategy="beam", beams=3, max_new_tokens=12),
    "beam-5": DecodingConfig(strategy="beam", beams=5, max_new_tokens=12, min_new_tokens=5),
    "beam-5-long": DecodingConfig(strategy="beam", beams=5, max_new_tokens=12, length_penalty=2.0),
    "beam-5-short": DecodingConfig(strategy="beam", beams=5, max_new_tokens=12, length_penalty=-0.5),
}
SAMPLE = DecodingConfig(strategy="sample", max_new_tokens=12, temperature=0.9, top_k=20, top_p=0.95)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request):
    """A frozen model and a second copy of it that only transformers touches."""
    return FrozenLM.from_model(tiny_model(request.param), byte_tokenizer()), tiny_model(request.param)


def rows_of(frozen, texts, prompt=-1):
    rows = [tuple(frozen.tokenize(text)) for text in texts]
    return [Encoded(ids, len(ids), Example(text, ""), prompt) for ids, text in zip(rows, texts, strict=True)]


def word_prompts(frozen, text):
    """The two prompts that stand for a text: its embeddings, and the keys and values that they evoke."""
    embeddings_PD = frozen.embed(frozen.tokenize(text))
    states = frozen.activations(embeddings_PD)
    parts = [states[site.key] for site in frozen.geometry.sites]
    table_PW = torch.cat([part.transpose(0, 1).flatten(1) for pair in parts for part in pair], dim=1)
    prefix = prompt_from_table("prefix", frozen.geometry, table_PW)
    return [prompt_from_table("embedding", frozen.geometry, embeddings_PD), prefix]


def reference(model, ids, config, banned=()):
    """One row through transformers: ids without the end, and whether the model ended it."""
    beam = config.strategy == "beam" and config.beams > 1
    output = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        num_beams=config.beams if beam else 1, length_penalty=config.length_penalty if beam else None,
        max_new_tokens=config.max_new_tokens, min_new_tokens=config.min_new_tokens or None,
        bad_words_ids=[list(sequence) for sequence in banned] or None, pad_token_id=257,
    )[0, len(ids) :].tolist()  # fmt: skip
    return tuple(output[: output.index(EOS)] if EOS in output else output), EOS in output


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_transformers_without_a_prompt(pair, name):
    frozen, model = pair
    rows = rows_of(frozen, TEXTS)
    for banned in ([], FEW):
        ours = Engine(PromptedLM(frozen)).generate(rows, OPTIONS[name], banned_ids=banned)
        theirs = [reference(model, row.ids, OPTIONS[name], banned) for row in rows]
        assert [(one.ids, one.finished) for one in ours] == theirs


def test_some_of_these_texts_end_and_some_are_cut(pair):
    frozen, _ = pair
    ours = Engine(PromptedLM(frozen)).generate(rows_of(frozen, TEXTS), OPTIONS["beam-3"], banned_ids=FEW)
    assert {one.finished for one in ours} == {True, False}


@pytest.mark.parametrize("name", ["greedy", "beam-3", "beam-5"])
def test_a_prompt_made_of_words_equals_the_words(pair, name):
    frozen, model = pair
    words = "table-to-text: "
    engine = Engine(PromptedLM(frozen, word_prompts(frozen, words)))
    for prompt in (0, 1):
        ours = engine.generate(rows_of(frozen, TEXTS, prompt), OPTIONS[name], banned_ids=FEW)
        theirs = [reference(model, frozen.tokenize(words + text), OPTIONS[name], FEW) for text in TEXTS]
        assert [(one.ids, one.finished) for one in ours] == theirs


@pytest.mark.parametrize("name", [*OPTIONS, "sample"])
def test_a_batch_equals_its_rows_one_by_one(pair, name):
    """Mixed lengths, two prompts of different lengths and rows without any."""
    frozen, _ = pair
    config = OPTIONS.get(name, SAMPLE)
    prompts = [word_prompts(frozen, "summarize")[0], word_prompts(frozen, "an answer: ")[1]]
    engine = Engine(PromptedLM(frozen, prompts))
    rows = [replace(row, prompt=index % 3 - 1) for index, row in enumerate(rows_of(frozen, TEXTS))]
    together = engine.generate(rows, replace(config, batch_size=6), banned_ids=FEW)
    for batch_size in (1, 4):
        again = engine.generate(rows, replace(config, batch_size=batch_size), banned_ids=FEW)
        assert [(one.ids, one.finished) for one in again] == [(one.ids, one.finished) for one in together]
        assert [one.logprob for one in again] == pytest.approx([one.logprob for one in together], rel=1e-4)


def test_sampling_is_seeded_per_row(pair):
    frozen, _ = pair
    engine = Engine(PromptedLM(frozen))
    rows = rows_of(frozen, ["same", "same", "same"])
    first = engine.generate(rows, SAMPLE, seed=1)
    assert [one.ids for one in first] == [one.ids for one in engine.generate(rows, SAMPLE, seed=1)]
    assert len({one.ids for one in first}) == 3
    assert [one.ids for one in first] != [one.ids for one in engine.generate(rows, SAMPLE, seed=2)]


def test_logprob_is_that_of_the_plain_model(pair):
    frozen, model = pair
    rows = rows_of(frozen, TEXTS)
    for config in (OPTIONS["greedy-min"], OPTIONS["beam-5"], SAMPLE):
        for row, one in zip(rows, Engine(PromptedLM(frozen)).generate(rows, config, banned_ids=FEW), strict=True):
            ids = [*row.ids, *one.ids, *([EOS] if one.finished else [])]
            with torch.no_grad():
                logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logprobs_TV[t - 1, ids[t]]) for t in range(len(row.ids), len(ids)))
            assert one.logprob == pytest.approx(expected, rel=1e-4)


def test_banned_strings_do_not_come(pair):
    frozen, _ = pair
    engine = Engine(PromptedLM(frozen))
    rows = rows_of(frozen, TEXTS)
    free = engine.generate(rows, DecodingConfig(max_new_tokens=20))
    pairs = {one.ids[index : index + 2] for one in free for index in range(0, 8, 2)}
    single = engine.generate(rows, DecodingConfig(max_new_tokens=20), banned_ids=sorted(pairs))
    assert all(one.ids[index : index + 2] not in pairs for one in single for index in range(len(one.ids) - 1))
    letters = [token for token in range(256) if frozen.tokenize(frozen.tokenizer.decode([token])) == [token]]
    common = max(letters, key=lambda token: sum(one.ids.count(token) for one in free))
    banned = engine.generate(rows, DecodingConfig(max_new_tokens=20, banned=(frozen.tokenizer.decode([common]),)))
    assert any(common in one.ids for one in free)
    assert not any(common in one.ids for one in banned)


def test_work_shrinks_as_rows_finish(pair, monkeypatch):
    frozen, _ = pair
    prompted = PromptedLM(frozen)
    plain, rows_per_step = prompted.step, []
    monkeypatch.setattr(prompted, "step", lambda ids, state: (rows_per_step.append(len(ids)), plain(ids, state))[1])
    config = replace(OPTIONS["beam-3"], max_new_tokens=40)
    done = Engine(prompted).generate(rows_of(frozen, TEXTS), config, banned_ids=FEW)
    assert any(one.finished for one in done)
    assert rows_per_step[0] == 3 * len(TEXTS)
    assert rows_per_step[-1] < rows_per_step[0]
    assert rows_per_step == sorted(rows_per_step, reverse=True)


def test_rows_are_batched_by_length_and_returned_in_order(pair, monkeypatch):
    frozen, _ = pair
    prompted = PromptedLM(frozen)
    plain, shapes, ready = prompted.start, [], []
    monkeypatch.setattr(
        prompted, "start", lambda b, s, **k: (shapes.append(tuple(b.ids_BT.shape)), plain(b, s, **k))[1]
    )
    texts = ["x" * n for n in (1, 30, 2, 29, 3, 28)]
    rows, config = rows_of(frozen, texts), DecodingConfig(max_new_tokens=3, batch_size=3)
    Engine(prompted).generate(rows, replace(config, strategy="beam", beams=2), on_progress=ready.append)
    assert shapes == [(3, 30), (3, 3)]
    assert sum(ready) == 6
    monkeypatch.setattr("softprompts.inference.engine._MOST_COPIED", -1)
    monkeypatch.setattr(
        PromptedLM, "start", lambda self, b, s, **k: (shapes.append(tuple(b.ids_BT.shape)), START(self, b, s, **k))[1]
    )
    Engine(prompted).generate(rows, config, on_progress=ready.append)
    assert shapes[2:] == [(3, 30), (3, 3)]
    assert sum(ready) == 12


@pytest.mark.parametrize("name", ["greedy", "greedy-min", "sample"])
def test_closed_batches_give_what_slots_give(pair, monkeypatch, name):
    """What does not run in slots, or would take too much memory there, is computed in batches that begin together."""
    frozen, _ = pair
    config = OPTIONS.get(name, SAMPLE)
    engine = Engine(PromptedLM(frozen, word_prompts(frozen, "an answer: ")))
    rows = [replace(row, prompt=index % 3 - 1) for index, row in enumerate(rows_of(frozen, TEXTS))]
    config, passes = replace(config, batch_size=2), []
    monkeypatch.setattr(SlotForward, "__call__", lambda self, works: (passes.append(len(works)), CALL(self, works))[1])
    in_slots = engine.generate(rows, config, banned_ids=FEW, seed=3)
    assert passes
    passes.clear()
    monkeypatch.setattr("softprompts.inference.engine._MOST_COPIED", 0)
    in_batches = engine.generate(rows, config, banned_ids=FEW, seed=3)
    monkeypatch.setattr("softprompts.inference.engine._MOST_COPIED", 1 << 30)
    in_one_batch = engine.generate(rows, replace(config, batch_size=len(rows)), banned_ids=FEW, seed=3)
    assert not passes
    for others in (in_batches, in_one_batch):
        assert [(one.ids, one.text, one.finished) for one in others] == [
            (one.ids, one.text, one.finished) for one in in_slots
        ]
        assert [one.logprob for one in others] == pytest.approx([one.logprob for one in in_slots], rel=1e-4)


def test_a_stop_string_ends_the_work(pair):
    frozen, _ = pair
    engine, rows, config = Engine(PromptedLM(frozen)), rows_of(frozen, TEXTS), DecodingConfig(max_new_tokens=12)
    free = engine.generate(rows, config)
    stop = free[0].text[4:6]
    for one, whole in zip(engine.generate(rows, replace(config, stop=(stop,))), free, strict=True):
        assert one.text == whole.text.split(stop)[0]
        assert one.ids == whole.ids[: len(one.ids)]
        assert one.finished == (stop in whole.text or whole.finished)
        assert len(one.ids) <= len(one.text.encode()) + len(stop.encode())


def test_a_target_is_cut_off(pair):
    frozen, _ = pair
    engine = Engine(PromptedLM(frozen))
    row = rows_of(frozen, ["input"])[0]
    longer = replace(row, ids=(*row.ids, *frozen.tokenize("target"), EOS))
    assert engine.generate([longer], OPTIONS["greedy"]) == engine.generate([row], OPTIONS["greedy"])


def test_text_is_the_decoded_ids(pair):
    frozen, _ = pair
    one = Engine(PromptedLM(frozen)).generate(rows_of(frozen, ["hello"]), OPTIONS["greedy"])[0]
    assert one.text == frozen.tokenizer.decode(one.ids, skip_special_tokens=True)
    assert Engine(PromptedLM(frozen)).generate([], OPTIONS["greedy"]) == []


def test_what_cannot_run_is_refused_before_anything_runs(pair, monkeypatch):
    frozen, _ = pair
    prompt = word_prompts(frozen, "0123456789")[0]
    prompted = PromptedLM(frozen, [prompt])
    engine = Engine(prompted)
    config = DecodingConfig(max_new_tokens=20)
    limit = frozen.geometry.max_positions
    short, long, longer = rows_of(frozen, ["x", "x" * (limit - 30), "x" * (limit - 29)], prompt=0)
    assert len(engine.generate([long], config)) == 1
    monkeypatch.setattr(frozen.causal, "run", lambda *_, **__: pytest.fail("something ran"))
    with pytest.raises(LengthError, match=rf"row 1 needs {limit + 1} positions: prompt 10 .* the model has {limit}"):
        engine.generate([short, longer], config)
    with pytest.raises(LengthError, match="no input tokens"):
        engine.generate([replace(short, ids=(), target_start=0)], config)
    with pytest.raises(ConfigError, match="names prompt 1, but 1 prompts"):
        engine.generate([replace(short, prompt=1)], config)
    with pytest.raises(ConfigError, match="top_p"):
        engine.generate([short], replace(config, top_p=0.0))


def test_gradient_checkpointing_changes_nothing(pair):
    """Validation generates in the middle of training, when layers recompute and would rather have no cache."""
    frozen, _ = pair
    checkpointing = FrozenLM.from_model(tiny_model(frozen.geometry.family), frozen.tokenizer)
    checkpointing.enable_gradient_checkpointing()
    rows = rows_of(frozen, TEXTS)
    for config in (OPTIONS["greedy"], OPTIONS["beam-3"]):
        ours = Engine(PromptedLM(checkpointing)).generate(rows, config, banned_ids=FEW)
        theirs = Engine(PromptedLM(frozen)).generate(rows, config, banned_ids=FEW)
        assert [one.ids for one in ours] == [one.ids for one in theirs]


@pytest.mark.parametrize("name", ["greedy", "beam-3", "sample"])
def test_every_family_decodes_a_batch_as_its_rows(frozen, name):
    config = OPTIONS.get(name, SAMPLE)
    engine = Engine(PromptedLM(frozen, [word_prompts(frozen, "to text")[1]]))
    rows = [replace(row, prompt=index % 2 - 1) for index, row in enumerate(rows_of(frozen, TEXTS[:4]))]
    together = engine.generate(rows, config)
    alone = engine.generate(rows, replace(config, batch_size=1))
    assert [one.ids for one in together] == [one.ids for one in alone]


@pytest.mark.parametrize("name", ["greedy", "beam-3"])
def test_folded_states_serve_several_calls(pair, monkeypatch, name):
    frozen, _ = pair
    prompted = PromptedLM(frozen, word_prompts(frozen, "an answer: "))
    engine, rows = Engine(prompted), rows_of(frozen, TEXTS, prompt=0)
    expected = engine.generate(rows, OPTIONS[name])
    states = engine.fold()
    monkeypatch.setattr(prompted, "states", lambda: pytest.fail("the prompts were computed again"))
    for _ in range(2):
        assert engine.generate(rows, OPTIONS[name], states=states) == expected
