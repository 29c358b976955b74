"""The official ``openai`` client against a real server."""

from __future__ import annotations

import openai
import pytest

from live_server import KEYS, key, save_words, serving, tiny_frozen_lm


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A server with keys and one prompt."""
    frozen, folder = tiny_frozen_lm(), tmp_path_factory.mktemp("prompts")
    save_words(frozen, folder / "task" / "five", 5)
    with serving(frozen, folder, keys=(key("team-a", prompts=("task/*",)), key("team-b"))) as live:
        yield live


@pytest.fixture
def client(live):
    """Of one who may use the prompt."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEYS["team-a"], max_retries=0) as client:
        yield client


def test_completions_and_chats_streamed_and_whole(client):
    options = {"model": "task/five", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(prompt="abc", **options)
    assert whole.usage is not None
    stream = client.completions.create(prompt="abc", stream=True, stream_options={"include_usage": True}, **options)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    messages = [{"role": "user", "content": "abc"}]
    chat = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=1, **options)
    assert chat.choices[0].message.content == whole.choices[0].text
    assert chat.choices[0].logprobs is not None
    assert len(chat.choices[0].logprobs.content) == whole.usage.completion_tokens
    streamed = client.chat.completions.create(messages=messages, stream=True, **options)
    pieces = [chunk.choices[0].delta.content or "" for chunk in streamed]
    assert "".join(pieces) == whole.choices[0].text


def test_models(client):
    assert [one.id for one in client.models.list()] == ["tiny", "task/five"]
    assert client.models.retrieve("task/five").id == "task/five"


def test_errors_are_those_that_the_client_knows(live, client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.UnprocessableEntityError):
        client.completions.create(model="tiny", prompt="x", max_tokens=-1)
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(model="tiny", prompt="x" * 1000)
    assert (refused.value.status_code, refused.value.code) == (413, "context_length_exceeded")
    wrong = client.with_options(api_key="sp-wrong")
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with pytest.raises(openai.NotFoundError):
        client.with_options(api_key=KEYS["team-b"]).completions.create(model="task/five", prompt="x")
