"""The weights that a run starts from where they are not random."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from softprompts.cache_folder import find_member, is_member
from softprompts.errors import CheckpointError, DataNotFoundError
from softprompts.pretraining.model import LanguageModel

__all__ = ["start_from"]


def start_from(name: str, model: LanguageModel, tokenizer: Tokenizer) -> Path:
    """Load weights into a model.

    Args:
        name: A folder in Hugging Face format, the output folder of a finished run, or ``family/NAME``.
        model: Of the same shape.
        tokenizer: Its tokenizer.

    Returns:
        The folder that they were read from.

    Raises:
        DataNotFoundError: There is no such model.
        CheckpointError: It has another shape or another tokenizer.
    """
    folder = find_member(name) if is_member(name) else Path(name).expanduser()
    if not (folder / "model.safetensors").is_file() and (folder / "final" / "model.safetensors").is_file():
        folder = folder / "final"
    weights_path, vocabulary_path = folder / "model.safetensors", folder / "tokenizer.json"
    if not weights_path.is_file() or not vocabulary_path.is_file():
        raise DataNotFoundError(
            f"training.start_from '{name}' holds no model.safetensors and tokenizer.json; give a folder in Hugging "
            "Face format, the output folder of a finished run, or family/NAME"
        )
    if Tokenizer.from_file(str(vocabulary_path)).get_vocab() != tokenizer.get_vocab():
        raise CheckpointError(
            f"training.start_from '{name}' has another tokenizer than this recipe makes (sentinels included); the "
            "sections corpus, tokenizer and objective and model.context must be those of the recipe that it comes from"
        )
    weights = load_file(weights_path)
    own = dict(model.named_parameters())  # a tied weight once, under the name that exported files have
    if {key: tuple(value.shape) for key, value in weights.items()} != {k: tuple(p.shape) for k, p in own.items()}:
        raise CheckpointError(
            f"training.start_from '{name}' holds weights of another shape than this recipe's section 'model'; it must "
            "be that of the recipe that it comes from"
        )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(weights[key])
    return folder
