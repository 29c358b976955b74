"""``softprompts pretrain``: a small LM from raw text, from the corpus to a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from numpy.typing import NDArray

from softprompts.cache_folder import cache_folder, member_folder
from softprompts.config import to_dict
from softprompts.errors import CheckpointError, ConfigError, DataError, TrainingInterrupted
from softprompts.folder_lock import alone_in
from softprompts.pretraining.card import write_run_card
from softprompts.pretraining.checkpoint import RunState, check_checkpoint, load_checkpoint, save_checkpoint
from softprompts.pretraining.model import build_model, export, loss_function, pick_device, replace_folder
from softprompts.pretraining.optim import build_optimizers, decay_start
from softprompts.pretraining.pairs import pairing, sentinel_count
from softprompts.pretraining.progress import Progress, plot_losses
from softprompts.pretraining.recipe import PretrainRecipe
from softprompts.pretraining.starting import start_from
from softprompts.pretraining.tokens import TokenFiles, corpus_fingerprint, prepare_tokens, with_sentinels
from softprompts.pretraining.trainer import PairRows, Rows, held_out_losses, train_step

__all__ = ["PretrainResult", "Run", "pretrain"]


@dataclass
class PretrainResult:
    """What a run came to.

    Attributes:
        folder: The model and its tokenizer in Hugging Face format.
        parameters: Number of weights, embeddings once.
        state: Steps, tokens, seconds, history.
        held_out: ``{source: {"loss", "perplexity", "tokens"}}``, and their mean by tokens as ``all``.
    """

    folder: Path
    parameters: int
    state: RunState
    held_out: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return one JSON object; the history is left out, it lies in ``log.jsonl``."""
        return {
            "folder": str(self.folder),
            "parameters": self.parameters,
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "seconds": self.state.seconds,
            "tokens_per_s": self.state.tokens / max(1e-9, self.state.seconds),
            "held_out": self.held_out,
        }


def pretrain(
    recipe: PretrainRecipe,
    resume: bool = False,
    report: Callable[[str], None] = print,
    max_steps: int | None = None,
) -> PretrainResult:
    """Train a small LM.

    Args:
        recipe: Everything about it.
        resume: Go on from the checkpoint in ``output.output_dir``, which may have another ``training.total_tokens``.
        report: Told about progress, a line at a time.
        max_steps: Stop after so many steps of this session, as if interrupted; for tests and trials.

    Raises:
        TrainingInterrupted: SIGINT or SIGTERM came, or ``max_steps`` was reached; the state was saved first.
        CheckpointError: There is nothing to resume from, or it belongs to another recipe; or, without ``resume``, the
            folder holds a run already.
        DataError: The corpus is missing or unusable.
        StorageError: Another run writes to the folder, or it cannot be written.
    """
    with alone_in(Path(recipe.output.output_dir)):
        return _pretrain(recipe, resume, report, max_steps)


def _pretrain(
    recipe: PretrainRecipe, resume: bool, report: Callable[[str], None], max_steps: int | None
) -> PretrainResult:
    checkpoint = Path(recipe.output.output_dir) / "checkpoint.pt"
    if checkpoint.is_file() and not resume:
        raise CheckpointError(
            f"'{checkpoint}' holds the state of a run, which starting over would destroy; "
            "add --resume to go on with it, choose another output.output_dir, or delete it"
        )
    if resume:  # before a Run prepares its tokens, which replaces those of another corpus
        check_checkpoint(_resumed_from(recipe), _key(recipe))
    run = Run(recipe, report)
    if resume:
        run.resume()
    else:
        run.start()
    return run.train(max_steps)


class Run:
    """One pretraining run: its folder, data, model, optimizers and state.

    The folder holds ``tokens/`` (unless the recipe puts it elsewhere), ``checkpoint.pt``, ``checkpoint-stable.pt``
    (before the decay), ``latest/``, ``step-N/`` and ``final/`` (Hugging Face format), ``log.jsonl``, ``loss.png``,
    ``recipe.json`` and ``corpus.json``.
    """

    def __init__(self, recipe: PretrainRecipe, report: Callable[[str], None] = print) -> None:
        self.recipe, self.report = recipe, report
        self.folder = Path(recipe.output.output_dir)
        row = recipe.training.row_tokens or recipe.model.context
        self.batch_rows = recipe.training.batch_rows * recipe.model.context // row
        self.total_steps = max(1, recipe.training.total_tokens // (recipe.training.batch_rows * recipe.model.context))
        self._check_kept()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files: TokenFiles = prepare_tokens(recipe, self._tokens_folder(), report)
        plain = self.files.tokenizer
        self.sentinels = sentinel_count(recipe)
        self.tokenizer = with_sentinels(plain, self.sentinels) if self.sentinels else plain
        self.pairing = pairing(recipe, plain.get_vocab_size()) if recipe.model.kind == "encoder_decoder" else None
        self.model = build_model(recipe.model, self.tokenizer.get_vocab_size(), recipe.training)
        self.optimizers = build_optimizers(self.model, recipe.optimizer)
        self.loss_function = loss_function(self.model, recipe.training, self.pairing)
        # Never compiled: held-out batches come in many sizes, and each would be compiled anew.
        uncompiled = dataclasses.replace(recipe.training, compile=False)
        self.evaluation_loss = loss_function(self.model, uncompiled, self.pairing)
        self.rows = self._training_rows(row)
        self.state = RunState()
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def _check_kept(self) -> None:
        kept = self.recipe.output.keep_at_steps
        if kept and kept[-1] > self.total_steps:
            raise ConfigError(
                f"output.keep_at_steps asks for step {kept[-1]}, but training.total_tokens ends the run at step "
                f"{self.total_steps}; raise the one or lower the other"
            )

    def _tokens_folder(self) -> Path:
        name = self.recipe.output.tokens_dir
        if name is None:
            return self.folder / "tokens"
        return (
            cache_folder() / "tokens" / corpus_fingerprint(self.recipe) if name == "cache" else Path(name).expanduser()
        )

    def _training_rows(self, length: int) -> Rows:
        tokens = self.files.train()
        rows = self._rows(tokens, length, self.recipe.training.seed)
        if not rows.count:
            raise DataError(
                f"the corpus holds {len(tokens)} tokens, and a row needs {length + 1}; expected at least one row: add "
                "text, or lower training.row_tokens or model.context"
            )
        return rows

    def _rows(self, tokens: NDArray[Any], length: int, seed: int) -> Rows:
        return Rows(tokens, length, seed) if self.pairing is None else PairRows(tokens, length, seed, self.pairing)

    @property
    def key(self) -> str:
        """Fingerprint of what a checkpoint must agree on: data, shape, objective, batch, kind of optimizer."""
        return _key(self.recipe)

    def resume(self) -> None:
        """Restore the checkpoint that ``output.resume_from`` names."""
        self.state = load_checkpoint(_resumed_from(self.recipe), self.model, self.optimizers, self.key)
        self.report(f"resumed at step {self.state.step}, {self.state.tokens / 1e6:.2f} M tokens")

    def start(self) -> None:
        """Load the weights that ``training.start_from`` names, if it does."""
        place, model = self.recipe.training.start_from, self.recipe.model
        if place is not None:
            folder = start_from(place, self.model, self.tokenizer, model.start_layers)
            layers = f", {model.start_layers} layers of {model.layers}" if model.start_layers is not None else ""
            self.report(f"starting from the weights of '{folder}'{layers}")

    def save(self, name: str = "checkpoint.pt") -> None:
        """Write a checkpoint."""
        save_checkpoint(self.folder / name, self.state, self.model, self.optimizers, self.key)

    def train(self, max_steps: int | None = None) -> PretrainResult:
        """Train to the end of the schedule; see :func:`pretrain`."""
        output = self.recipe.output
        self._write_recipe()
        saved = exported = time.monotonic()
        self.report(
            f"{self.parameters / 1e6:.2f} M parameters, {self.total_steps} steps of "
            f"{self.batch_rows} x {self.rows.context} tokens"
        )
        done = 0
        with _StopSignal() as stop, Progress(self, self.report) as progress:
            while self.state.step < self.total_steps:
                self._keep_stable()
                event = train_step(
                    self.model, self.optimizers, self.loss_function, self.rows, self.state,
                    self.recipe.training, self.recipe.optimizer, self.batch_rows, self.total_steps,
                )  # fmt: skip
                done += 1
                progress.step(event)
                if self.state.step in output.keep_at_steps:
                    self._keep()
                now = time.monotonic()
                if stop.asked or done == max_steps:
                    self.save()
                    raise TrainingInterrupted(
                        f"stopped at step {self.state.step} of {self.total_steps}; the state is saved: "
                        "add --resume to go on"
                    )
                if now - saved >= output.checkpoint_every_s:
                    self.save()
                    saved = now
                if now - exported >= output.export_every_s:
                    self._snapshot(progress)
                    exported = time.monotonic()
        return self._finish()

    def _write_recipe(self) -> None:
        """Write down what is trained; only now, when no checkpoint was refused that belongs to what stands there."""
        for name, content in (("recipe", to_dict(self.recipe)), ("corpus", self.files.summary)):
            (self.folder / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")

    def _keep_stable(self) -> None:
        """Save the last state before the learning rate falls: from there more tokens can be trained on."""
        start = decay_start(self.recipe.training, self.total_steps)
        if not self.state.decaying and self.state.step >= start:
            self.save("checkpoint-stable.pt")
            self.state.decaying = True

    def evaluate(self, max_rows: int | None = None) -> dict[str, dict[str, float]]:
        """Measure held-out loss and perplexity by source, and over all sources by tokens (``all``)."""
        training = self.recipe.training
        losses = held_out_losses(
            self.evaluation_loss,
            self.files.held_out(),
            lambda tokens: self._rows(tokens, self.recipe.model.context, 0),
            training.batch_rows,
            pick_device(training.device),
            max_rows,
        )
        tokens = sum(count for _, count in losses.values())
        if tokens:
            losses["all"] = (sum(loss * count for loss, count in losses.values()) / tokens, tokens)
        return {
            name: {"loss": loss, "perplexity": math.exp(loss), "tokens": count}
            for name, (loss, count) in losses.items()
        }

    def _export(self, name: str) -> Path:
        export(self.model, self.tokenizer, self.recipe.model.context, self.folder / name)
        return self.folder / name

    def _snapshot(self, progress: Progress) -> None:
        held_out = self.evaluate(self.recipe.output.evaluation_rows)
        progress.held_out(held_out)
        self._export("latest")
        plot_losses(self.state.history, self.folder / "loss.png")

    def _keep(self) -> None:
        """Export the model as it is after this step."""
        held_out = self.evaluate(self.recipe.output.evaluation_rows)
        self._write_card(self._export(f"step-{self.state.step}"), held_out)
        self.report(f"kept the model after step {self.state.step}")

    def _write_card(self, folder: Path, held_out: dict[str, dict[str, float]]) -> PretrainResult:
        result = PretrainResult(folder, self.parameters, self.state, held_out)
        write_run_card(folder, to_dict(self.recipe), self.files.summary, result.to_json(), self.recipe.objective_name)
        return result

    def _finish(self) -> PretrainResult:
        self.save()
        held_out = self.evaluate(self.recipe.output.final_evaluation_rows)
        self._export("latest")
        result = self._write_card(self._export("final"), held_out)
        plot_losses(self.state.history, self.folder / "loss.png")
        (self.folder / "result.json").write_text(json.dumps(result.to_json(), indent=1), encoding="utf-8")
        self._publish()
        return result

    def _publish(self) -> None:
        """Copy what the recipe names to the user's cache folder."""
        output = self.recipe.output
        models = {output.publish_as: "final"} if output.publish_as else {}
        if output.publish_steps_as:
            for number, step in enumerate(output.keep_at_steps, start=1):
                models[f"{output.publish_steps_as}{number}"] = f"step-{step}"
        for name, exported in models.items():
            if not (self.folder / exported).is_dir():
                self.report(f"'{exported}' was passed before output.keep_at_steps named it; family/{name} is not made")
                continue
            place = member_folder(name)
            scratch = place.with_name(place.name + ".partial")
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(self.folder / exported, scratch)
            replace_folder(scratch, place)
            self.report(f"family/{name} lies in '{place}'")


def _resumed_from(recipe: PretrainRecipe) -> Path:
    name = "checkpoint.pt" if recipe.output.resume_from == "latest" else "checkpoint-stable.pt"
    return Path(recipe.output.output_dir) / name


def _key(recipe: PretrainRecipe) -> str:
    shape = to_dict(recipe.model)
    if shape["start_layers"] is None:  # what came later is left out where it says nothing: old checkpoints stay valid
        del shape["start_layers"]
    parts = [corpus_fingerprint(recipe), shape, recipe.training.batch_rows]
    if recipe.model.kind == "decoder":
        del shape["kind"], shape["decoder_layers"]
        parts += [recipe.training.start_from] if recipe.training.start_from is not None else []
    else:
        objective = {k: v for k, v in to_dict(recipe.objective).items() if (k, v) != ("sentinels", None)}
        parts += [recipe.objective_name, objective, recipe.training.start_from]
    text = json.dumps([*parts, recipe.training.seed, recipe.optimizer.matrices], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class _StopSignal:
    """Turn SIGINT and SIGTERM into a flag while inside; a second signal acts as it always did."""

    def __init__(self) -> None:
        self.asked = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> _StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self._former[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
