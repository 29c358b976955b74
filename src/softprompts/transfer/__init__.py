"""Prompts moved: from one task to another, from one model to another.

Nothing here trains: what is to be trained are modules and losses, which the command line gives to the training loop.
"""

from softprompts.transfer.closed_form import copied, least_squares, random_start, word_spread
from softprompts.transfer.matching import (
    MatchBatch,
    MatchBatches,
    Teacher,
    TeacherOutputs,
    divergence,
    matching_loss,
    refuse_unmatchable,
)
from softprompts.transfer.projector import Projector, PromptSpace, projected_prompt, projection_distance
from softprompts.transfer.projector_files import load_projector, save_projector
from softprompts.transfer.task_transfer import TaskTransfer, recovery, steps_to_reach

__all__ = [
    "MatchBatch",
    "MatchBatches",
    "Projector",
    "PromptSpace",
    "TaskTransfer",
    "Teacher",
    "TeacherOutputs",
    "copied",
    "divergence",
    "least_squares",
    "load_projector",
    "matching_loss",
    "projected_prompt",
    "projection_distance",
    "random_start",
    "recovery",
    "refuse_unmatchable",
    "save_projector",
    "steps_to_reach",
    "word_spread",
]
