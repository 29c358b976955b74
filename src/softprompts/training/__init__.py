"""Training: an objective, a loop that knows nothing of it, and checkpoints that lose nothing.

``fit(objective, batches, config, ...)`` trains. :class:`PromptObjective` is the objective of soft prompts; any other
object with the four methods of :class:`Objective` is trained alike.
"""

from softprompts.training.batches import EncodedBatches, in_order
from softprompts.training.checkpoint import TrainState, changed_keys
from softprompts.training.events import TIMING_FIELDS, Event, read_events
from softprompts.training.loop import FitResult, Selection, fit, refuse_unfinished_run
from softprompts.training.objective import (
    Objective,
    PromptObjective,
    StepLoss,
    batch_loss,
    mean_loss,
    without_prompts,
)
from softprompts.training.optim import Adafactor, build_optimizer, build_schedule
from softprompts.training.progress import show_progress, to_tensorboard

__all__ = [
    "TIMING_FIELDS",
    "Adafactor",
    "EncodedBatches",
    "Event",
    "FitResult",
    "Objective",
    "PromptObjective",
    "Selection",
    "StepLoss",
    "TrainState",
    "batch_loss",
    "build_optimizer",
    "build_schedule",
    "changed_keys",
    "fit",
    "in_order",
    "mean_loss",
    "read_events",
    "refuse_unfinished_run",
    "show_progress",
    "to_tensorboard",
    "without_prompts",
]
