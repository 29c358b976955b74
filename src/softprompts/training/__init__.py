"""Training: an objective, a loop that knows nothing of it, and checkpoints that lose nothing.

``fit(objective, batches, config, ...)`` trains; ``fit_together`` trains several prompts on one model in shared forward
passes. :class:`PromptObjective` is the objective of soft prompts; any other object with the four methods of
:class:`Objective` is trained alike.
"""

from softprompts.training.batches import EncodedBatches, in_order, wants_batches_by_length
from softprompts.training.checkpoint import TrainState, changed_keys
from softprompts.training.events import TIMING_FIELDS, Event, read_events
from softprompts.training.footprint import Footprint, footprint, longest_update
from softprompts.training.loop import fit, fit_together
from softprompts.training.objective import (
    Objective,
    PromptObjective,
    StepLoss,
    batch_loss,
    mean_loss,
    one_by_one,
    without_prompts,
)
from softprompts.training.optim import Adafactor, build_optimizer, build_schedule
from softprompts.training.progress import show_progress, show_shared_progress, to_tensorboard
from softprompts.training.run import FitResult, Member, Selection, refuse_unfinished_run
from softprompts.training.shared import ROWS_PER_PASS, SharedPasses

__all__ = [
    "ROWS_PER_PASS",
    "TIMING_FIELDS",
    "Adafactor",
    "EncodedBatches",
    "Event",
    "FitResult",
    "Footprint",
    "Member",
    "Objective",
    "PromptObjective",
    "Selection",
    "SharedPasses",
    "StepLoss",
    "TrainState",
    "batch_loss",
    "build_optimizer",
    "build_schedule",
    "changed_keys",
    "fit",
    "fit_together",
    "footprint",
    "in_order",
    "longest_update",
    "mean_loss",
    "one_by_one",
    "read_events",
    "refuse_unfinished_run",
    "show_progress",
    "show_shared_progress",
    "to_tensorboard",
    "wants_batches_by_length",
    "without_prompts",
]
