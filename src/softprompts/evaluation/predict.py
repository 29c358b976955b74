"""Examples in, predictions out: the offline way into the generation engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from softprompts.config import DecodingConfig
from softprompts.inference import Engine
from softprompts.types import Encoded, Prediction, PromptStates

__all__ = ["predict"]


def predict(
    engine: Engine,
    rows: Sequence[Encoded],
    decoding: DecodingConfig,
    *,
    states: Sequence[PromptStates] | None = None,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Generate an output for every encoded example.

    Args:
        engine: The model with its prompts.
        rows: Encoded inputs, each with its own prompt; best encoded without target, because truncation of a long
            input would otherwise depend on the target's length.
        decoding: How.
        states: What :meth:`Engine.fold` returned; computed here if left out.
        seed: For sampling.
        on_progress: Called with the number of outputs that just became ready.

    Returns:
        Predictions in the order of ``rows``; blanks around a text are removed.

    Raises:
        LengthError: A row does not fit into the context. Nothing has run then.
        ConfigError: The decoding options make no sense.
    """
    generations = engine.generate(rows, decoding, states=states, seed=seed, on_progress=on_progress)
    return [
        Prediction(row.example, one.text.strip(), one.logprob, one.finished, len(one.ids))
        for row, one in zip(rows, generations, strict=True)
    ]
