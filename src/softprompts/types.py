"""The values that cross the borders between units.

Shape letters: B batch, T text tokens, P prompt length, L layers, N KV heads, H head size, D width, V vocabulary,
K prompts. A tensor's name ends in its shape: ``ids_BT`` is ``[batch, text tokens]``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor, device

__all__ = [
    "UNLABELLED",
    "Batch",
    "Encoded",
    "Example",
    "Geometry",
    "KeyValueSite",
    "LayerKey",
    "MetricValue",
    "Prediction",
    "PromptStates",
    "Segment",
    "TextEmbedder",
]


UNLABELLED = "<unk>"
"""Target of a test record whose label the data set keeps secret, as in T5's preprocessors."""


class LayerKey(NamedTuple):
    """Where keys and values live: an attention site and the layer's number within it.

    ``site`` is ``"self"`` for decoder-only models; encoder-decoders have ``"encoder"``, ``"decoder"`` and ``"cross"``.
    """

    site: str
    layer: int


@dataclass(frozen=True)
class KeyValueSite:
    """One layer that owns keys and values, as a probe of the model saw it."""

    key: LayerKey
    kv_heads: int
    """N, the number of key/value heads (grouped-query attention has fewer than query heads)."""
    key_size: int
    """H of the keys."""
    value_size: int
    """H of the values; multi-head latent attention has another one than the keys'."""
    window: int | None = None
    """Tokens that this layer looks back, or ``None`` for all of them."""

    @property
    def width(self) -> int:
        """Numbers per prompt position: keys and values of all heads."""
        return self.kv_heads * (self.key_size + self.value_size)


@dataclass(frozen=True)
class Geometry:
    """What a frozen model offers to a prompt. Read by probing, never from config field names."""

    family: str
    """``config.model_type`` of the model."""
    width: int
    """D, the size of one input embedding."""
    vocab_size: int
    """V, rows of the input embedding table; 0 where only the width is known (:attr:`is_partial`)."""
    max_positions: int | None
    """Longest sequence that the model was made for (prompt included), or ``None`` where nothing limits it."""
    sites: tuple[KeyValueSite, ...]
    """Every layer that owns keys and values, in the order in which the model runs them; of an encoder-decoder all of
    the encoder, then the decoder's self-attention, then its cross-attention."""
    prompt_scrolls: bool = False
    """Whether a prompt takes part in sliding windows and scrolls out of sight like text; otherwise it stays visible to
    every token in every layer. Always false where no layer has a window."""

    @property
    def is_partial(self) -> bool:
        """Whether nothing but the width is known: that of embeddings from a file that names no model."""
        return self.vocab_size == 0

    @property
    def prefix_width(self) -> int:
        """Numbers per position of a prefix over all layers."""
        return sum(site.width for site in self.sites)

    def reached(self, layers: Collection[LayerKey] | None) -> tuple[KeyValueSite, ...]:
        """The sites at these layers, in the order of :attr:`sites`; ``None`` stands for all layers."""
        return tuple(site for site in self.sites if layers is None or site.key in layers)


@dataclass(frozen=True)
class PromptStates:
    """What a prompt yields, **unbatched**: embeddings and/or keys and values per layer.

    A folded prompt has keys and values only. Gradients flow through these tensors while training.
    """

    length: int
    """P."""
    embeddings_PD: Tensor | None = None
    keys_values: Mapping[LayerKey, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Per layer ``(keys [N, P, H], values [N, P, H])``, keys after rotary embedding, as the attention sees them."""
    infix: bool = False
    """Whether it stands behind the input of its row, and not in front of it."""


@dataclass(frozen=True)
class Example:
    """One record of a task as text."""

    input: str
    target: str
    references: tuple[str, ...] = ()
    """All acceptable outputs (for metrics); empty means ``(target,)``."""
    choices: tuple[str, ...] = ()
    """The legal answers of a classification task, empty for free text."""
    id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tail: str = ""
    """The end of ``input`` that truncation spares as long as it can (the question behind a passage)."""

    @property
    def all_references(self) -> tuple[str, ...]:
        """The references, or the target where there are none."""
        return self.references or (self.target,)


class Segment(NamedTuple):
    """A piece of a formatted example. ``role`` is ``"input"``, ``"separator"``, ``"target"`` or ``"end"``.

    An infix goes where the first segment that is not ``"input"`` begins.
    """

    text: str
    role: str


@dataclass(frozen=True)
class Encoded:
    """One example as token ids. Labels are those of ``ids[target_start:]``, or ``decoder_ids`` where there are any."""

    ids: tuple[int, ...]
    target_start: int
    """Index of the first token that is predicted and learned; ``len(ids)`` for an input without target."""
    example: Example
    prompt: int = 0
    """Index of the prompt that this row carries; -1 for none."""
    decoder_ids: tuple[int, ...] | None = None
    """For encoder-decoders: the tokens of the target, end included; ``ids`` is then what the encoder reads."""
    infix_at: int | None = None
    """Index of the first token behind the input, which is where an infix goes; ``None`` where nobody said."""

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The tokens that are predicted and learned."""
        return self.ids[self.target_start :] if self.decoder_ids is None else self.decoder_ids

    @property
    def length(self) -> int:
        """Tokens that the model reads, the target's included."""
        return len(self.ids) + len(self.decoder_ids or ())


@dataclass(frozen=True)
class Batch:
    """One padded batch. ``mask`` is 1 on real tokens, ``labels`` is -100 where nothing is learned.

    ``labels_BT[b, t]`` is the token that the model should predict AT position t, that is token t itself (the shift by
    one is done by the owner of the forward pass, as in transformers).
    """

    ids_BT: Tensor
    mask_BT: Tensor
    labels_BT: Tensor | None
    prompt_of_row_B: Tensor
    """Index of each row's prompt, -1 for none."""
    targets_BU: Tensor | None = None
    """For encoder-decoders: the tokens that the decoder should predict at its positions ``0..U-1``, -100 behind each
    row's end; ``ids_BT`` is the encoder's input then and ``labels_BT`` is ``None``. The owner of the forward pass makes
    the decoder's input of it: the start token, then these tokens but the last."""
    infix_B: Tensor | None = None
    """Real tokens in front of the place where an infix goes; ``None`` where nobody said."""

    @property
    def rows(self) -> int:
        """B."""
        return int(self.ids_BT.shape[0])

    def to(self, device: device) -> Batch:
        """Return the same batch on another device."""
        labels = None if self.labels_BT is None else self.labels_BT.to(device)
        targets = None if self.targets_BU is None else self.targets_BU.to(device)
        infix = None if self.infix_B is None else self.infix_B.to(device)
        owners = self.prompt_of_row_B.to(device)
        return Batch(self.ids_BT.to(device), self.mask_BT.to(device), labels, owners, targets, infix)

    @property
    def tokens(self) -> int:
        """Real tokens that the model reads."""
        return int(self.mask_BT.sum()) + (0 if self.targets_BU is None else int((self.targets_BU != -100).sum()))


@dataclass(frozen=True)
class Prediction:
    """A generated output beside its example."""

    example: Example
    text: str
    logprob: float | None = None
    """Sum of the model's log-probabilities of the generated tokens."""
    finished: bool | None = None
    """Whether the model ended the text itself; ``False``: it was cut at ``max_new_tokens``."""
    new_tokens: int | None = None
    ranked: str | None = None
    """The likeliest of the example's choices, where they were ranked."""
    choice_scores: tuple[float, ...] = ()
    """What the choices were ranked by, in the order of ``example.choices``."""


@dataclass(frozen=True)
class MetricValue:
    """One score with its bootstrap standard error."""

    value: float
    stderr: float | None
    name: str = ""


class TextEmbedder(Protocol):
    """What an initializer needs of a frozen model (implemented by ``models.frozen.FrozenLM``)."""

    @property
    def geometry(self) -> Geometry:
        """Shapes of the model."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""
        ...

    def tokenize_words(self, text: str) -> list[int]:
        """Token ids of ``text`` as it would stand inside a sentence (a leading space where the tokenizer wants one)."""
        ...

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts in front of every text, often nothing."""
        ...

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Input embeddings ``[len(ids), D]`` as the model itself computes them."""
        ...

    def activations(self, embeddings_PD: Tensor) -> Mapping[LayerKey, tuple[Tensor, Tensor]]:
        """Keys and values that these embeddings evoke in every layer."""
        ...

    def common_ids(self, count: int) -> list[int]:
        """The ``count`` most common token ids, most common first, special tokens left out."""
        ...
