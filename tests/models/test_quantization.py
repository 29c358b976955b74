"""Quantized weights: near the original, smaller, never changed, and gradients that are those of the weights in use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from transformers.pytorch_utils import Conv1D

from conftest import SIZES, ZOO, byte_tokenizer, tiny_model
from softprompts.baselines import FineTuningObjective
from softprompts.errors import ConfigError, UnsupportedModelError
from softprompts.models import FrozenLM
from softprompts.models.memory import weight_bytes
from softprompts.models.quantization import GROUP, QuantizedLinear, quantize_weights
from softprompts.prompted import PromptedLM
from softprompts.prompts import prompt_from_table
from softprompts.storage import load_prompt, save_prompt
from softprompts.types import Batch

KINDS = ("int8", "int4")
WORST_STEP = {"int8": 1 / 254, "int4": 1 / 30}
"""Half a step of rounding, as a share of the largest weight of an output or of the range of a group."""
LOGIT_ERROR = {"int8": 0.05, "int4": 0.6}
"""Largest root mean square error of tiny random models' logits, in their standard deviations."""


def quantized(family: str, kind: str) -> FrozenLM:
    model = tiny_model(family)
    quantize_weights(model, kind)
    return FrozenLM.from_model(model, byte_tokenizer(), name=f"tiny-{family}")


def random_batch(rows: int = 3, length: int = 9) -> Batch:
    ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(3))
    labels = torch.where(torch.arange(length) > 3, ids, -100)
    return Batch(ids, torch.ones_like(ids), labels, torch.zeros(rows, dtype=torch.long))


def prompt_loss(prompted: PromptedLM, batch: Batch) -> Tensor:
    found = prompted.label_logits(batch)
    return functional.cross_entropy(found.logits_MV, found.labels_M)


# -- one layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 32), (7, 128), (5, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_moves_further_than_half_a_step(kind: str, shape: tuple[int, int]) -> None:
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight_OI[0] *= 30  # an output far larger than the others costs them nothing
    kept = QuantizedLinear(weight_OI, None, kind).weight
    if kind == "int8":
        room = weight_OI.abs().amax(dim=1, keepdim=True).expand_as(weight_OI)
    else:
        flat = functional.pad(weight_OI.flatten(), (0, -weight_OI.numel() % GROUP)).view(-1, GROUP)
        spread = (flat.amax(dim=1) - flat.amin(dim=1)).repeat_interleave(GROUP)
        room = spread[: weight_OI.numel()].view(shape)
    slack = 1.0 if kind == "int8" else 1.3  # scales and offsets of four bits are rounded to bfloat16
    assert bool(((kept - weight_OI).abs() <= slack * WORST_STEP[kind] * room + 1e-7).all())
    assert not torch.equal(kept, weight_OI)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_zero_or_on_the_grid_stay_exact(kind: str) -> None:
    assert torch.equal(QuantizedLinear(torch.zeros(4, 64), None, kind).weight, torch.zeros(4, 64))
    on_grid = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(0)).float() / 4 - 2
    on_grid[:, 0], on_grid[:, 1] = -2.0, 1.75
    if kind == "int4":
        assert torch.equal(QuantizedLinear(on_grid, None, kind).weight, on_grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_and_its_gradient_are_those_of_a_linear_layer(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(24, 40).to(dtype)
    layer = QuantizedLinear(plain.weight, plain.bias, kind)
    inputs = torch.randn(2, 5, 24, dtype=dtype)
    got, expected = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    direction = torch.randn(2, 5, 40, dtype=dtype)
    output = layer(got)
    reference = functional.linear(expected, layer.weight, plain.bias)
    output.backward(direction)
    reference.backward(direction)
    torch.testing.assert_close(output, reference)
    torch.testing.assert_close(got.grad, expected.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_layer_is_kept_for_the_backward_pass(kind: str) -> None:
    layer = QuantizedLinear(torch.randn(40, 24), None, kind)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(5, 24, requires_grad=True))
    assert kept == []


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_bfloat16(kind: str) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(torch.randn(40, 24), nn.Parameter(torch.randn(40), requires_grad=False), kind)
    inputs = torch.randn(5, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(inputs)
    output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    assert inputs.grad is not None
    assert inputs.grad.dtype == torch.float32
    torch.testing.assert_close(output.float(), layer(inputs.detach()), atol=0.1, rtol=0.02)


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", sorted(ZOO))
def test_model_loads_is_near_the_original_and_trains(family: str, kind: str) -> None:
    """Loading runs the geometry probe and the check at load; then logits, gradients and an update."""
    plain, small = FrozenLM.from_model(tiny_model(family), byte_tokenizer()), quantized(family, kind)
    assert small.geometry == plain.geometry
    assert (small.quantization, plain.quantization) == (kind, None)
    assert small.fingerprint == plain.fingerprint
    assert small.parameter_count == plain.parameter_count
    batch, table = random_batch(), plain.embed([5, 6, 7, 8])
    gradients, logits = [], []
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    for frozen in (plain, small):
        prompted = PromptedLM(frozen, [prompt_from_table("embedding", frozen.geometry, table)])
        logits.append(prompted.label_logits(batch).logits_MV.detach())
        parameters = list(prompted.parameters())
        stepper = AdamW(parameters, lr=1e-2)
        first = prompt_loss(prompted, batch)
        first.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        stepper.step()
        assert bool(prompt_loss(prompted, batch) < first)
    error = (logits[1] - logits[0]).square().mean().sqrt() / logits[0].std()
    assert 0 < float(error) < LOGIT_ERROR[kind]
    assert bool(gradients[1].isfinite().all())
    assert float(functional.cosine_similarity(*gradients, dim=0)) > (0.99 if kind == "int8" else 0.5)
    after = small.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_gradients_are_exact_for_the_weights_in_use(kind: str) -> None:
    """The same quantized weights in plain linear layers give the same loss and gradient."""
    small = quantized("llama", kind)
    plain_model = tiny_model("llama")
    with torch.no_grad():
        for name, layer in small.model.named_modules():
            if isinstance(layer, QuantizedLinear):
                plain_model.get_submodule(name).weight.copy_(layer.weight)
    plain = FrozenLM.from_model(plain_model, byte_tokenizer())
    results = []
    for frozen in (small, plain):
        torch.manual_seed(0)
        table = torch.randn(4, frozen.geometry.prefix_width) * 0.3
        prompted = PromptedLM(frozen, [prompt_from_table("prefix", frozen.geometry, table)])
        loss = prompt_loss(prompted, random_batch())
        loss.backward()
        results.append(
            (loss.detach(), torch.cat([p.grad.flatten() for p in prompted.parameters() if p.grad is not None]))
        )
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def wide_gpt2() -> transformers.PreTrainedModel:
    sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 512}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


@pytest.mark.parametrize(("kind", "factor"), [("int8", 3.9), ("int4", 7.0)])
def test_memory_shrinks_by_the_promised_factor(kind: str, factor: float) -> None:
    model = wide_gpt2()
    matrices = sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, Conv1D))
    before = weight_bytes(model)
    embeddings = model.get_input_embeddings().weight.clone()
    quantize_weights(model, kind)
    saved = before - weight_bytes(model)
    assert saved == pytest.approx(matrices * (1 - 1 / factor), rel=0.01)
    assert not any(isinstance(layer, Conv1D) for layer in model.modules())
    # embeddings and the head that is tied to them stay as they are
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_model_is_quantized_at_most_once() -> None:
    model = tiny_model("llama")
    quantize_weights(model, "int8")
    with pytest.raises(ConfigError, match="in int8 already"):
        quantize_weights(model, "int4")


def test_a_model_of_experts_is_refused() -> None:
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2)
    model = transformers.MixtralForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="experts"):
        quantize_weights(model, "int8")


def test_fine_tuning_of_quantized_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be trained"):
        FineTuningObjective(quantized("gpt2", "int8"))


@pytest.mark.parametrize("kind", KINDS)
def test_load_save_and_use_of_prompts_across_quantizations(kind: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    small, plain = FrozenLM.load(tmp_path / "model", quantization=kind), FrozenLM.load(tmp_path / "model")
    assert small.quantization == kind
    assert weight_bytes(small.model) < weight_bytes(plain.model)
    for number, (first, second) in enumerate([(small, plain), (plain, small)]):
        for kind_of_prompt, width in (("embedding", first.geometry.width), ("prefix", first.geometry.prefix_width)):
            prompt = prompt_from_table(kind_of_prompt, first.geometry, torch.randn(3, width))
            path = save_prompt(prompt, tmp_path / f"{kind_of_prompt}-{number}", frozen=first)
            loaded = load_prompt(path, second)
            assert torch.equal(loaded.prompt.table_PW, prompt.table_PW)
            assert loaded.info.model.quantization == first.quantization
