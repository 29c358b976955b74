"""Where a model's feed-forward networks sit, found by running it: names of modules and of config fields differ.

Two tokens go through the layers while every linear map is *cut*: its output becomes the start of a new graph. The
gradient of what enters a linear map then reaches exactly the linear maps directly in front of it, and tells what
stands between them. A map is the *down projection* of a feed-forward network if

* one or two maps stand in front of it, which read the same input (two: a gate beside the other, as in SwiGLU; one of
  twice the width: both in one matrix);
* what stands between them looks at each position for itself (attention does not), and at each number for itself
  (norms and low-rank maps with a norm do not);
* it is not linear: the slopes at the two tokens differ;
* the way leads from the width of the residual stream back to it.

Every layer must have exactly one, and nothing in a layer may be left unexplained: a mixture of experts, whose tokens
choose their networks, is refused.

Shape letters: B rows, D width, F neurons of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from softprompts.errors import UnsupportedModelError
from softprompts.models.attention import Steering
from softprompts.models.frozen import FrozenLM

__all__ = ["FeedForward", "find_feed_forwards", "watch"]

_TOKENS = 2
_ENCODER_TOKENS = 3
"""Another number: maps that read the encoder's states are told from those that read the decoder's."""


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward network of one layer."""

    name: str
    """Of the down projection, within the stack of layers."""
    width: int
    """F, its neurons."""
    gated: bool
    """Whether what enters the down projection is a product with a gate (SwiGLU and its kin)."""
    down: nn.Module = field(repr=False)


class _Call(NamedTuple):
    """One call of a linear map."""

    name: str
    module: nn.Module
    entered: Tensor
    left: Tensor
    """A leaf: gradients end here."""

    @property
    def tokens(self) -> int:
        return self.left.numel() // self.left.shape[-1]


def find_feed_forwards(frozen: FrozenLM) -> tuple[FeedForward, ...]:
    """Find the feed-forward network of every layer; of an encoder-decoder, of the decoder's layers.

    Raises:
        UnsupportedModelError: A layer has none or several, as a mixture of experts has, or something else in it is
            not understood.
    """
    part = frozen.causal.body if frozen.causal is not None else _pair_decoder(frozen)
    family, checkpointing = frozen.geometry.family, frozen.gradient_checkpointing
    if checkpointing:  # recomputing would run the cuts a second time
        frozen.disable_gradient_checkpointing()
    try:
        with torch.enable_grad():
            with _cut(part) as calls:
                _run_two_tokens(frozen)
            found = [ffn for number, call in enumerate(calls) if (ffn := _as_down(call, calls[:number])) is not None]
    finally:
        if checkpointing:
            frozen.enable_gradient_checkpointing()
    place = _stack_of(family, [ffn.name for ffn in found])
    stack = part.get_submodule(place)
    assert isinstance(stack, nn.ModuleList)
    return tuple(_only_one(family, place, number, found, stack, calls) for number in range(len(stack)))


@contextmanager
def watch(feed_forwards: Sequence[FeedForward], rows: int) -> Iterator[list[Tensor | None]]:
    """Note what enters the down projections while a model runs; afterwards it is as it was.

    Args:
        feed_forwards: Of :func:`find_feed_forwards`.
        rows: B of the batch that will be run.

    Yields:
        Per layer the last thing that entered, at the last position of each row: ``[B, F]``.
    """
    seen: list[Tensor | None] = [None] * len(feed_forwards)

    def note(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            entered = arguments[0].detach()
            seen[number] = entered.reshape(rows, -1, entered.shape[-1])[:, -1]  # some families flatten [B, T]

        return hook

    with ExitStack() as hooks:
        for number, ffn in enumerate(feed_forwards):
            hooks.callback(ffn.down.register_forward_pre_hook(note(number)).remove)
        yield seen


# --------------------------------------------------------------------------------------------------------------------
# Running two tokens through cut maps
# --------------------------------------------------------------------------------------------------------------------


def _pair_decoder(frozen: FrozenLM) -> nn.Module:
    assert frozen.pair is not None
    return frozen.pair.decoder


@contextmanager
def _cut(part: nn.Module) -> Iterator[list[_Call]]:
    calls: list[_Call] = []

    def note(name: str) -> Callable[[nn.Module, tuple[object, ...], object], Tensor | None]:
        def hook(module: nn.Module, arguments: tuple[object, ...], output: object) -> Tensor | None:
            entered = arguments[0] if arguments else None
            if not isinstance(entered, Tensor) or not isinstance(output, Tensor) or not entered.is_floating_point():
                return None
            left = output.detach().requires_grad_()
            calls.append(_Call(name, module, entered, left))
            return left.clone()  # a leaf itself could not be changed in place, which some models do

        return hook

    with ExitStack() as hooks:
        for name, module in part.named_modules():
            if _may_be_linear(module):
                hooks.callback(module.register_forward_hook(note(name)).remove)
        yield calls


def _may_be_linear(module: nn.Module) -> bool:
    """Whether it is one matrix: as a parameter, or (quantized) as a buffer of integers."""
    if next(module.children(), None) is not None or isinstance(module, nn.Embedding):
        return False
    return any(tensor.ndim == 2 for tensor in module.parameters(recurse=False)) or any(
        tensor.ndim >= 2 for tensor in module.buffers(recurse=False)
    )


def _run_two_tokens(frozen: FrozenLM) -> None:
    vocabulary, device = frozen.geometry.vocab_size, frozen.device
    ids = torch.tensor([[vocabulary // 3, 2 * vocabulary // 3]], device=device)  # far from special tokens, and unequal
    if frozen.pair is None:
        frozen.hidden_states(
            steering=Steering(frozen.layer_of),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(_TOKENS, device=device)[None],
        )
        return
    words = torch.cat([ids, ids[:, :1]], dim=1)
    mask = torch.ones(1, _ENCODER_TOKENS, dtype=torch.long, device=device)
    encoded = frozen.pair.encode(frozen.pair.embed(words), mask, Steering(frozen.layer_of))
    frozen.pair.decode(ids, encoded, mask, Steering(frozen.layer_of))


# --------------------------------------------------------------------------------------------------------------------
# Reading the gradients
# --------------------------------------------------------------------------------------------------------------------


def _as_down(call: _Call, earlier: Sequence[_Call]) -> FeedForward | None:
    """The feed-forward network that ends in this call, or ``None`` where it ends something else."""
    if not call.entered.requires_grad or call.tokens != _TOKENS or not earlier:
        return None
    entered_TF = call.entered.reshape(_TOKENS, -1)
    width = entered_TF.shape[1]
    slopes: Sequence[Tensor | None] = torch.autograd.grad(
        entered_TF[1].sum(), [other.left for other in earlier], retain_graph=True, allow_unused=True
    )
    parents = [other for other, slope in zip(earlier, slopes, strict=True) if slope is not None and bool(slope.any())]
    widths = [parent.left.shape[-1] for parent in parents]
    if (
        widths not in ([width], [2 * width], [width, width])
        or any(parent.tokens != _TOKENS for parent in parents)
        or any(parent.entered.shape[-1] != call.left.shape[-1] for parent in parents)
        or not torch.equal(parents[0].entered, parents[-1].entered)
        or not all(_is_elementwise(entered_TF, parent.left) for parent in parents)
    ):
        return None
    return FeedForward(call.name, width, gated=widths != [width], down=call.module)


def _is_elementwise(entered_TF: Tensor, left: Tensor) -> bool:
    """Whether each number depends on one number (or one of each half) of ``left`` at its position, and not linearly."""
    width = entered_TF.shape[1]
    some_F = torch.rand(width, generator=torch.Generator().manual_seed(0)).lt(0.5).to(entered_TF.device)

    def slopes(weights_TF: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad((entered_TF * weights_TF).sum(), left, retain_graph=True)
        return slope.reshape(_TOKENS, -1)

    ones_TF = torch.ones_like(entered_TF)
    both = slopes(ones_TF)
    alone = slopes(ones_TF * torch.tensor([[0.0], [1.0]], device=ones_TF.device))
    if bool(alone[0].any()) or not torch.equal(alone[1], both[1]):
        return False  # positions are mixed
    chosen = slopes(ones_TF * some_F)
    times = both.shape[1] // width
    halves, pairs = some_F.repeat(times), some_F.repeat_interleave(times)  # [gate | up], or gate and up in turn
    if not torch.equal(chosen, both * halves) and not torch.equal(chosen, both * pairs):
        return False  # numbers are mixed
    return not torch.equal(both[0], both[1])


def _stack_of(family: str, names: Sequence[str]) -> str:
    """The list of layers that these modules lie in: what stands in front of the first number of their names."""
    stacks = {".".join(parts[: _first_number(parts)]) for parts in (name.split(".") for name in names)}
    if len(stacks) != 1:
        found = "no feed-forward network" if not stacks else f"feed-forward networks in {', '.join(sorted(stacks))}"
        raise UnsupportedModelError(
            f"two tokens through '{family}' showed {found}, expected one in every layer; its activated neurons cannot "
            "be told (a mixture of experts chooses other networks for every token)"
        )
    return stacks.pop()


def _first_number(parts: Sequence[str]) -> int:
    return next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))


def _only_one(
    family: str, place: str, number: int, found: Sequence[FeedForward], stack: nn.ModuleList, calls: Sequence[_Call]
) -> FeedForward:
    prefix = f"{place}.{number}."
    inside = [ffn for ffn in found if ffn.name.startswith(prefix)]
    if len(inside) > 1:
        # Gemma's gates for what a layer knows of each word are narrower than the stream; feed-forwards are wider.
        inside = [ffn for ffn in inside if ffn.width > max(_stream_width(ffn, calls), 1)]
    odd = _unexplained(stack[number], prefix, calls)
    if len(inside) != 1 or odd:
        what = f"'{odd}' is not understood" if odd else f"{len(inside)} feed-forward networks are found"
        raise UnsupportedModelError(
            f"layer {number} of '{family}' is not attention and one feed-forward network: {what}, so its activated "
            "neurons cannot be told (a mixture of experts chooses other networks for every token)"
        )
    return inside[0]


def _stream_width(ffn: FeedForward, calls: Sequence[_Call]) -> int:
    return int(next(call.left.shape[-1] for call in calls if call.module is ffn.down))


def _unexplained(layer: nn.Module, prefix: str, calls: Sequence[_Call]) -> str | None:
    """The first matrix of a layer that did not run once, on all tokens, as a linear map."""
    ran = [call.name for call in calls if call.tokens in (_TOKENS, _ENCODER_TOKENS)]
    for name, module in layer.named_modules():
        if isinstance(module, (nn.Embedding, nn.Conv1d)):  # relative positions, short convolutions
            continue
        matrices = [own for own, tensor in module.named_parameters(recurse=False) if tensor.ndim >= 2]
        if matrices and ran.count(f"{prefix}{name}") != 1:
            return f"{name}.{matrices[0]}"
    return None
