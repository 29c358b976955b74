"""Small language models from raw text: corpus, tokenizer, training, probes; and the one that comes with the package."""

from __future__ import annotations

from pathlib import Path

from softprompts.errors import DataNotFoundError

__all__ = ["bundled_lm_path"]


def bundled_lm_path() -> Path:
    """Return the directory of the bundled LM, in Hugging Face format.

    Raises:
        DataNotFoundError: This installation came without it.
    """
    path = Path(__file__).parent / "assets" / "bundled-lm"
    if not (path / "model.safetensors").is_file():
        raise DataNotFoundError(
            f"the bundled LM is missing at '{path}'; reinstall softprompts, or train one: "
            "softprompts pretrain recipes/pretraining/bundled.yaml"
        )
    return path
