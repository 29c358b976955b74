"""A prompt on a model of transformers, for its own loops and its own ``generate``."""

from softprompts.integrations.huggingface.attach import attach, detach
from softprompts.integrations.huggingface.causal import PromptedForCausalLM
from softprompts.integrations.huggingface.model import PromptModel
from softprompts.integrations.huggingface.seq2seq import PromptedForSeq2SeqLM

__all__ = ["PromptModel", "PromptedForCausalLM", "PromptedForSeq2SeqLM", "attach", "detach"]
