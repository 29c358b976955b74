"""Tokens per second of serving: rows that each carry another prompt, against one prompt, text, and transformers.

The peer is transformers' static ``generate`` on the same weights: all rows in one batch that begins and ends together,
every row's prefix stacked in front of it beforehand. It is what one can do without an engine, and the rows here suit
it: as many as a batch has, of about one length, all continued by the same number of tokens. The engine chooses its
number of threads for every pass by measuring beforehand; the peer runs with one, with all and with what the engine
uses between, and its best is what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from softprompts.bench.cases import make_prompt
from softprompts.bench.machine import machine, shape
from softprompts.bench.measure import interleaved
from softprompts.bench.plain import separate_model
from softprompts.bench.workload import draw_rows
from softprompts.errors import ConfigError
from softprompts.inference import (
    PromptPool,
    Request,
    SamplingOptions,
    ServingEngine,
    ServingLimits,
    ThreadPlan,
    measure_threads,
)
from softprompts.inference.threads import computing
from softprompts.models import FrozenLM
from softprompts.types import PromptStates

__all__ = ["ServeBench", "measure_serving"]

_WARM_TOKENS = 8
"""Of the round that does not count: it loads code and takes memory, which takes no whole outputs."""


@dataclass(frozen=True)
class ServeBench:
    """What is measured, and how often."""

    rows: int = 32
    """Requests at once, each with a prompt of its own."""
    length: int = 100
    """P, and the tokens of the text that the prompts are compared with."""
    new_tokens: int = 64
    """Tokens per row, exactly: no row may end its text earlier."""
    repeats: int = 5
    """Rounds in which everybody takes a turn; a short one comes before them and does not count."""
    seed: int = 0
    fixed_threads: bool = False
    """Everybody computes with the threads that torch is set to, and no more is tried."""


def measure_serving(
    frozen: FrozenLM, bench: ServeBench, *, on_round: Callable[[int], object] | None = None
) -> dict[str, Any]:
    """Measure in one run; everybody takes turns on the same weights and inputs, greedily.

    Args:
        frozen: The model.
        bench: What is measured.
        on_round: Called with the number of every round.

    Returns:
        The report, ready for JSON. ``mixing_ratio`` is the time with as many prompts as rows over that with one
        prompt; ``text_ratio`` the time with the prompts' tokens as text over that with prompts; ``peer`` is the peer
        with ``peer_threads``, its fastest number, and ``threads_plan`` says what the engine uses.

    Raises:
        ConfigError: A number is out of range.
    """
    if min(bench.rows, bench.length, bench.new_tokens, bench.repeats) < 1:
        raise ConfigError("--rows, --length, --new-tokens and --repeats: expected 1 or more")
    inputs, words = _texts(bench, frozen.geometry.vocab_size)
    outputs: dict[str, list[tuple[int, ...]]] = {}
    limits = ServingLimits(bench.rows, max(512, bench.rows), 1 << 40)
    plan, numbers = _threads(frozen, bench, limits)
    with PromptPool(frozen, budget_bytes=1 << 40) as pool:
        for number in range(bench.rows):
            pool.add(str(number), make_prompt(frozen, "prefix", bench.length, seed=bench.seed + number))
        states = [pool.wait(str(number)) for number in range(bench.rows)]
        engine = ServingEngine(frozen, pool, limits, threads=plan)
        mixed, plain = [str(number) for number in range(bench.rows)], [None] * bench.rows
        peer = _Stacked(separate_model(frozen), frozen, states, inputs)
        subjects: dict[str, _Subject] = {
            "mixed": _Served(engine, mixed, inputs),
            **{f"peer_{number}": _with_threads(peer, number) for number in numbers},
            "one_prompt": _Served(engine, ["0"] * bench.rows, inputs),
            "no_prompt": _Served(engine, plain, inputs),
            "text": _Served(engine, plain, [(*words, *ids) for ids in inputs]),
        }

        def turn(name: str) -> Callable[[int], object]:
            def run(_: int) -> None:
                outputs[name] = subjects[name](bench.new_tokens)

            return run

        for subject in subjects.values():
            subject(min(_WARM_TOKENS, bench.new_tokens))
        turns = {name: turn(name) for name in subjects}
        spreads = interleaved(turns, repeats=bench.repeats, device=frozen.device, warmup=0, on_round=on_round)
    seconds = {name: spread.median for name, spread in spreads.items()}
    peer_threads = min(numbers, key=lambda number: seconds[f"peer_{number}"])
    best = f"peer_{peer_threads}"
    spreads["peer"], seconds["peer"], tokens = spreads[best], seconds[best], bench.rows * bench.new_tokens
    same = sum(mine == other for mine, other in zip(outputs["mixed"], outputs[best], strict=True))
    return {
        "case": f"serve-{bench.rows}",
        "model": frozen.name,
        "shape": shape(frozen),
        "tokens_per_s": tokens / seconds["mixed"],
        "peer_tokens_per_s": tokens / seconds["peer"],
        "ratio_peer": seconds["peer"] / seconds["mixed"],
        "mixing_ratio": seconds["mixed"] / seconds["one_prompt"],
        "text_ratio": seconds["text"] / seconds["mixed"],
        "no_prompt_tokens_per_s": tokens / seconds["no_prompt"],
        "outputs_equal": same / bench.rows,
        "peer": "transformers generate, prefixes stacked in one batch",
        "peer_threads": peer_threads,
        "threads_plan": str(plan),
        **{key: value for key, value in asdict(bench).items() if key not in ("length", "fixed_threads")},
        "prompts": bench.rows,
        "prompt_length": bench.length,
        "precision": str(frozen.dtype).removeprefix("torch."),
        "spread": {name: asdict(spread) for name, spread in spreads.items()},
        **machine(frozen.device),
    }


_Subject = Callable[[int], list[tuple[int, ...]]]
"""Continues the rows by a number of tokens."""


def _texts(bench: ServeBench, vocab_size: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """The rows' inputs, and the text in place of a prompt."""
    inputs = [row.ids[: row.target_start] for row in draw_rows(bench.rows, vocab_size=vocab_size, seed=bench.seed)]
    words = torch.randint(vocab_size, (bench.length,), generator=torch.Generator().manual_seed(bench.seed)).tolist()
    return inputs, words


def _threads(frozen: FrozenLM, bench: ServeBench, limits: ServingLimits) -> tuple[ThreadPlan, list[int]]:
    """What the engine computes with, and the numbers of threads that the peer is given in turn."""
    most = torch.get_num_threads()
    if bench.fixed_threads or frozen.device.type != "cpu":
        return ThreadPlan(most), [most]
    plan = measure_threads(frozen, limits)
    return plan, sorted({1, most, *plan.numbers})


def _with_threads(subject: _Subject, number: int) -> _Subject:
    def run(new_tokens: int) -> list[tuple[int, ...]]:
        with computing(ThreadPlan(number), 1):
            return subject(new_tokens)

    return run


class _Served:
    """The engine, with requests that all come at once.

    Args:
        engine: With nothing else to do.
        prompts: Of the rows, ``None`` for none.
        inputs: Tokens of the rows.
    """

    def __init__(self, engine: ServingEngine, prompts: Sequence[str | None], inputs: Sequence[tuple[int, ...]]) -> None:
        self._engine, self._rows = engine, list(zip(inputs, prompts, strict=True))

    def __call__(self, new_tokens: int) -> list[tuple[int, ...]]:
        """Continue all inputs by so many tokens."""
        options = SamplingOptions(max_tokens=new_tokens, min_tokens=new_tokens)
        requests = [Request(str(number), ids, prompt, options) for number, (ids, prompt) in enumerate(self._rows)]
        return [output.ids for (output,) in self._engine.generate(requests)]


class _Stacked:
    """transformers' ``generate`` behind one prefix per row.

    Args:
        model: Nothing of ours in it.
        frozen: Names the padding.
        states: The rows' prefixes, all of one length.
        inputs: Tokens of the rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        frozen: FrozenLM,
        states: Sequence[PromptStates],
        inputs: Sequence[tuple[int, ...]],
    ) -> None:
        self._model, self._frozen, self._inputs = model, frozen, inputs
        self._length = states[0].length
        keys = [site.key for site in frozen.geometry.sites]
        self._layers = [
            tuple(torch.stack([state.keys_values[key][part] for state in states]) for part in (0, 1)) for key in keys
        ]

    @torch.no_grad()
    def __call__(self, new_tokens: int) -> list[tuple[int, ...]]:
        """Continue all inputs in one batch by so many tokens."""
        inputs, pad = self._inputs, self._frozen.pad_id
        longest = max(map(len, inputs))
        # generate cuts off what the cache holds already: as many tokens of any kind stand for the prefix
        rows = [[pad] * (self._length + longest - len(ids)) + list(ids) for ids in inputs]
        seen = [[1] * self._length + [0] * (longest - len(ids)) + [1] * len(ids) for ids in inputs]
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, number)
        ids_BS: Tensor = self._model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(rows, device=self._frozen.device),
            attention_mask=torch.tensor(seen, device=self._frozen.device),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=pad,
            eos_token_id=self._frozen.eos_id,
        )
        return [tuple(row) for row in ids_BS[:, self._length + longest :].tolist()]
