"""Inputs in front of an infix, read once: their keys and values do not depend on the prompt.

In ``[x; INFIX; y]`` the tokens of x see nothing of the infix, so in a frozen model their keys and values are the same
in every step and every epoch. They are computed when a row first asks for them, once per distinct input, and kept; a
step then runs only what stands behind. Nothing is learned in front of an infix, so no gradient is lost.

Shape letters: B rows, R some of them, T text tokens, S tokens of inputs, P prompt length, N KV heads, H head size,
W numbers per token (keys and values of all layers, as in a prefix), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from softprompts.errors import ConfigError
from softprompts.types import Batch, Geometry, LayerKey

if TYPE_CHECKING:
    from softprompts.models.attention import Steering

__all__ = ["Held", "Read", "SourceCache", "cuttable", "put_in_front", "without_inputs"]

Read = Callable[[Tensor, Tensor], Mapping[LayerKey, tuple[Tensor, Tensor]]]
"""Ids and mask ``[R, S]``, padded on the right, to keys and values ``[R, N, S, H]`` of every layer."""


@dataclass(frozen=True)
class Held:
    """Keys and values of the inputs in front of the rows of one batch."""

    tables: tuple[Tensor, ...]
    """Per row ``[S, W]``; no row of it where nothing is held."""
    geometry: Geometry
    layouts: dict[int | None, Any] = field(default_factory=dict, repr=False, compare=False)
    """What attention made of the lengths, per window."""
    _padded: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def lengths(self) -> list[int]:
        """S of every row."""
        return [len(table) for table in self.tables]

    def keys_values(self, rows: Sequence[int], layer: LayerKey, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some rows in one layer, ``[R, N, S, H]``, zeros behind shorter inputs.

        Args:
            rows: Numbers of the rows; below 0 for one without input.
            layer: Which layer.
            like: Says device and type.
        """
        place = tuple(rows)
        if place not in self._padded:  # laid out once for all layers
            blank = self.tables[0][:0]
            tables = [self.tables[row] if row >= 0 else blank for row in rows]
            self._padded[place] = pad_sequence(tables, batch_first=True).to(like.device, like.dtype)
        first = 0
        for site in self.geometry.sites:
            if site.key == layer:
                break
            first += site.width
        middle, end = first + site.kv_heads * site.key_size, first + site.width
        keys, values = self._padded[place][:, :, first:middle], self._padded[place][:, :, middle:end]
        shape = (site.kv_heads, -1)
        return keys.unflatten(2, shape).transpose(1, 2), values.unflatten(2, shape).transpose(1, 2)


class SourceCache:
    """Keys and values of inputs, in memory, each distinct input once.

    Args:
        read: Runs the frozen model over inputs; see :data:`Read`.
        geometry: Of that model.
        limit_bytes: Most bytes that may be kept.

    Attributes:
        bytes: What is kept now.
    """

    def __init__(self, read: Read, geometry: Geometry, *, limit_bytes: int) -> None:
        self.geometry, self.limit_bytes, self.bytes = geometry, limit_bytes, 0
        self._read = read
        self._tables: dict[tuple[torch.dtype, tuple[int, ...]], Tensor] = {}

    def __len__(self) -> int:
        return len(self._tables)

    def emptied(self) -> SourceCache:
        """Make one like this that holds nothing."""
        return SourceCache(self._read, self.geometry, limit_bytes=self.limit_bytes)

    def needed_bytes(self, sources: Mapping[torch.dtype, Iterable[tuple[int, ...]]]) -> int:
        """Bytes that these inputs will take.

        Args:
            sources: Ids of inputs, by what their keys and values are computed in; repeated ones count once.

        Raises:
            ConfigError: They are more than the limit.
        """
        lengths = {dtype: sum(map(len, set(own))) for dtype, own in sources.items()}
        tokens = sum(lengths.values())
        needed = sum(length * self.geometry.prefix_width * dtype.itemsize for dtype, length in lengths.items())
        if needed > self.limit_bytes:
            raise ConfigError(
                f"keys and values of {tokens} tokens of input take {needed / 2**30:.2f} GiB, more than the "
                f"{self.limit_bytes / 2**30:.2f} GiB of model.cache_source_gib; raise it, or set "
                "model.cache_source_gib to null"
            )
        return needed

    def held(self, batch: Batch, length_B: Tensor, dtype: torch.dtype) -> Held:
        """Give the keys and values of the first ``length_B`` real tokens of every row, reading what is new.

        Args:
            batch: Padded on either side.
            length_B: 0 for a row of which nothing is held.
            dtype: What attention computes in.

        Raises:
            ConfigError: There is no room for what is new.
        """
        texts = [ids[real.bool()] for ids, real in zip(batch.ids_BT.cpu(), batch.mask_BT.cpu(), strict=True)]
        sources = [tuple(ids[:length].tolist()) for ids, length in zip(texts, length_B.tolist(), strict=True)]
        new = [source for source in dict.fromkeys(sources) if source and (dtype, source) not in self._tables]
        if new:
            self._add(new, dtype, batch.ids_BT.device)
        blank = torch.empty(0, self.geometry.prefix_width, dtype=dtype)
        return Held(tuple(self._tables[dtype, source] if source else blank for source in sources), self.geometry)

    @torch.no_grad()
    def _add(self, sources: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        needed = self.needed_bytes({dtype: sources})
        if self.bytes + needed > self.limit_bytes:
            raise ConfigError(
                f"keys and values of {len(self) + len(sources)} inputs take more than the "
                f"{self.limit_bytes / 2**30:.2f} GiB of model.cache_source_gib; raise it, or set "
                "model.cache_source_gib to null"
            )
        self.bytes += needed
        ids_RS = pad_sequence([torch.tensor(source) for source in sources], batch_first=True)
        length_R = torch.tensor([len(source) for source in sources])
        mask_RS = (torch.arange(ids_RS.shape[1]) < length_R[:, None]).long()
        states = self._read(ids_RS.to(device), mask_RS.to(device))
        parts = [part for site in self.geometry.sites for part in states[site.key]]
        table_RSW = torch.cat([part.to("cpu", dtype).transpose(1, 2).flatten(2) for part in parts], dim=2)
        for source, table_SW in zip(sources, table_RSW, strict=True):
            self._tables[dtype, source] = table_SW[: len(source)].clone()


def cuttable(batch: Batch, in_front_B: Tensor) -> Tensor:
    """How many real tokens at the start of each row need not be run with it, ``[B]``.

    Args:
        batch: With labels.
        in_front_B: Whether the input of the row sees no prompt (bool): its prompt is an infix, or it has none.
    """
    if batch.infix_B is None:
        return torch.zeros_like(batch.prompt_of_row_B)
    place_BT = batch.mask_BT.long().cumsum(dim=1) - 1
    assert batch.labels_BT is not None
    # A label is predicted from the token in front of it, and that one has to be run.
    far = torch.iinfo(torch.long).max
    label_B = place_BT.masked_fill(batch.labels_BT == -100, far).amin(dim=1)
    return torch.where(in_front_B & (label_B > batch.infix_B), batch.infix_B, 0)


def without_inputs(batch: Batch, words_BTD: Tensor | None, length_B: Tensor) -> tuple[Batch, Tensor | None]:
    """Leave the first ``length_B`` real tokens of every row out; what is left is padded on the right.

    Args:
        batch: Padded on either side.
        words_BTD: Its embeddings, where not all of it is words.
        length_B: Tokens to leave out.
    """
    place_BT = batch.mask_BT.long().cumsum(dim=1) - 1
    kept_BT = (batch.mask_BT == 1) & (place_BT >= length_B[:, None])
    width = int(kept_BT.sum(dim=1).max())
    order_BT = torch.argsort((~kept_BT).int(), dim=1, stable=True)[:, :width]
    shorter = replace(
        batch,
        ids_BT=batch.ids_BT.gather(1, order_BT),
        mask_BT=kept_BT.gather(1, order_BT).to(batch.mask_BT.dtype),
        labels_BT=None if batch.labels_BT is None else batch.labels_BT.gather(1, order_BT),
        infix_B=None if batch.infix_B is None else batch.infix_B - length_B,
    )
    if words_BTD is not None:
        words_BTD = words_BTD.gather(1, order_BT[:, :, None].expand(-1, -1, words_BTD.shape[2]))
    return shorter, words_BTD


def put_in_front(steering: Steering, held: Held, mask_BT: Tensor, dtype: torch.dtype) -> None:
    """Let padded rows see their held inputs, in front of the prompts that they see already.

    Args:
        steering: Of a model without sliding windows; changed in place.
        held: The inputs of all rows.
        mask_BT: Of the batch, for its device.
        dtype: What attention computes in.
    """
    rows, device = list(range(len(held.tables))), mask_BT.device
    like = torch.empty(0, dtype=dtype, device=device)
    lengths_B1 = torch.tensor(held.lengths, device=device)[:, None]
    own_BS = torch.arange(max(held.lengths), device=device)[None] < lengths_B1
    wide: dict[LayerKey, tuple[Tensor, Tensor]] = {}
    seen: dict[int, Tensor] = {}
    visible_at: dict[LayerKey, Tensor] = {}
    for site in held.geometry.sites:
        keys, values = held.keys_values(rows, site.key, like)
        visible_BP = own_BS[:, :0]
        if site.key in steering.keys_values:
            prompt = [states.expand(len(rows), -1, -1, -1).to(dtype) for states in steering.keys_values[site.key]]
            keys, values = torch.cat([keys, prompt[0]], dim=2), torch.cat([values, prompt[1]], dim=2)
            given = steering.visible_at.get(site.key, steering.visible_BP)
            visible_BP = own_BS.new_ones(len(rows), prompt[0].shape[2]) if given is None else given
            place = id(given)
        else:
            place = -1
        if place not in seen:  # layers that the same prompts reach share one mask
            seen[place] = torch.cat([own_BS, visible_BP], dim=1)
        wide[site.key], visible_at[site.key] = (keys, values), seen[place]
    steering.keys_values, steering.visible_at = wide, visible_at
