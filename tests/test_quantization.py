"""8-bit weights: how far off they may be, and that a real model hardly notices.

uv run pytest tests/test_quantization.py
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from common.assets import fetch
from common.generation import generate
from common.gpt import GPT, PRESETS
from common.quantization import Int8Product, quantize_for_decoding, quantize_rows
from common.weights import load_pretrained

TINY = replace(PRESETS["tiny"], vocab_size=300, n_layers=2)


def test_small_numbers_by_hand():
    numbers, scale = quantize_rows(torch.tensor([[1.0, -2.54, 0.02], [0.0, 0.0, 0.0]]))
    assert numbers.tolist() == [[50, -127, 1], [0, 0, 0]]
    assert scale.tolist() == pytest.approx([0.02, 1.0])


def test_no_entry_is_off_by_more_than_half_a_scale():
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -3, 3, 50
    ).unsqueeze(1)
    numbers, scale = quantize_rows(weight)
    off = (weight - numbers * scale[:, None]).abs() / scale[:, None]
    assert 0.4 < off.max() < 0.5001


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 64)])
def test_one_vector_is_multiplied_by_8_bits_and_nearly_the_same(shape, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 96, bias), torch.randn(shape)
    ours, exact = Int8Product(layer)(x), layer(x)
    assert ours.shape == exact.shape
    assert 0 < (ours - exact).norm() < 0.03 * exact.norm()


def test_more_than_one_vector_is_multiplied_exactly():
    layer, x = nn.Linear(64, 96), torch.randn(3, 5, 64)
    assert torch.equal(Int8Product(layer)(x), layer(x))


@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_is_given_8_bits_and_the_parameters_stay(tied):
    torch.manual_seed(0)
    model = GPT(replace(TINY, tie_embeddings=tied)).eval()
    before, prompt = {k: v.clone() for k, v in model.state_dict().items()}, torch.arange(10)[None]
    exact = model(prompt)
    assert quantize_for_decoding(quantize_for_decoding(model)) is model
    assert sum(isinstance(module.forward, Int8Product) for module in model.modules()) == 2 * 6 + 1
    assert_close(dict(model.state_dict()), before, atol=0, rtol=0)
    assert torch.equal(model(prompt), exact)
    cache = model.new_cache(1)
    steps = torch.cat([model(token, cache) for token in prompt.split(1, dim=1)], dim=1)
    assert 0 < (steps - exact).norm() < 0.05 * exact.norm()
    assert generate(model, prompt, 5).shape == (1, 15)


def test_another_dtype_is_refused():
    with pytest.raises(RuntimeError, match=r"float32 on the CPU, not torch\.bfloat16"):
        quantize_for_decoding(GPT(TINY).bfloat16())


def test_a_pytorch_without_kernels_is_one_line(monkeypatch):
    monkeypatch.delattr(torch, "quantize_per_channel")
    with pytest.raises(RuntimeError, match="can't compute with 8-bit weights") as why:
        Int8Product(nn.Linear(4, 4))
    assert "\n" not in str(why.value)


def test_a_real_model_stays_a_good_one():
    model, tokenizer = load_pretrained("smollm2-135m")
    ids = torch.tensor([tokenizer.encode(fetch("story").read_text(encoding="utf8")[:400])])

    @torch.no_grad()
    def loss():
        cache = model.new_cache(1, ids.shape[1])
        logits = torch.cat([model(token, cache) for token in ids[:, :-1].split(1, dim=1)], dim=1)
        return F.cross_entropy(logits.flatten(0, 1), ids[0, 1:]).item()

    exact = loss()
    quantize_for_decoding(model)
    assert exact < 0.5 * math.log(model.config.vocab_size)
    assert_close(loss(), exact, atol=0.2, rtol=0)  # with x rounded by a wrong scale: 1.1 more
