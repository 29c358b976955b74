"""The training loop. It knows updates, validations and checkpoints, and nothing of what it trains.

A run is a function of its settings, its data and its seed: killed at any moment and resumed, it gives the losses of a
run that was never killed (bit for bit on the CPU). Everything that it remembers from one update to the next is in
:class:`~softprompts.training.checkpoint.TrainState`, the optimizer, the trained parameters and the random numbers.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch.optim import Optimizer

from softprompts.config import OptimizerConfig, ScheduleConfig, TrainingConfig, to_dict
from softprompts.errors import CheckpointError, ConfigError, DataError, DivergedError, TrainingInterrupted, nearest
from softprompts.training.checkpoint import Checkpoints, TrainState, load_state, seed_everything
from softprompts.training.events import Event, EventLog
from softprompts.training.objective import Objective
from softprompts.training.optim import build_optimizer, build_schedule, set_learning_rate

__all__ = ["NOT_LEARNING_AFTER_STEPS", "FitResult", "Selection", "fit", "refuse_unfinished_run"]

B = TypeVar("B")

NOT_LEARNING_AFTER_STEPS = 200
"""Updates after the warm-up at which the loss must be below the no-prompt model's (or at the end of a shorter run)."""

_AVERAGE_DECAY = 0.98
"""Of the smoothed training loss: it looks back about 50 updates."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """Which dev metric picks the best parameters and stops early."""

    metric: str = "loss"
    maximize: bool = False
    """Whether more of it is better."""


@dataclass(frozen=True)
class FitResult:
    """How a run ended. The objective holds the best parameters, or the last ones where nothing was validated."""

    reason: str
    """``max_steps``, ``patience`` or ``max_seconds``."""
    steps: int
    last_loss: float
    best_step: int
    """Step of the best validation; 0 where nothing was validated."""
    best_metrics: Mapping[str, float]
    tokens: int
    seconds: float
    """Training alone, validation and saving not counted."""


@dataclass(frozen=True)
class _Run(Generic[B]):
    """What one call of :func:`fit` works with."""

    objective: Objective[B]
    stepper: Optimizer
    state: TrainState
    config: TrainingConfig
    events: EventLog
    checkpoints: Checkpoints
    selection: Selection


def fit(
    objective: Objective[B],
    batches: Callable[[int, int], Iterable[B]],
    config: TrainingConfig,
    *,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    run_dir: str | Path,
    validate: Callable[[], Mapping[str, float]] | None = None,
    on_event: Callable[[Event], None] | None = None,
    resume: bool = False,
    reference_loss: float | None = None,
    selection: Selection | None = None,
) -> FitResult:
    """Train an objective; seeds the global random numbers with ``config.seed``.

    Args:
        objective: What is trained.
        batches: ``batches(epoch, start)`` gives the epoch's batches from number ``start`` on, always the same ones.
        config: How long, and when to validate and to save.
        optimizer: Optimizer and learning rate.
        schedule: The learning rate over the steps.
        run_dir: Directory of ``events.jsonl``, ``last.pt`` and ``best.pt``.
        validate: Gives dev metrics; called every ``validate_every_steps`` updates and at the end.
        on_event: Called with every event.
        resume: Go on from ``last.pt`` if there is one.
        reference_loss: Training loss of the model without a prompt; turns on the check that something is learned.
        selection: The dev metric that picks the best parameters and stops early; ``loss`` if not given.

    Raises:
        TrainingInterrupted: Ctrl-C or SIGTERM came; the state was saved.
        DivergedError: The loss or its gradient is no finite number.
        CheckpointError: The run in ``run_dir`` cannot be resumed.
        StorageError: Saving failed; what was saved before is intact.
        ConfigError: A setting is out of range, or ``run_dir`` holds an unfinished run and ``resume`` is not set.
        DataError: There is no batch.
    """
    _check(config)
    selection = selection or Selection()
    sections = {"training": config, "optimizer": optimizer, "schedule": schedule, "selection": selection}
    checkpoints = Checkpoints(Path(run_dir), {name: to_dict(section) for name, section in sections.items()})
    stepper = build_optimizer(objective.parameters(), optimizer)
    factor = build_schedule(schedule, config.max_steps)
    state = _start(checkpoints, objective, stepper, config, resume)
    check_step = min(schedule.warmup_steps + NOT_LEARNING_AFTER_STEPS, config.max_steps)
    with EventLog(Path(run_dir) / "events.jsonl", keep_bytes=state.events_bytes, also=on_event) as events:
        run = _Run(objective, stepper, state, config, events, checkpoints, selection)
        rates = (optimizer.learning_rate * factor(step) for step in itertools.count(state.step))
        check = (check_step, reference_loss) if reference_loss is not None else None
        return _loop(run, _stream(batches, state.epoch, state.position), rates, validate, check)


def _loop(
    run: _Run[B],
    stream: Iterator[tuple[int, int, B]],
    rates: Iterator[float],
    validate: Callable[[], Mapping[str, float]] | None,
    check: tuple[int, float] | None,
) -> FitResult:
    """Update, check, validate, save, until there is a reason to end."""
    state, config = run.state, run.config
    with _stop_signals() as stop:
        while (reason := _finished(state, config)) is None:
            set_learning_rate(run.stepper, next(rates))
            _update(run, stream)
            if check is not None and state.step == check[0]:
                _check_learning(run, check[1])
            reason = _finished(state, config)
            if validate is not None and (reason or state.step % config.validate_every_steps == 0):
                _validate(run, validate())
                reason = _finished(state, config)
            if reason is not None:
                run.events.write("end", state.step, reason=reason, best_step=state.best_step, best=state.best_metrics)
            if reason or stop or state.step % config.checkpoint_every_steps == 0:
                state.events_bytes = run.events.sync()
                run.checkpoints.save_last(state, run.objective.trainable_state(), run.stepper)
            if stop and reason is None:
                raise TrainingInterrupted(
                    f"training was stopped by {stop[0]} at step {state.step} of {config.max_steps}; its state is in "
                    f"'{run.checkpoints.last}': give the same command with --resume (resume=True in Python) to go on"
                )
    if state.best_score is not None:
        run.objective.load_trainable_state(run.checkpoints.load_best(state))
    return FitResult(
        reason=reason,
        steps=state.step,
        last_loss=state.last_loss,
        best_step=state.best_step,
        best_metrics=dict(state.best_metrics),
        tokens=state.tokens,
        seconds=state.seconds,
    )


def _check(config: TrainingConfig) -> None:
    for name in ("max_steps", "accumulation_steps", "validate_every_steps", "checkpoint_every_steps", "patience"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"training.{name} is {value}, expected 1 or more")
    if config.clip_norm is not None and config.clip_norm <= 0:
        raise ConfigError(f"training.clip_norm is {config.clip_norm}, expected a number above 0, or null for none")


def _start(
    checkpoints: Checkpoints, objective: Objective[Any], stepper: Optimizer, config: TrainingConfig, resume: bool
) -> TrainState:
    """Return where the run begins: at its last checkpoint, or at step 0 with fresh random numbers."""
    if checkpoints.last.exists() and resume:
        state, trained = checkpoints.load_last(stepper)
        objective.load_trainable_state(trained)
        if state.step > config.max_steps:
            raise CheckpointError(
                f"the run in '{checkpoints.last.parent}' is at step {state.step}, beyond training.max_steps "
                f"{config.max_steps}; raise max_steps or train into another directory"
            )
        return state
    refuse_unfinished_run(checkpoints.last.parent, config)
    checkpoints.clear()
    seed_everything(config.seed)
    return TrainState()


def refuse_unfinished_run(run_dir: str | Path, config: TrainingConfig) -> None:
    """Raise before a new run would take the place of one that was not finished.

    Raises:
        ConfigError: ``run_dir`` holds an unfinished run.
        CheckpointError: Its checkpoint is damaged.
    """
    last = Path(run_dir) / "last.pt"
    if not last.exists():
        return
    state = TrainState(**load_state(last)["state"])
    if _finished(state, config) is None:
        raise ConfigError(
            f"'{run_dir}' holds an unfinished run (step {state.step} of {config.max_steps}); go on with --resume "
            "(resume=True in Python), choose another directory, or delete this one"
        )


def _stream(batches: Callable[[int, int], Iterable[B]], epoch: int, position: int) -> Iterator[tuple[int, int, B]]:
    """Give batches without end, each with its epoch and the number of the epoch's batches used after it."""
    while True:
        empty = position == 0
        for batch in batches(epoch, position):
            empty = False
            position += 1
            yield epoch, position, batch
        if empty:
            raise DataError(f"epoch {epoch} has no batch: the training split is empty")
        epoch, position = epoch + 1, 0


def _update(run: _Run[B], stream: Iterator[tuple[int, int, B]]) -> None:
    """Make one update from ``accumulation_steps`` batches and write its event."""
    started = time.perf_counter()
    state, stepper = run.state, run.stepper
    parameters = [parameter for group in stepper.param_groups for parameter in group["params"]]
    stepper.zero_grad(set_to_none=True)
    total, weight, tokens = 0.0, 0, 0
    for state.epoch, state.position, batch in itertools.islice(stream, run.config.accumulation_steps):
        part = run.objective.loss(batch)
        part.total.backward()
        total += float(part.total.detach())
        weight += part.weight
        tokens += part.tokens
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(weight)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, run.config.clip_norm or math.inf))
    loss = total / weight
    if not (math.isfinite(loss) and math.isfinite(norm)):
        _diverged(run, loss, norm)
    stepper.step()
    elapsed = time.perf_counter() - started
    state.step += 1
    state.tokens += tokens
    state.seconds += elapsed
    state.last_loss = loss
    state.loss_average = _AVERAGE_DECAY * state.loss_average + (1.0 - _AVERAGE_DECAY) * loss
    run.events.write(
        "step",
        state.step,
        epoch=state.epoch,
        loss=loss,
        learning_rate=_learning_rate(run),
        gradient_norm=norm,
        tokens=tokens,
        seconds=state.seconds,
        tokens_per_s=tokens / elapsed,
    )


def _learning_rate(run: _Run[Any]) -> float:
    return float(run.stepper.param_groups[0]["lr"])


def _diverged(run: _Run[Any], loss: float, norm: float) -> NoReturn:
    step, rate = run.state.step + 1, _learning_rate(run)
    run.events.write("diverged", step, loss=loss, gradient_norm=norm, learning_rate=rate)
    raise DivergedError(
        f"at step {step} the loss is {loss} and the norm of its gradient {norm}, expected finite numbers; lower "
        f"optimizer.learning_rate (now {rate:g}), set training.clip_norm, add schedule.warmup_steps, or load the model "
        "as float32 or bfloat16 instead of float16; earlier checkpoints are intact"
    )


def _check_learning(run: _Run[Any], reference_loss: float) -> None:
    """Say once, with advice, when the smoothed loss has not fallen below that of the model without a prompt."""
    step = run.state.step
    smoothed = run.state.loss_average / (1.0 - _AVERAGE_DECAY**step)
    if smoothed < reference_loss:
        return
    advice = (
        f"try another optimizer.learning_rate (now {_learning_rate(run):g}; the papers: 5e-5 with AdamW for a prefix, "
        "0.3 with Adafactor for prompt tuning), start from words (prompt.initializer.name vocabulary, labels or text), "
        "or take another prompt.length"
    )
    run.events.write("not_learning", step, loss=smoothed, reference_loss=reference_loss, advice=advice)
    _log.warning(
        "not learning: after %d steps the loss is %.4g, not below the %.4g of the model without a prompt; %s",
        *(step, smoothed, reference_loss, advice),
    )


def _validate(run: _Run[Any], metrics: Mapping[str, float]) -> None:
    """Write a validation down and keep the parameters if they are the best so far."""
    state, selection = run.state, run.selection
    if selection.metric not in metrics:
        raise ConfigError(
            f"evaluation.selection is '{selection.metric}', which validation does not measure: "
            f"{nearest(selection.metric, metrics)}"
        )
    score = metrics[selection.metric] if selection.maximize else -metrics[selection.metric]
    better = not math.isnan(score) and (state.best_score is None or score > state.best_score)
    if better:
        state.best_score, state.best_step, state.best_metrics = score, state.step, dict(metrics)
        state.validations_since_best = 0
        run.checkpoints.save_best(state, run.objective.trainable_state())
    else:
        state.validations_since_best += 1
    run.events.write("validation", state.step, best=better, metrics=metrics)


def _finished(state: TrainState, config: TrainingConfig) -> str | None:
    """Say why the run is over, or ``None``; a function of the saved state, so a resumed run ends alike."""
    if state.step >= config.max_steps:
        return "max_steps"
    if config.patience is not None and state.validations_since_best >= config.patience:
        return "patience"
    if config.max_seconds is not None and state.seconds >= config.max_seconds:
        return "max_seconds"
    return None


@contextmanager
def _stop_signals() -> Iterator[Sequence[str]]:
    """Collect the names of Ctrl-C and SIGTERM signals, so that the update at hand is finished first.

    A second signal acts at once. Outside of the main thread nothing is changed (Python allows handlers only there).
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, _frame: object) -> None:
        received.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        os.write(2, b"\nstopping after this step and saving; once more to stop at once\n")  # print is not reentrant
        for other in numbers:
            signal.signal(other, before[other])

    for number in numbers:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number in numbers:
            signal.signal(number, before[number])
