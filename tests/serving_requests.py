"""Requests for the serving engine, and what transformers itself answers to each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from conftest import byte_tokenizer, tiny_model
from softprompts.inference import Output, PromptPool, Request, SamplingOptions, ServingEngine, ServingLimits
from softprompts.models import FrozenLM
from softprompts.prompts import SoftPrompt, prompt_from_table

EOS = 256
LENGTHS = (5, 32, 50, 100)
"""Of the prompts of the mixed batch."""


def words(length: int) -> list[int]:
    """Ids of a text of so many tokens."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(256, (length,), generator=generator).tolist()


def word_prompt(frozen: FrozenLM, ids: Sequence[int], kind: str) -> SoftPrompt:
    """A prompt that stands for words: their embeddings, or the keys and values that they evoke."""
    embeddings_PD = frozen.embed(ids)
    if kind == "embedding":
        return prompt_from_table("embedding", frozen.geometry, embeddings_PD)
    states = frozen.activations(embeddings_PD)
    parts = [states[site.key] for site in frozen.geometry.sites]
    table_PW = torch.cat([part.transpose(0, 1).flatten(1) for pair in parts for part in pair], dim=1)
    return prompt_from_table("prefix", frozen.geometry, table_PW)


def pool_of_words(frozen: FrozenLM) -> PromptPool:
    """Prompts ``words-5`` to ``words-100``; every second one is of embeddings."""
    pool = PromptPool(frozen)
    for number, length in enumerate(LENGTHS):
        pool.add(f"words-{length}", word_prompt(frozen, words(length), "embedding" if number % 2 else "prefix"))
    return pool


@contextmanager
def tiny_service(family: str) -> Iterator[tuple[FrozenLM, PromptPool]]:
    """A frozen model of a family, and its pool of words."""
    frozen = FrozenLM.from_model(tiny_model(family), byte_tokenizer())
    with pool_of_words(frozen) as pool:
        yield frozen, pool


def fifteen(**options: object) -> list[Request]:
    """Fifteen requests: inputs of 1 to 29 tokens, outputs of 8 to 22, without prompt and with each of the four."""
    names = [None, *(f"words-{length}" for length in LENGTHS)]
    return [
        Request(
            f"r{number}",
            tuple(words(1 + 2 * number)),
            names[number % 5],
            SamplingOptions(**{"max_tokens": 8 + number, **options}),  # type: ignore[arg-type]
        )
        for number in range(15)
    ]


def text_of(request: Request) -> list[int]:
    """The input with the words that its prompt stands for."""
    return [*(words(int(request.prompt.split("-")[1])) if request.prompt else ()), *request.ids]


def expected(model: PreTrainedModel, request: Request) -> tuple[int, ...]:
    """What transformers' greedy ``generate`` answers to the words, one request by itself."""
    ids = text_of(request)
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=request.options.max_tokens,
        pad_token_id=257,
    )[0, len(ids) :].tolist()
    return tuple(output[: output.index(EOS)] if EOS in output else output)


def staggered(engine: ServingEngine, requests: Sequence[Request]) -> dict[str, Output]:
    """Submit a request every second step and run until all are done; outputs by request."""
    from softprompts.inference import collect

    events: dict[str, list] = {request.id: [] for request in requests}
    pending = list(requests)
    for step in range(10_000):
        if pending and step % 2 == 0:
            engine.submit(pending.pop(0))
        if not pending and not engine.busy:
            break
        if engine.pool is not None and not engine.running:
            engine.pool.wait_for_change(0.01)
        for event in engine.step():
            events[event.request_id].append(event)
    return {name: collect(found) for name, found in events.items()}


def small(**limits: int) -> ServingLimits:
    """Limits that make rows wait for each other and inputs be read in pieces."""
    return ServingLimits(**{"max_rows": 6, "tokens_per_step": 16, **limits})
