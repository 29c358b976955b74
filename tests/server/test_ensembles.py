"""Ensembles as models: the members' answers, asked one by one and combined offline, are the server's answer."""

from __future__ import annotations

import json

import pytest

from live_server import key, save_words, serving, tiny_frozen_lm
from softprompts.evaluation.ensemble import combine
from softprompts.inference import PromptPool, Request, SamplingOptions, ServingEngine
from softprompts.storage.ensemble import save_ensemble
from softprompts.storage.library import PromptLibrary
from softprompts.types import Example, Prediction

HOW = {"votes": "vote", "task/likeliest": "likeliest", "averaged": "average"}
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
    (folder / "damaged").mkdir()
    (folder / "damaged" / "ensemble.json").write_text("{")
    save_words(frozen, folder / "alone", 5)
    keys = (key("team-a", prompts=("votes", "task/*"), base_model=False), key("team-b", prompts=("alone",)))
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
        for name in ("votes#0", "averaged", "damaged", "alone"):
            assert client.post("/v1/completions", json={"model": name, "prompt": "x"}).status_code == 404
        for change in ({"n": 2}, {"logprobs": 1}):
            assert client.post("/v1/completions", json={"model": "votes", "prompt": "x", **change}).status_code == 422
    assert live.post("/v1/completions", {"model": "votes", "prompt": "x"}, "team-b").status_code == 404
