"""A prompt at rest."""

from softprompts.storage.artifact import LoadedPrompt, load_prompt, read_info, save_prompt
from softprompts.storage.manifest import ModelIdentity, Origin, ParameterCount, PromptInfo

__all__ = [
    "LoadedPrompt",
    "ModelIdentity",
    "Origin",
    "ParameterCount",
    "PromptInfo",
    "load_prompt",
    "read_info",
    "save_prompt",
]
