"""What prompts are judged against."""

from softprompts.baselines.fine_tuning import FineTuningObjective

__all__ = ["FineTuningObjective"]
