"""Adapters begin as nothing, learn, merge without a trace, and are all that is saved."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gpt import LLAMA, TINY, make, tokens
from torch import nn
from torch.testing import assert_close

from common.gguf_file import WeightsFileError
from common.gpt import GPT
from common.lora import (
    LORA_KEY,
    LoRALinear,
    adapters_off,
    add_lora,
    checksums,
    fingerprint,
    has_lora,
    load_lora,
    lora_parameters,
    lora_settings,
    merge_lora,
    save_lora,
)
from common.training import TrainingSettings, parameter_groups, train
from common.weights import load_pretrained, save_checkpoint

IDS = tokens(3, 9)
FAMILIES = {"gpt2": TINY, "llama": LLAMA, "untied": replace(TINY, tie_embeddings=False)}
each_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


def trained(config=LLAMA, **settings) -> GPT:
    """A model whose adapters are far from zero."""
    model = add_lora(make(config), **settings)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(model).values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


# --- The mathematics


@each_family
def test_it_begins_at_the_pretrained_model_exactly(config):
    plain = make(config)
    assert torch.equal(outputs(add_lora(copy.deepcopy(plain))), outputs(plain))


@each_family
@pytest.mark.parametrize("rank", [1, 8, 60])
def test_merged_equals_unmerged(config, rank):
    model = trained(config, rank=rank, alpha=3.0)
    before = outputs(model)
    assert (before - outputs(make(config))).abs().max() > 0.1, "the adapters do something"
    names = list(make(config).state_dict())
    merged = merge_lora(model)
    assert not any(isinstance(module, LoRALinear) for module in merged.modules())
    assert list(merged.state_dict()) == names
    assert_close(outputs(merged), before, rtol=1e-4, atol=1e-4)


def test_a_layer_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    linear = nn.Linear(7, 5)
    layer = LoRALinear(linear, rank=2, alpha=6.0)
    layer.lora_B.data.normal_()
    x = torch.randn(4, 7)
    W = linear.weight + 6.0 / 2 * layer.lora_B @ layer.lora_A
    assert_close(layer(x), x @ W.T + linear.bias)
    assert layer.lora_A.shape == (2, 7)
    assert layer.lora_B.shape == (5, 2)


def test_alpha_counts_over_rank():
    one, two = (trained(rank=4, alpha=alpha) for alpha in (4.0, 8.0))
    layer, twice = (model.blocks[0].mlp.up for model in (one, two))
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert_close(twice(x) - plain, 2 * (layer(x) - plain))


def test_an_adapter_learns_any_change_of_its_rank_and_no_larger_one():
    torch.manual_seed(0)
    linear, x = nn.Linear(12, 12, bias=False), torch.randn(200, 12)
    change = torch.randn(12, 2) @ torch.randn(2, 12)
    target = x @ (linear.weight.detach() + change).T
    losses = {}
    for rank in (1, 2):
        model = add_lora(nn.Sequential(copy.deepcopy(linear)), rank, alpha=rank, targets="0")
        settings = TrainingSettings(400, 0.05, weight_decay=0.0, stop_on_explosion=False)
        mse = lambda model, x, y: nn.functional.mse_loss(model(x), y)
        losses[rank] = train(model, [(x, target)], mse, settings, progress=False).losses[-1]
    assert losses[2] < 1e-3 < 1.0 < losses[1]


def test_switched_off_they_have_no_effect_and_on_again_they_have():
    plain, model = make(LLAMA), trained()
    before = outputs(model)
    with adapters_off(model) as same:
        assert same is model
        assert torch.equal(outputs(model), outputs(plain))
    assert torch.equal(outputs(model), before)
    with pytest.raises(RuntimeError, match="on the way"), adapters_off(model):
        raise RuntimeError("on the way")
    assert torch.equal(outputs(model), before)
    assert has_lora(model)
    assert not has_lora(plain)
    with pytest.raises(ValueError, match="has no adapters"), adapters_off(plain):
        pass


# --- What is trained


@each_family
def test_only_adapters_train_and_nothing_else_moves(config):
    model = add_lora(make(config), rank=2)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    loss = lambda model, ids: model(ids).square().mean()
    train(model, [(IDS,)], loss, TrainingSettings(2, 0.01, weight_decay=0.1), progress=False)
    moved = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == set(lora_parameters(model))
    groups = parameter_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(lora_parameters(model))


def test_each_adapter_has_rank_times_in_plus_out_weights():
    model = add_lora(make(LLAMA), rank=3)
    linears = [m for m in model.modules() if isinstance(m, LoRALinear)]
    expected = sum(3 * (m.in_features + m.out_features) for m in linears)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert len(linears) == LLAMA.n_layers * 7


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("query",), ["blocks.0.attention.query", "blocks.1.attention.query"]),
        ("mlp.up", ["blocks.0.mlp.up", "blocks.1.mlp.up"]),
        (["blocks.1.mlp.down", "blocks.1.attention.key"],) * 2,
    ],
    ids=str,
)
def test_targets_are_the_ends_of_names(targets, expected):
    settings = lora_settings(add_lora(make(LLAMA), targets=targets))
    assert sorted(settings["targets"]) == sorted(expected)


def test_a_part_of_a_model_leaves_the_rest_alone():
    model = make(LLAMA)
    add_lora(model.blocks[1:])
    assert {name.split(".")[1] for name in lora_parameters(model)} == {"1"}
    assert model.blocks[0].mlp.up.weight.requires_grad


def test_the_generator_decides_how_it_begins():
    A = lambda seed: (
        add_lora(make(LLAMA), generator=torch.Generator().manual_seed(seed)).blocks[0].mlp.up.lora_A
    )
    assert torch.equal(A(1), A(1))
    assert not torch.equal(A(1), A(2))


# --- On disk


def test_only_adapters_are_saved_and_they_come_back(tmp_path):
    model, path = trained(rank=2, targets=["query", "down"]), tmp_path / "a.safetensors"
    save_lora(model, path)
    saved = load_file(path)
    assert saved.keys() == lora_parameters(model).keys()
    assert path.stat().st_size < sum(t.nbytes for t in saved.values()) + 4000
    again = load_lora(make(LLAMA), path)
    assert torch.equal(outputs(again), outputs(model))
    assert lora_settings(again) == lora_settings(model)
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_a_merged_model_is_an_ordinary_checkpoint(tmp_path):
    model = merge_lora(trained())
    save_checkpoint(model, tmp_path / "merged.safetensors")
    again, _ = load_pretrained(tmp_path / "merged.safetensors")
    assert torch.equal(outputs(again), outputs(model))


def test_a_fingerprint_tells_weights_apart_and_overlooks_adapters():
    of = lambda model: fingerprint(checksums(model))
    base = of(make(LLAMA))
    assert of(make(LLAMA)) == of(trained()) == base
    other = make(LLAMA)
    other.blocks[1].mlp.down.weight.data[-1, -1] += 1e-3
    assert base not in (of(other), of(make(LLAMA, seed=1)), of(make(TINY)))


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.safetensors"
    path.mkdir()
    with pytest.raises(OSError, match="can't be written"):
        save_lora(trained(), path)
    assert list(tmp_path.iterdir()) == [path]


# --- Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["qurey"]}, "no Linear layer is called qurey: choose among query, key, value"),
        ({"targets": ["query", "gates"]}, "no Linear layer is called gates"),
        ({"targets": []}, "no Linear layer is called nothing"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
    ],
    ids=str,
)
def test_impossible_adapters(settings, message):
    model = make(LLAMA)
    with pytest.raises(ValueError, match=message):
        add_lora(model, **settings)
    assert all(p.requires_grad for p in model.parameters()), "and nothing was changed"


def test_twice_is_refused_and_so_is_a_model_without():
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(trained())
    for function in (merge_lora, lora_parameters, lora_settings):
        with pytest.raises(ValueError, match="has no adapters"):
            function(make(LLAMA))


def test_files_that_cannot_be_meant(tmp_path):
    path, other = tmp_path / "a.safetensors", tmp_path / "other.safetensors"
    save_lora(trained(), path)
    with pytest.raises(WeightsFileError, match="belong to another model"):
        load_lora(make(LLAMA, seed=1), path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_lora(make(LLAMA), other)
    save_checkpoint(make(LLAMA), other)
    with pytest.raises(WeightsFileError, match="it holds no adapters"):
        load_lora(make(LLAMA), other)
    other.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsFileError, match="choose a safetensors file"):
        load_lora(make(LLAMA), other)
    about = '{"rank": 8, "alpha": 16, "targets": ["query"], "base": "%s"}'
    good = about % fingerprint(checksums(make(LLAMA)))
    for text, message in (
        ("{", "can't be understood"),
        ("[1]", "does not say its rank"),
        ("{}", "does not say its rank, alpha"),
        (good, "only one of file and model has"),
        (good.replace('"query"', '"nope"'), "no Linear layer is called nope"),
    ):
        save_file(load_file(path), other, {LORA_KEY: text})
        with pytest.raises(WeightsFileError, match=message) as caught:
            load_lora(make(LLAMA), other)
        assert "\n" not in str(caught.value)
