"""The contracts of the design as functions of one encoder-decoder shape, under the names of the decoder-only ones.

A text does not stand behind its prompt in an encoder that reads in both directions. So an embedding prompt is held
against the words themselves in transformers' own model, and a prefix against transformers' eager attention with the
keys and values put in front by hand, the layers found by their names.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from family_contracts import COLUMNS, RIGHT, TOLERANCE, Cell, NotApplicableError, WrongError, demand_equal
from softprompts.config import PromptConfig, ReparamConfig
from softprompts.errors import UnsupportedModelError
from softprompts.models import FrozenLM
from softprompts.models.implementation import implementations_of, restore_implementations, set_implementation
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt, build_prompt, prompt_from_table
from softprompts.prompts.prefix import choose_layers
from softprompts.types import Batch, LayerKey
from zoo_seq2seq import tiny_seq2seq

__all__ = [
    "PAIR_COLUMNS",
    "PairSubject",
    "batch_of",
    "eager_with_prefix",
    "ids_of",
    "judge_pair",
    "mixture",
    "own_logits",
    "place_of",
    "random_prefix",
    "word_prompt",
]


@dataclass
class PairSubject:
    """One shape under test."""

    shape: str
    tokenizer: PreTrainedTokenizerFast

    @cached_property
    def frozen(self) -> FrozenLM:
        """The model as this project loads it.

        Raises:
            UnsupportedModelError: It is refused.
        """
        return FrozenLM.from_model(tiny_seq2seq(self.shape), self.tokenizer, name=f"tiny-{self.shape}")


def ids_of(count: int, seed: int) -> list[int]:
    """Ids that stand for bytes."""
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def batch_of(
    rows: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], prompts: Sequence[int], side: str = "right"
) -> Batch:
    """A batch of inputs and targets."""
    longest, widest = max(map(len, rows)), max(map(len, targets))
    ids, targets_BU = torch.full((len(rows), longest), 257), torch.full((len(rows), widest), -100)
    mask = torch.zeros_like(ids)
    for number, (row, target) in enumerate(zip(rows, targets, strict=True)):
        columns = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[number, columns], mask[number, columns] = torch.tensor(row), 1
        targets_BU[number, : len(target)] = torch.tensor(target)
    return Batch(ids, mask, None, torch.tensor(prompts), targets_BU)


def random_prefix(frozen: FrozenLM, length: int, seed: int, layers: Sequence[LayerKey] | None = None) -> SoftPrompt:
    """A prefix of random numbers."""
    width = sum(site.width for site in frozen.geometry.reached(layers))
    table = torch.randn(length, width, generator=torch.Generator().manual_seed(seed))
    return prompt_from_table("prefix", frozen.geometry, table, layers)


def word_prompt(frozen: FrozenLM, words: Sequence[int]) -> SoftPrompt:
    """An embedding prompt of real words."""
    return prompt_from_table("embedding", frozen.geometry, frozen.embed(words))


def own_logits(frozen: FrozenLM, ids: Sequence[int], target: Sequence[int]) -> Tensor:
    """The oracle: transformers itself, its own shift of the labels included; ``[U, V]``."""
    row = torch.tensor([list(ids)])
    with torch.no_grad():
        return frozen.model(
            input_ids=row, attention_mask=torch.ones_like(row), labels=torch.tensor([list(target)])
        ).logits[0]


def mixture(frozen: FrozenLM) -> tuple[PromptedLM, list[list[int]], list[list[int]], list[int], list[list[int]]]:
    """Prompts of every kind, rows of different lengths that carry them (or none), and the words of word prompts."""
    words = [ids_of(5, 41), ids_of(2, 42)]
    some = choose_layers(frozen.geometry, ("decoder", "cross"), (1,))
    prompts = [
        word_prompt(frozen, words[0]),
        random_prefix(frozen, 3, 43),
        word_prompt(frozen, words[1]),
        random_prefix(frozen, 6, 44, some),
    ]
    rows = [ids_of(n, 50 + n) for n in (6, 9, 4, 7, 5, 8)]
    targets = [ids_of(n, 60 + n) for n in (4, 2, 5, 3, 1, 4)]
    return PromptedLM(frozen, prompts), rows, targets, [1, 0, -1, 3, 2, 0], words


def place_of(name: str) -> LayerKey | None:
    """Site and number of an attention module, from its name alone."""
    parts = name.split(".")
    if parts[-1] not in ("SelfAttention", "EncDecAttention", "self_attn", "encoder_attn", "cross_attn"):
        return None
    number = next(int(part) for part in parts if part.isdigit())
    if parts[-1] in ("EncDecAttention", "encoder_attn", "cross_attn"):
        return LayerKey("cross", number)
    return LayerKey("encoder" if "encoder" in parts else "decoder", number)


@contextlib.contextmanager
def eager_with_prefix(model: PreTrainedModel, prefix: Mapping[LayerKey, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Run a model in transformers' eager attention with keys and values in front of those of the text."""
    code = sys.modules[type(model).__module__]
    places = {module: place_of(name) for name, module in model.named_modules()}
    plain, former = code.eager_attention_forward, implementations_of(model)

    def widened(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        place = places[module]
        if place in prefix:
            keys, values = (states[None].expand(len(key), -1, -1, -1) for states in prefix[place])
            key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
            front = (keys.shape[2], 0)
            mask = None if mask is None else functional.pad(mask, front)
            if kwargs.get("position_bias") is not None:
                kwargs["position_bias"] = functional.pad(kwargs["position_bias"], front)
        return plain(module, query, key, value, mask, **kwargs)

    code.eager_attention_forward = widened
    set_implementation(model, "eager")
    try:
        yield
    finally:
        code.eager_attention_forward = plain
        restore_implementations(former)


# --------------------------------------------------------------------------------------------------------------------
# The contracts
# --------------------------------------------------------------------------------------------------------------------


def _words(subject: PairSubject) -> None:
    words = ids_of(5, 1)
    prompted = PromptedLM(subject.frozen, [word_prompt(subject.frozen, words)])
    for side in ("left", "right"):
        rows, targets = [ids_of(n, 10 + n) for n in (7, 4)], [ids_of(5, 20), ids_of(3, 21)]
        with torch.no_grad():
            found = prompted.label_logits(batch_of(rows, targets, [0, 0], side)).logits_MV
        both = list(zip(rows, targets, strict=True))
        demand_equal(found, torch.cat([own_logits(subject.frozen, words + row, target) for row, target in both]), side)
        other = torch.cat([own_logits(subject.frozen, ids_of(5, 2) + row, target) for row, target in both])
        if float((found - other).abs().max()) < 100 * TOLERANCE * float(found.abs().max()):
            raise WrongError("other words give the same logits: the prompt is ignored")


def _prefix(subject: PairSubject) -> None:
    """All three sites together, and each alone."""
    frozen = subject.frozen
    rows, targets = [ids_of(n, 10 + n) for n in (7, 4)], [ids_of(5, 20), ids_of(3, 21)]
    batch = batch_of(rows, targets, [0, 0])
    assert batch.targets_BU is not None
    bare = torch.cat([own_logits(frozen, row, target) for row, target in zip(rows, targets, strict=True)])
    for sites in ((), ("encoder",), ("decoder",), ("cross",)):
        prompt = random_prefix(frozen, 4, 1, choose_layers(frozen.geometry, sites))
        with torch.no_grad():
            found = PromptedLM(frozen, [prompt]).label_logits(batch).logits_MV
            with eager_with_prefix(frozen.model, prompt().keys_values):
                own = frozen.model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, labels=batch.targets_BU).logits
        demand_equal(found, own[batch.targets_BU != -100].float(), f"prefix at {sites or 'all sites'}")
        if float((found - bare).abs().max()) < 100 * TOLERANCE * float(bare.abs().max()):
            raise WrongError(f"a prefix at {sites or 'all sites'} is ignored")


def _batch(subject: PairSubject, side: str) -> None:
    prompted, rows, targets, which, words = mixture(subject.frozen)
    with torch.no_grad():
        together = prompted.label_logits(batch_of(rows, targets, which, side))
        alone = [prompted.label_logits(batch_of([r], [t], [w])) for r, t, w in zip(rows, targets, which, strict=True)]
    if together.labels_M.tolist() != [token for target in targets for token in target]:
        raise WrongError("the labels are not the targets, row by row")
    parts = together.logits_MV.split([len(target) for target in targets])
    for part, one, row, target, prompt in zip(parts, alone, rows, targets, which, strict=True):
        demand_equal(part, one.logits_MV, side)
        in_front = {0: words[0], 2: words[1], -1: []}.get(prompt)
        if in_front is not None:
            demand_equal(part, own_logits(subject.frozen, in_front + row, target), f"{side}, against the words")


def _packed(subject: PairSubject) -> None:
    if subject.frozen.packable:
        raise WrongError("says that it runs on packed rows")
    raise NotApplicableError("runs on padded rows only")


def _decoding(subject: PairSubject, side: str, steps: int) -> None:
    prompted, rows, _, which, _ = mixture(subject.frozen)
    new_BU = torch.tensor([ids_of(4, 70 + number) for number in range(len(rows))])
    order = torch.tensor([len(rows) - 1, *range(len(rows) - 1)])
    batch = batch_of(rows, new_BU.tolist(), which, side)
    with torch.no_grad():
        expected = prompted.label_logits(batch).logits_MV.unflatten(0, (len(rows), 4))
    logits_BV, state = prompted.start(batch)
    demand_equal(logits_BV, expected[:, 0], "first step")
    if steps:
        demand_equal(prompted.step(new_BU[:, 0], state), expected[:, 1], "decoding")
        state.select(order)
        for column in range(1, steps):
            got = prompted.step(new_BU[order, column], state)
            demand_equal(got, expected[order, column + 1], "decoding after reordering")


def _gradient(subject: PairSubject) -> None:
    """Every parameter at all three sites, plain or reparametrized, and every number of an embedding prompt."""
    batch = batch_of([ids_of(n, 90 + n) for n in (6, 4)], [ids_of(4, 91), ids_of(3, 92)], [0, 0])
    for name in ("none", "mlp", "residual", "embedding"):
        config = (
            PromptConfig(kind="prefix", length=3, reparametrization=ReparamConfig(name=name, hidden_size=8))
            if (name != "embedding")
            else PromptConfig(kind="embedding", length=3)
        )
        prompt = build_prompt(config, subject.frozen, seed=0)
        PromptedLM(subject.frozen, [prompt]).label_losses(batch).losses_M.sum().backward()
        for path, parameter in prompt.named_parameters():
            # the MLP of a residual starts at an output of zero, and so do its inner gradients
            waiting = name == "residual" and "outer" not in path and "start" not in path
            if parameter.grad is None or not (waiting or bool((parameter.grad != 0).all())):
                raise WrongError(f"{name}: not every number of {path} gets a gradient")
        if name == "mlp" and len(list(prompt.parametrization.get_submodule("parts").children())) != 3:
            raise WrongError("the three sites share a reparametrization")


def _head(subject: PairSubject) -> None:
    rows, targets = [ids_of(n, 10 + n) for n in (7, 4)], [ids_of(5, 20), ids_of(3, 21)]
    with torch.no_grad():
        found = PromptedLM(subject.frozen).label_logits(batch_of(rows, targets, [-1, -1])).logits_MV
    own = [own_logits(subject.frozen, row, target) for row, target in zip(rows, targets, strict=True)]
    demand_equal(found, torch.cat(own), "head")


def _unchanged(subject: PairSubject) -> None:
    fresh, used = tiny_seq2seq(subject.shape).state_dict(), subject.frozen.model.state_dict()
    if fresh.keys() != used.keys() or not all(torch.equal(fresh[name], used[name]) for name in fresh):
        raise WrongError("weights have changed")
    if any(parameter.grad is not None for parameter in subject.frozen.model.parameters()):
        raise WrongError("weights hold gradients")
    hooks = [module for module in subject.frozen.model.modules() if module._forward_hooks or module._forward_pre_hooks]
    if hooks:
        raise WrongError("hooks are left on the model")


def _losses(frozen: FrozenLM) -> list[Tensor]:
    """Losses of a batch with both kinds of prompt, and the prompts' gradients."""
    batch = batch_of([ids_of(n, 94 + n) for n in (6, 4)], [ids_of(4, 95), ids_of(3, 96)], [0, 1])
    prompts = [random_prefix(frozen, 3, 1), word_prompt(frozen, ids_of(2, 3))]
    losses_M = PromptedLM(frozen, prompts).label_losses(batch).losses_M
    losses_M.sum().backward()
    return [losses_M.detach(), *(parameter.grad for prompt in prompts for parameter in prompt.parameters())]


def _checkpointing(subject: PairSubject) -> None:
    before = _losses(subject.frozen)
    subject.frozen.enable_gradient_checkpointing()
    for one, two in zip(_losses(subject.frozen), before, strict=True):
        demand_equal(one, two, "loss or gradient")


PAIR_COLUMNS: dict[str, Callable[[PairSubject], None]] = {
    "embedding = words": _words,
    "prefix = words": _prefix,
    "left-padded batch = rows": lambda subject: _batch(subject, "left"),
    "right-padded batch = rows": lambda subject: _batch(subject, "right"),
    "packed = padded": _packed,
    "training = first step": lambda subject: _decoding(subject, "left", 0),
    "cache on = off": lambda subject: _decoding(subject, "right", 3),
    "gradient everywhere": _gradient,
    "head at labels": _head,
    "frozen unchanged": _unchanged,
    "checkpointing on = off": _checkpointing,
}
"""The columns of the decoder-only matrix, in the same order (the last one leaves the model changed)."""
assert list(PAIR_COLUMNS) == list(COLUMNS)


def judge_pair(subject: PairSubject, column: str) -> Cell:
    """Fill one cell of the matrix."""
    try:
        subject.frozen  # noqa: B018  (loading is what may be refused)
        PAIR_COLUMNS[column](subject)
    except UnsupportedModelError as error:
        return Cell("refused", str(error))
    except NotApplicableError as error:
        return Cell("not applicable", str(error))
    except WrongError as error:
        return Cell("wrong", str(error))
    return Cell(RIGHT)
