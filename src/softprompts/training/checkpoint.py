"""Training states on disk: written whole or not at all, and enough of them to go on as if nothing had happened.

A run's directory holds ``last.pt`` (everything a resumed run needs) and ``best.pt`` (the trained parameters at the
best validation). Both hold plain tensors and containers and are read with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import random
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from softprompts.errors import CheckpointError, StorageError

__all__ = [
    "Checkpoints",
    "TrainState",
    "changed_keys",
    "finish_saving_together",
    "load_state",
    "rng_state",
    "save_state",
    "save_together",
    "seed_everything",
    "set_rng_state",
]

_FORMAT = 1

_FREE_SETTINGS = frozenset(
    f"training.{name}" for name in ("max_steps", "max_seconds", "patience", "checkpoint_every_steps")
)
"""What may change between a run and its resumption: when it ends and how often it saves."""


@dataclasses.dataclass
class TrainState:
    """How far a run is. Every field is saved; the loop keeps nothing else between updates."""

    step: int = 0
    """Updates made."""
    epoch: int = 0
    position: int = 0
    """Batches of the epoch that were used."""
    tokens: int = 0
    seconds: float = 0.0
    loss_average: float = 0.0
    """Exponential average of the training loss, not yet corrected for its start at zero."""
    last_loss: float = float("nan")
    best_score: float | None = None
    best_step: int = 0
    best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    validations_since_best: int = 0
    events_bytes: int = 0
    diverged: bool = False
    """The loss was no finite number, and other runs went on without this one."""


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a state so that ``path`` always holds either the old or the new one.

    Raises:
        StorageError: Writing failed (a full disk); the file that was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports some failed writes as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        older = "the older one is intact" if path.exists() else "there was none before"
        raise StorageError(f"cannot save the checkpoint '{path}': {error}; {older}: make room and resume") from error


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut."""
    if os.name != "posix":  # Windows cannot open directories
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote.

    Raises:
        CheckpointError: The file is missing, damaged or of another version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint '{path}'; start the run without resuming") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"checkpoint '{path}' is damaged: {error}; start the run anew") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"checkpoint '{path}' has format {found}, expected {_FORMAT}; start the run anew")
    return state


def seed_everything(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the state of every random number generator as plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`rng_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name the keys of two nested mappings that differ and matter for a resumed run.

    Returns:
        ``"a.b (1 -> 2)"`` for each one; keys that only say when a run ends or saves are left out.
    """
    found = []
    for key in sorted({*old, *new}):
        place = f"{prefix}{key}"
        before, after = _as_stored(old.get(key)), _as_stored(new.get(key))
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += changed_keys(before, after, f"{place}.")
        elif before != after and place not in _FREE_SETTINGS:
            found.append(f"{place} ({before} -> {after})")
    return found


def _as_stored(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@final
class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: The run's directory.
        settings: What shapes the run's losses, as nested plain values; compared on resumption.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.last = directory / "last.pt"
        self.pending = directory / "last.pending.pt"
        """State of a save that several runs make together, until all of them have written theirs."""
        self.best = directory / "best.pt"
        self._settings = settings

    def clear(self) -> None:
        """Remove the checkpoints of an earlier run."""
        for path in (self.last, self.pending, self.best):
            path.unlink(missing_ok=True)

    def save_last(
        self,
        state: TrainState,
        trained: Mapping[str, Tensor],
        optimizer: Optimizer,
        *,
        save: str = "",
        path: Path | None = None,
    ) -> None:
        """Save all that a resumed run needs.

        Args:
            state: How far the run is.
            trained: Its trained parameters.
            optimizer: With its moments.
            save: Name of the save that several runs make together; empty for a run on its own.
            path: Where to, instead of ``last.pt``.

        Raises:
            StorageError: See :func:`save_state`.
        """
        save_state(
            {
                "format": _FORMAT,
                "settings": dict(self._settings),
                "state": dataclasses.asdict(state),
                "trained": dict(trained),
                "optimizer": optimizer.state_dict(),
                "rng": rng_state(),
                "save": save,
            },
            path or self.last,
        )

    def save_best(self, state: TrainState, trained: Mapping[str, Tensor]) -> None:
        """Save the parameters of the best validation so far.

        Raises:
            StorageError: See :func:`save_state`.
        """
        save_state(
            {"format": _FORMAT, "step": state.best_step, "metrics": state.best_metrics, "trained": dict(trained)},
            self.best,
        )

    def load_last(self, optimizer: Optimizer) -> tuple[TrainState, dict[str, Tensor]]:
        """Restore optimizer and random numbers, and return the state and the trained parameters.

        Raises:
            CheckpointError: The file is missing or damaged, or the settings are not those of the run.
        """
        saved = load_state(self.last)
        changed = changed_keys(saved["settings"], self._settings)
        if changed:
            raise CheckpointError(
                f"the run in '{self.last.parent}' was started with other settings: {'; '.join(changed)}; resume with "
                "its own, or train into another directory"
            )
        try:
            optimizer.load_state_dict(saved["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"the optimizer of '{self.last}' does not fit the parameters: {error}") from error
        set_rng_state(saved["rng"])
        return TrainState(**saved["state"]), saved["trained"]

    def load_best(self, state: TrainState) -> dict[str, Tensor]:
        """Return the parameters of the best validation.

        Raises:
            CheckpointError: The file is missing or damaged, or it is of another step than ``state.best_step``.
        """
        saved = load_state(self.best)
        if saved["step"] != state.best_step:
            raise CheckpointError(
                f"'{self.best}' is of step {saved['step']}, expected {state.best_step}: the run was killed after it "
                "was written and resumed to an earlier end; raise training.max_steps to reach that step again"
            )
        trained: dict[str, Tensor] = saved["trained"]
        return trained


def save_together(runs: Sequence[tuple[Checkpoints, TrainState, Mapping[str, Tensor], Optimizer]]) -> None:
    """Save several runs so that a kill at any moment leaves all of them at the same update.

    Every run first writes a pending state; once all are on the disk they take the place of ``last.pt`` one after the
    other. If the process dies in between, one ``last.pt`` of this save is the sign that the pending ones are whole, and
    :func:`finish_saving_together` puts them in place.

    Raises:
        StorageError: See :func:`save_state`; every ``last.pt`` is as it was.
    """
    if len(runs) == 1:
        ((checkpoints, state, trained, optimizer),) = runs
        checkpoints.save_last(state, trained, optimizer)
        return
    save = secrets.token_hex(8)  # no random number of the run is used up
    for checkpoints, state, trained, optimizer in runs:
        checkpoints.save_last(state, trained, optimizer, save=save, path=checkpoints.pending)
    for checkpoints, *_ in runs:
        checkpoints.pending.replace(checkpoints.last)
        _sync_directory(checkpoints.last.parent)


def finish_saving_together(runs: Sequence[Checkpoints]) -> None:
    """Finish a save that a kill broke off, or drop it where it had not come far enough.

    Raises:
        CheckpointError: A state is damaged.
    """
    if not any(run.pending.exists() for run in runs):
        return
    done = {load_state(run.last).get("save") for run in runs if run.last.exists()} - {"", None}
    for run in runs:
        if run.pending.exists():
            if load_state(run.pending).get("save") in done:
                run.pending.replace(run.last)
                _sync_directory(run.last.parent)
            else:
                run.pending.unlink()
