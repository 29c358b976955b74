"""softprompts: learned prompts for frozen language models.

The names below are loaded when they are first used, so that ``import softprompts`` imports neither torch nor
transformers (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompts.config import DecodingConfig, PromptConfig, TrainRecipe, load_recipe
    from softprompts.errors import SoftPromptsError
    from softprompts.inference.engine import Engine
    from softprompts.integrations.huggingface.attach import attach, detach
    from softprompts.models.frozen import FrozenLM
    from softprompts.prompted import PromptedLM
    from softprompts.prompts.base import SoftPrompt
    from softprompts.prompts.embedding import EmbeddingPrompt
    from softprompts.prompts.init import build_prompt
    from softprompts.prompts.prefix import PrefixPrompt
    from softprompts.storage.artifact import load_prompt, save_prompt

__all__ = [
    "DecodingConfig",
    "EmbeddingPrompt",
    "Engine",
    "FrozenLM",
    "PrefixPrompt",
    "PromptConfig",
    "PromptedLM",
    "SoftPrompt",
    "SoftPromptsError",
    "TrainRecipe",
    "__version__",
    "attach",
    "build_prompt",
    "detach",
    "load_prompt",
    "load_recipe",
    "save_prompt",
]

__version__ = "0.1.0"

_HOME = {
    "DecodingConfig": "softprompts.config",
    "EmbeddingPrompt": "softprompts.prompts.embedding",
    "Engine": "softprompts.inference.engine",
    "FrozenLM": "softprompts.models.frozen",
    "PrefixPrompt": "softprompts.prompts.prefix",
    "PromptConfig": "softprompts.config",
    "PromptedLM": "softprompts.prompted",
    "SoftPrompt": "softprompts.prompts.base",
    "SoftPromptsError": "softprompts.errors",
    "TrainRecipe": "softprompts.config",
    "attach": "softprompts.integrations.huggingface.attach",
    "build_prompt": "softprompts.prompts.init",
    "detach": "softprompts.integrations.huggingface.attach",
    "load_prompt": "softprompts.storage.artifact",
    "load_recipe": "softprompts.config",
    "save_prompt": "softprompts.storage.artifact",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'softprompts' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
