"""A prompt on a model of transformers, for its own loops and its own ``generate``."""

from softprompts.integrations.huggingface.attach import attach, detach
from softprompts.integrations.huggingface.causal import PromptedForCausalLM
from softprompts.integrations.huggingface.model import PromptModel

__all__ = ["PromptModel", "PromptedForCausalLM", "attach", "detach"]
