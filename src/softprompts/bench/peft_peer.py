"""The peer: Hugging Face PEFT, as its documentation has it used, on the same weights and the same values.

This module imports PEFT; :mod:`softprompts.bench.train` loads it only where PEFT is installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompts.bench.plain import separate_model
from softprompts.errors import UnsupportedModelError
from softprompts.models import FrozenLM
from softprompts.prompts import SoftPrompt
from softprompts.prompts.reparam import Direct, Mlp
from softprompts.types import Batch

__all__ = ["PeftTrainer", "peft_prefixes"]


class PeftTrainer:
    """A prompt of PEFT with the values of one of ours.

    PEFT is given what is best for it: prompt tuning runs without a cache (a prefix needs one), rows are padded on the
    right, where its positions are right, and dropout is off.

    Args:
        frozen: The model; its weights are shared, not copied.
        prompt: Whose values and parametrization PEFT's prompt gets.

    Raises:
        UnsupportedModelError: PEFT's parameters have other shapes (an MLP for a model with grouped-query attention).
    """

    def __init__(self, frozen: FrozenLM, prompt: SoftPrompt) -> None:
        mlp = prompt.parametrization if isinstance(prompt.parametrization, Mlp) else None
        config: PromptTuningConfig | PrefixTuningConfig
        if prompt.kind == "embedding":
            config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=prompt.length)
        else:
            config = PrefixTuningConfig(
                task_type=TaskType.CAUSAL_LM,
                num_virtual_tokens=prompt.length,
                prefix_projection=mlp is not None,
                encoder_hidden_size=mlp.inner.out_features if mlp is not None else 0,  # 0: not used
            )
        self.model = _attached(separate_model(frozen), config).eval()
        self._compiled: Any = None
        self._options = {"use_cache": False} if prompt.kind == "embedding" else {}
        encoder = self.model.prompt_encoder["default"]
        if mlp is None:
            assert isinstance(prompt.parametrization, Direct)
            self.pairs: list[tuple[Tensor, Tensor]] = [(prompt.parametrization.table_PW, encoder.embedding.weight)]
        else:
            inner, outer = encoder.transform[0], encoder.transform[2]
            self.pairs = [
                (mlp.index_PD, encoder.embedding.weight),
                (mlp.inner.weight, inner.weight),
                (mlp.inner.bias, inner.bias),
                (mlp.outer.weight, outer.weight),
                (mlp.outer.bias, outer.bias),
            ]
        for mine, theirs in self.pairs:
            if mine.shape != theirs.shape:
                raise UnsupportedModelError(
                    f"PEFT's parameters have the shape {list(theirs.shape)} where ours have {list(mine.shape)}; "
                    "the two compute different functions for this model, so there is nothing to compare"
                )
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Take our parameters' values again."""
        for mine, theirs in self.pairs:
            theirs.copy_(mine)

    def parameters(self) -> list[nn.Parameter]:
        """What PEFT trains."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def loss(self, batch: Batch, *, compiled: bool = False) -> Tensor:
        """Mean over the batch's label tokens, as ``labels=`` gives it.

        Args:
            batch: Padded on the right.
            compiled: Run the whole model through ``torch.compile``, with dynamic shapes.
        """
        if compiled and self._compiled is None:
            self._compiled = torch.compile(self.model, dynamic=True)
        model = self._compiled if compiled else self.model
        result = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, labels=batch.labels_BT, **self._options)
        loss: Tensor = result.loss
        return loss


def peft_prefixes(frozen: FrozenLM, prompts: Sequence[SoftPrompt]) -> Any:
    """Attach several prefixes to one model of PEFT, ready to generate; ``set_adapter(str(number))`` picks one."""
    length = prompts[0].length
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length, inference_mode=True)
    model = _attached(separate_model(frozen), config, adapter_name="0")
    for number in range(1, len(prompts)):
        model.add_adapter(str(number), config)
    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            model.prompt_encoder[str(number)].embedding.weight.copy_(prompt.table_PW)
    return model.eval()


def _attached(model: PreTrainedModel, config: PeftConfig, adapter_name: str = "default") -> Any:
    """Wrap a model; PEFT calls a property of transformers by a name that is going away, which is no news to users."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(model, config, adapter_name=adapter_name)
