"""The learned parameters: kinds of prompt, reparametrizations, initializers."""

from softprompts.prompts.base import SoftPrompt
from softprompts.prompts.embedding import EmbeddingPrompt
from softprompts.prompts.init import build_prompt, prompt_from_table
from softprompts.prompts.prefix import PrefixPrompt

__all__ = ["EmbeddingPrompt", "PrefixPrompt", "SoftPrompt", "build_prompt", "prompt_from_table"]
