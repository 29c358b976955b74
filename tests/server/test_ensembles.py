"""Ensembles as models: the members' answers, asked one by one and combined offline, are the server's answer."""

from __future__ import annotations

import json

import pytest

from live_server import key, save_infix, save_words, serving, tiny_frozen_lm
from serving_requests import word_prompt, words
from softprompts.cli.loading import encode_rows, ranking_of
from softprompts.config import DecodingConfig, EvaluationConfig, TaskConfig, TrainRecipe
from softprompts.evaluation.ensemble import combine, predict_ensemble
from softprompts.inference import Engine, PromptPool, Request, SamplingOptions, ServingEngine, ServingLimits
from softprompts.prompted import PromptedLM
from softprompts.server.ensembles import load_ensembles
from softprompts.storage import save_prompt
from softprompts.storage.ensemble import load_ensemble, save_ensemble
from softprompts.storage.library import PromptLibrary
from softprompts.tasks import get_task
from softprompts.types import Encoded, Example, Prediction

HOW = {"votes": "vote", "task/likeliest": "likeliest", "averaged": "average", "unknown": "rank"}
TASK = TaskConfig(name="superglue_boolq")
OF_TASK = {"by-sum": "rank", "by-mean": "rank", "by-prior": "rank", "legal": "vote"}
"""Ensembles of a task with choices, by how they combine; the name says what choices are ranked by."""
SIZES = (5, 7, 5, 11)
"""The first and the third member say the same: a majority."""


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """Ensembles in a folder beside a prompt; one of them cannot be served, one is damaged."""
    frozen, folder = tiny_frozen_lm(), tmp_path_factory.mktemp("prompts")
    for name, how in HOW.items():
        places = [folder / name / f"m{number}" / "prompt" for number in range(len(SIZES))]
        for place, size in zip(places, SIZES, strict=True):
            save_words(frozen, place, size)
        save_ensemble(folder / name, places, combine=how)
    for name, how in OF_TASK.items():
        by = name.removeprefix("by-") if how == "rank" else "sum"
        recipe = TrainRecipe(task=TASK, evaluation=EvaluationConfig(ranking=by))
        places = [folder / name / f"m{size}" for size in SIZES[1:]]
        for place, size in zip(places, SIZES[1:], strict=True):
            prompt = word_prompt(frozen, words(size), "embedding")
            save_prompt(prompt, place, frozen=frozen, task=TASK.name, recipe=recipe)
        save_ensemble(folder / name, places, combine=how)
    (folder / "damaged").mkdir()
    (folder / "damaged" / "ensemble.json").write_text("{")
    save_words(frozen, folder / "alone", 5)
    keys = (
        key("team-a", prompts=("votes", "task/*"), base_model=False),
        key("team-b", prompts=("alone",)),
        key("admin", prompts=("*",)),
        key("four-rows", prompts=("*",), max_concurrent=4),
    )
    with serving(frozen, folder, keys=keys) as live:
        live.folder = folder
        yield live


def expected(live, name, text, max_tokens):
    """What ``evaluation.ensemble`` makes of the members' answers."""
    frozen, answers = live.service.frozen, []
    with PromptPool(frozen, PromptLibrary(live.folder / name)) as pool:
        engine = ServingEngine(frozen, pool)
        for number in range(len(SIZES)):
            options = SamplingOptions(max_tokens=max_tokens, logprobs=0)
            ((one,),) = engine.generate([Request("x", engine.encode(text), f"m{number}/prompt", options)])
            total = sum(token.logprob for token in one.logprobs)
            stopped = one.finish_reason == "stop"
            answers.append(Prediction(Example("", ""), one.text, total, finished=stopped, new_tokens=len(one.ids)))
    return combine(answers, HOW[name]).prediction.text


@pytest.mark.parametrize("name", ["votes", "task/likeliest"])
@pytest.mark.parametrize("text", ["abc", "what else", "0"])
def test_the_served_answer_is_the_combined_one(live, name, text):
    body = {"model": name, "prompt": [text, text + "!"], "max_tokens": 9, "temperature": 0}
    answer = live.post("/v1/completions", body, "team-a").json()
    wanted = [expected(live, name, one, 9) for one in body["prompt"]]
    assert [choice["text"] for choice in answer["choices"]] == wanted
    assert answer["usage"]["prompt_tokens"] == 2 * len(text) + 1
    streamed = live.post("/v1/completions", {**body, "stream": True}, "team-a").text
    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.split("\n\n")[:-2]]
    assert {chunk["choices"][0]["index"]: chunk["choices"][0]["text"] for chunk in chunks} == dict(enumerate(wanted))


def test_ensembles_are_listed_and_their_members_are_nobodys(live):
    with live.client("team-a") as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["task/likeliest", "votes"]
        details = client.get("/v1/models/votes?details=true").json()["details"]
        assert (details["kind"], details["members"]) == ("ensemble, answers combined by vote", 4)
        for name in ("votes#0", "averaged", "averaged#0", "damaged", "alone"):
            assert client.post("/v1/completions", json={"model": name, "prompt": "x"}).status_code == 404
        for change in ({"n": 2}, {"logprobs": 1}):
            assert client.post("/v1/completions", json={"model": "votes", "prompt": "x", **change}).status_code == 422
    assert live.post("/v1/completions", {"model": "votes", "prompt": "x"}, "team-b").status_code == 404
    left_out = {"unknown", "damaged"}  # choices that nobody knows cannot be ranked
    with live.client("admin") as client:
        listed = {card["id"] for card in client.get("/v1/models").json()["data"]}
        assert {*HOW, *OF_TASK, "alone", "tiny"} - left_out <= listed
        assert not listed & left_out
        assert not any("#" in name for name in listed)


@pytest.mark.parametrize(
    ("name", "rows"), [("votes", 4), ("averaged", 4), ("legal", 3), ("by-sum", 6), ("by-prior", 12)]
)
def test_every_row_that_is_computed_counts_towards_the_key(live, name, rows):
    answer = live.post("/v1/completions", {"model": name, "prompt": "x", "max_tokens": 2}, "four-rows")
    if rows <= 4:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 422
        assert f"{rows} outputs were asked for" in answer.json()["error"]["message"]
    two = live.post("/v1/completions", {"model": name, "prompt": ["x", "y"], "max_tokens": 2}, "four-rows")
    assert two.status_code == 422


def offline(live, name, rows, decoding, seed=0):
    """What ``softprompts ensemble predict`` computes for encoded inputs."""
    frozen = live.service.frozen
    info, members = load_ensemble(live.folder / name, frozen)
    engine = Engine(PromptedLM(frozen, [one.prompt for one in members]))
    ranking = None
    if info.combine == "rank":
        ranking = ranking_of(rows, get_task(TASK), frozen, TASK, members[0].info.origin.recipe["evaluation"]["ranking"])
    return [
        one.prediction for one in predict_ensemble(engine, rows, decoding, how=info.combine, ranking=ranking, seed=seed)
    ]


@pytest.mark.parametrize("name", OF_TASK)
def test_a_task_with_choices_is_answered_as_offline(live, name):
    frozen, task = live.service.frozen, get_task(TASK)
    texts = ("passage: a cat question: is it", "x", "question: what else may a longer question ask for?")
    rows = encode_rows([Example(one, "", choices=task.choices) for one in texts], task, frozen, TASK, with_target=False)
    decoding = DecodingConfig(max_new_tokens=6)
    wanted = [one.text for one in offline(live, name, rows, decoding)]
    body = {"model": name, "prompt": [list(row.ids) for row in rows], "max_tokens": 6, "temperature": 0}
    answer = live.post("/v1/completions", body, "admin").json()
    assert [choice["text"].strip() for choice in answer["choices"]] == wanted
    streamed = live.post("/v1/completions", {**body, "stream": True}, "admin").text
    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.split("\n\n")[:-2]]
    assert {one["choices"][0]["index"]: one["choices"][0]["text"].strip() for one in chunks} == dict(enumerate(wanted))
    if OF_TASK[name] == "rank":
        assert set(wanted) <= set(task.choices)
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
        for change in ({"stop": "x"}, {"min_tokens": 1}, {"logit_bias": {"1": 1.0}}, {"stop_token_ids": [1]}, {"n": 2}):
            refused = live.post("/v1/completions", {**body, **change}, "admin")
            assert refused.status_code == 422, change


def test_it_matters_what_choices_are_ranked_by(live):
    """Otherwise the test above could not tell the three ways from each other."""
    task = get_task(TASK)
    texts = [chr(97 + number) * (number + 1) for number in range(6)]
    rows = encode_rows(
        [Example(one, "", choices=task.choices) for one in texts], task, live.service.frozen, TASK, with_target=False
    )
    found = {name: [one.choice_scores for one in offline(live, name, rows, DecodingConfig())] for name in OF_TASK}
    assert found["by-sum"] != found["by-prior"] != found["by-mean"] != found["by-sum"]


@pytest.mark.parametrize("sampled", [False, True])
def test_an_average_is_streamed_as_it_is_written(live, sampled):
    frozen = live.service.frozen
    decoding = DecodingConfig(max_new_tokens=12, **({"strategy": "sample", "temperature": 0.8} if sampled else {}))
    ids = tuple(frozen.tokenize("what else"))
    row = Encoded(ids, len(ids), Example("", ""))
    (wanted,) = offline(live, "averaged", [row], decoding, seed=3)
    body = {
        "model": "averaged",
        "prompt": "what else",
        "max_tokens": 12,
        "temperature": 0.8 if sampled else 0,
        "seed": 3,
    }
    answer = live.post("/v1/completions", {**body, "n": 2, "logprobs": 0}, "admin").json()
    assert answer["choices"][0]["text"].strip() == wanted.text
    assert (answer["choices"][1]["text"] == answer["choices"][0]["text"]) != sampled
    total = sum(answer["choices"][0]["logprobs"]["token_logprobs"])
    assert wanted.finished or total == pytest.approx(wanted.logprob, abs=1e-3)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    streamed = live.post("/v1/completions", {**body, "stream": True}, "admin").text
    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.split("\n\n")[:-2]]
    assert len(chunks) > 3
    assert "".join(one["choices"][0]["text"] for one in chunks) == answer["choices"][0]["text"]


def test_members_that_are_averaged_must_fit_into_memory_together(live, caplog):
    frozen = live.service.frozen
    with PromptPool(frozen, budget_bytes=2000) as pool, caplog.at_level("WARNING", "softprompts.server"):
        found = load_ensembles(PromptLibrary(live.folder), frozen, pool, ServingLimits())
    assert "averaged" not in found
    assert "votes" in found
    assert any("take" in record.fields["reason"] for record in caplog.records)


def make(frozen, folder, name, how, sizes, save=save_words):
    """An ensemble in a folder."""
    places = [folder / name / f"m{number}" for number in range(len(sizes))]
    for place, size in zip(places, sizes, strict=True):
        save(frozen, place, size)
    save_ensemble(folder / name, places, combine=how)


def reasons(caplog):
    """Why ensembles were left out, by name."""
    return {one.fields["ensemble"]: one.fields["reason"] for one in caplog.records if "reason" in one.fields}


def test_choices_are_no_outputs_but_rows(tmp_path):
    """A hundred and fifty choices, measured behind each of two members: one answer is asked for."""
    frozen, task = tiny_frozen_lm(), TaskConfig(name="clinc150")
    choices = get_task(task).choices
    places = [tmp_path / "intents" / f"m{size}" for size in (3, 4)]
    for place, size in zip(places, (3, 4), strict=True):
        prompt = word_prompt(frozen, words(size), "prefix")
        save_prompt(prompt, place, frozen=frozen, task=task.name, recipe=TrainRecipe(task=task))
    save_ensemble(tmp_path / "intents", places, combine="rank")
    body = {"model": "intents", "prompt": "x"}
    limits = ServingLimits(max_rows=128, max_waiting=2 * len(choices))
    with serving(frozen, tmp_path, limits=limits) as live:
        answer = live.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] in choices
        refused = live.post("/v1/completions", {**body, "prompt": ["x", "y"]})  # asking again would not help
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_value")
        assert "600 rows for 2 outputs, and at most 428" in refused.json()["error"]["message"]


def test_what_could_never_be_answered_is_left_out_and_the_log_says_why(tmp_path, caplog):
    frozen = tiny_frozen_lm()
    for how in ("average", "vote"):
        make(frozen, tmp_path, f"infixes-{how}", how, (3, 4), save=save_infix)
        make(frozen, tmp_path, f"many-{how}", how, (3, 4, 5))
        make(frozen, tmp_path, f"few-{how}", how, (3, 4))
    save_infix(frozen, tmp_path / "infix", 3)
    make(frozen, tmp_path, "linked", "vote", (3, 4))
    (tmp_path / "linked" / "m1").rename(tmp_path / "elsewhere")
    (tmp_path / "linked" / "m1").symlink_to(tmp_path / "elsewhere")
    limits = ServingLimits(max_rows=2, tokens_per_step=64, max_waiting=0)
    with caplog.at_level("WARNING", "softprompts.server"), serving(frozen, tmp_path, limits=limits) as live:
        with live.client() as client:
            listed = {card["id"] for card in client.get("/v1/models").json()["data"]}
        for name in ("few-average", "few-vote"):
            assert live.post("/v1/completions", {"model": name, "prompt": "x", "max_tokens": 2}).status_code == 200
        alone = live.post("/v1/completions", {"model": "infix", "prompt": "x"})
        assert (alone.status_code, alone.json()["error"]["code"]) == (409, "prompt_unusable")
        assert "is an infix" in alone.json()["error"]["message"]
    found = reasons(caplog)
    assert found.keys() == {"infixes-average", "infixes-vote", "linked", "many-average", "many-vote"}
    assert not found.keys() & listed
    assert "'member 0' is an infix" in found["infixes-average"]
    assert "symbolic link" in found["linked"]
    assert "--max-rows" in found["many-average"]
    assert "--max-waiting" in found["many-vote"]


def test_averaged_ensembles_must_fit_into_memory_beside_each_other(tmp_path, caplog):
    """The first of them leaves room for one prompt; the second would be there in part, for ever, and in its way."""
    frozen = tiny_frozen_lm()
    for name in ("first", "second"):
        make(frozen, tmp_path, name, "average", (4, 4, 4))
    save_words(frozen, tmp_path / "plain", 4)
    save_words(frozen, tmp_path / "long", 5)
    budget_bytes = 16 * frozen.geometry.prefix_width * frozen.dtype.itemsize
    ask = {"prompt": "x", "max_tokens": 2}
    with caplog.at_level("WARNING", "softprompts.server"), serving(frozen, tmp_path, budget_bytes=budget_bytes) as live:
        for name in ("first", "plain"):
            assert live.post("/v1/completions", {**ask, "model": name}).status_code == 200
        assert live.post("/v1/completions", {**ask, "model": "second"}).status_code == 404
        full = live.post("/v1/completions", {**ask, "model": "long"})
        assert (full.status_code, full.json()["error"]["code"]) == (503, "prompt_memory_full")
        assert "bytes" not in full.text
    assert "beside the" in reasons(caplog)["second"]
    assert not any("hardly any" in record.message for record in caplog.records)
    caplog.clear()
    with PromptPool(frozen, budget_bytes=budget_bytes - 1) as pool, caplog.at_level("WARNING", "softprompts.server"):
        assert load_ensembles(PromptLibrary(tmp_path), frozen, pool, ServingLimits()).keys() == {"first"}
    assert any("hardly any" in record.message for record in caplog.records)
