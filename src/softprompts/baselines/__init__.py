"""What prompts are judged against."""

from softprompts.baselines.few_shot import FewShot, choose_examples
from softprompts.baselines.fine_tuning import FineTuningObjective
from softprompts.baselines.top_layers import top_parameters

__all__ = ["FewShot", "FineTuningObjective", "choose_examples", "top_parameters"]
