"""The model is two real families to the fifth digit, keeps its promises, and costs what it says."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from common.attention import recorded_attention
from common.gpt import (
    GPT,
    PRESETS,
    GPTConfig,
    activation_bytes,
    cache_bytes,
    count_parameters,
    flops_per_token,
)

TINY = GPTConfig(97, context_length=32, d_model=48, n_layers=2, n_heads=6, d_ff=80)
LLAMA = replace(
    TINY, n_kv_heads=2, norm="rms", mlp="swiglu", position="rotary", bias=False, rope_theta=500.0
)
VARIANTS = {
    "gpt2": TINY,
    "llama": LLAMA,
    "untied": replace(LLAMA, tie_embeddings=False, bias=True),
    "no positions": replace(TINY, position="none", n_kv_heads=1),
    "mixed": replace(TINY, norm="rms", position="rotary", mlp="swiglu", dropout=0.1),
}
each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def make(config: GPTConfig, spread: float = 10.0, seed: int = 0) -> GPT:
    """A model in evaluation mode whose weights are large enough for every part to matter."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    for name, p in model.named_parameters():
        p.data = p.data * spread if p.dim() == 2 else p.data + 0.3 * torch.randn(p.shape)
        if name == "token_embedding.weight":
            p.data /= spread / 3
    return model


def tokens(*shape: int, vocab_size: int = 97, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# --- The same as the reference implementations


def gpt2_weights(theirs: dict, config: GPTConfig) -> dict:
    """GPT-2's names and layout to ours: its matrices are (in, out), query, key and value in one."""
    C = config.d_model
    ours = {
        "token_embedding.weight": theirs["transformer.wte.weight"],
        "position_embedding.weight": theirs["transformer.wpe.weight"],
        "final_norm.weight": theirs["transformer.ln_f.weight"],
        "final_norm.bias": theirs["transformer.ln_f.bias"],
    }
    renamed = {
        "ln_1": "attention_norm",
        "attn.c_proj": "attention.output",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    }
    for i in range(config.n_layers):
        for kind in ("weight", "bias"):
            for old, new in renamed.items():
                tensor = theirs[f"transformer.h.{i}.{old}.{kind}"]
                ours[f"blocks.{i}.{new}.{kind}"] = tensor.T if tensor.dim() == 2 else tensor
            joint = theirs[f"transformer.h.{i}.attn.c_attn.{kind}"]  # (C, 3 C) or (3 C,)
            for name, part in zip(("query", "key", "value"), joint.split(C, -1), strict=True):
                ours[f"blocks.{i}.attention.{name}.{kind}"] = part.T if part.dim() == 2 else part
    return ours


def llama_weights(theirs: dict) -> dict:
    """Llama's names to ours; the layouts agree."""
    renamed = {
        "model.embed_tokens": "token_embedding",
        "model.norm": "final_norm",
        "lm_head": "head",
        "model.layers": "blocks",
        "self_attn": "attention",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "_proj": "",
        "attention.q.": "attention.query.",
        "attention.k.": "attention.key.",
        "attention.v.": "attention.value.",
        "attention.o.": "attention.output.",
    }
    ours = {}
    for name, tensor in theirs.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        ours[name] = tensor
    return ours


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """Norms away from 1, biases away from 0: a forgotten one must show."""
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model.eval()


def test_gpt2_equals_transformers():
    theirs = stirred(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=97, n_positions=32, n_embd=48, n_layer=2, n_head=6, n_inner=80
            )
        )
    )
    ours, ids = GPT(TINY).eval(), tokens(3, 32)
    ours.load_state_dict(gpt2_weights(theirs.state_dict(), TINY), strict=True)
    assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tie", [True, False])
def test_llama_with_grouped_queries_equals_transformers(tie):
    theirs = stirred(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=97,
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=2,
                num_attention_heads=6,
                num_key_value_heads=2,
                max_position_embeddings=32,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 500.0},
                tie_word_embeddings=tie,
            )
        )
    )
    ours, ids = GPT(replace(LLAMA, tie_embeddings=tie)).eval(), tokens(3, 32)
    weights = llama_weights(theirs.state_dict())
    if tie:
        del weights["head.weight"]
    ours.load_state_dict(weights, strict=True)
    assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


# --- Configuration


PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name):
    with torch.device("meta"):
        model = GPT(PRESETS[name])
    size = sum(p.numel() for p in model.parameters())
    assert size == sum(count_parameters(PRESETS[name]).values())
    assert size == PUBLISHED.get(name, size)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"n_heads": 5}, "d_model 48 is not divisible by n_heads 5"),
        ({"n_kv_heads": 4}, "n_heads 6 is not divisible by n_kv_heads 4"),
        ({"n_heads": 16, "n_kv_heads": 16, "position": "rotary"}, "odd"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"n_layers": 1.5}, "n_layers is 1.5"),
        ({"n_kv_heads": 0}, "n_kv_heads is 0"),
        ({"d_model": True}, "d_model is True"),
        ({"norm": "batch"}, "norm is 'batch', it must be one of layer, rms"),
        ({"mlp": "relu"}, "mlp is 'relu'"),
        ({"position": "sine"}, "position is 'sine'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ],
)
def test_impossible_configurations_are_refused_in_one_line(choice, message):
    with pytest.raises(ValueError, match="impossible GPTConfig") as refusal:
        replace(TINY, **choice)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_configuration_fills_in_its_blanks_and_stays_as_it_is():
    config = GPTConfig(d_model=64, n_heads=4)
    assert (config.n_kv_heads, config.d_ff, config.head_dim) == (4, 256, 16)
    with pytest.raises(AttributeError):
        config.d_model = 32


# --- Parameters


@each_variant
def test_every_parameter_is_listed_once_and_loads_strictly(config):
    model, copied = make(config), make(config, seed=1)
    names = list(model.state_dict())
    assert names == [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert ("head.weight" in names) == (not config.tie_embeddings)
    copied.load_state_dict(model.state_dict(), strict=True)
    assert_close(copied(tokens(1, 9)), model(tokens(1, 9)))


def test_a_tied_head_follows_its_embedding_wherever_it_goes():
    model = make(TINY)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.token_embedding.weight.data *= 2
        assert other.head.weight is other.token_embedding.weight
        assert not torch.equal(other.head.weight, model.head.weight)
    with torch.device("meta"):
        empty = GPT(TINY)
    empty.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert_close(empty.eval()(tokens(1, 9)), model(tokens(1, 9)))


@pytest.mark.parametrize("name", ["tiny", "small", "medium"])
@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("tie", [True, False])
def test_an_untrained_model_is_as_surprised_as_chance(name, modern, tie):
    config = replace(PRESETS[name], tie_embeddings=tie)
    if modern:
        config = replace(config, norm="rms", mlp="swiglu", position="rotary", bias=False)
    torch.manual_seed(0)
    ids = tokens(4, 65, vocab_size=config.vocab_size)
    with torch.no_grad():
        loss = F.cross_entropy(GPT(config)(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss - math.log(config.vocab_size)) < 0.2


@each_variant
def test_residual_projections_start_smaller(config):
    model = GPT(replace(config, n_layers=8, d_model=192, d_ff=384))
    block, expected = model.blocks[0], 0.02 / math.sqrt(2 * 8)
    assert_close(block.attention.output.weight.std().item(), expected, rtol=0.05, atol=0)
    assert_close(block.mlp.down.weight.std().item(), expected, rtol=0.05, atol=0)
    assert_close(block.mlp.up.weight.std().item(), 0.02, rtol=0.05, atol=0)
    assert_close(model.token_embedding.weight.std().item(), 0.02, rtol=0.05, atol=0)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


@each_variant
def test_every_parameter_gets_a_gradient(config):
    model, ids = make(config).train(), tokens(4, 32)
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    for name, p in model.named_parameters():
        if not name.endswith(
            "key.bias"
        ):  # it adds the same to all scores of a row: softmax is blind
            assert p.grad.abs().sum() > 1e-6, name


@each_variant
def test_one_batch_can_be_learned_by_heart(config):
    torch.manual_seed(0)
    model, ids = GPT(replace(config, dropout=0.0)), tokens(2, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


# --- What depends on what


@each_variant
@settings(max_examples=10)
@given(change=st.integers(0, 11))
def test_no_token_sees_the_future(config, change):
    model, ids = make(config), tokens(2, 12)
    before = model(ids)
    ids[0, change] = (ids[0, change] + 1) % 97
    difference = (model(ids) - before).abs().amax(-1)  # (B, T)
    assert (difference[0, :change] == 0).all()
    assert (difference[0, change:] > 0).all()
    assert (difference[1] == 0).all()  # nor another row


def test_without_a_mask_every_token_sees_every_other():
    model, ids = make(replace(TINY, causal=False)), tokens(1, 8)
    before = model(ids)
    ids[0, 7] = (ids[0, 7] + 1) % 97
    assert ((model(ids) - before).abs().amax(-1) > 0).all()


@given(st.permutations(range(8)))
@settings(max_examples=20)
def test_without_mask_and_positions_a_text_is_a_bag_of_words(order):
    model, ids = make(replace(TINY, causal=False, position="none")), tokens(1, 8)
    assert_close(model(ids[:, order]), model(ids)[:, order], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_positions_tell_equal_tokens_apart(position):
    model = make(replace(TINY, causal=False, position=position))
    logits = model(torch.tensor([[5, 6, 5, 6]]))[0]
    assert (logits[0] - logits[2]).abs().max() > 1e-3


def test_a_mask_can_open_a_prefix():
    model, ids = make(TINY), tokens(1, 8)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    assert_close(model.hidden(ids, mask=mask), model.hidden(ids))
    mask[:4, :4] = True
    before = model.hidden(ids, mask=mask)
    ids[0, 3] = (ids[0, 3] + 1) % 97
    assert (model.hidden(ids, mask=mask) - before)[0, 0].abs().max() > 1e-4


def test_dropout_rests_in_evaluation():
    model, ids = make(replace(TINY, dropout=0.5)), tokens(1, 8)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_attention_maps_of_every_layer_can_be_recorded():
    model, ids = make(LLAMA), tokens(2, 9)
    with recorded_attention(model) as maps:
        logits = model(ids)
    assert_close(logits, model(ids), atol=1e-4, rtol=1e-4)
    assert [m.shape for m in maps] == 2 * [(2, 6, 9, 9)]


# --- The cache


@each_variant
@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=6), batch=st.integers(1, 3))
def test_reading_in_stretches_equals_reading_at_once(config, cuts, batch):
    config = replace(config, context_length=64)
    model, ids = make(config), tokens(batch, sum(cuts))
    cache = model.new_cache(batch)
    with torch.no_grad():
        pieces = [model(piece, cache) for piece in ids.split(cuts, dim=1)]
        assert_close(torch.cat(pieces, 1), model(ids), atol=1e-4, rtol=1e-4)


@each_variant
def test_padding_at_the_left_changes_nothing(config):
    model, ids = make(config), tokens(1, 6)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), dim=1)
    cache = model.new_cache(1, padding=torch.tensor([3]))
    with torch.no_grad():
        logits = model(padded, cache)
        assert logits.isfinite().all()
        assert_close(logits[:, 3:], model(ids), atol=1e-4, rtol=1e-4)


def test_more_than_the_context_is_refused():
    model = make(TINY)
    with pytest.raises(ValueError, match="33 tokens are more than this model's context of 32"):
        model(tokens(1, 33))
    cache = model.new_cache(1)
    with torch.no_grad():
        model(tokens(1, 30), cache)
        with pytest.raises(ValueError, match="33 tokens"):
            model(tokens(1, 3), cache)


def test_a_model_that_sees_the_future_has_no_cache():
    with pytest.raises(ValueError, match="see the future"):
        GPT(replace(TINY, causal=False)).new_cache(1)


@each_variant
def test_bf16_weights_give_about_the_same(config):
    model, ids = make(config, spread=4), tokens(2, 32)
    expected = model(ids)
    half = copy.deepcopy(model).bfloat16()
    difference = (half(ids).float() - expected).abs().mean()
    assert difference < 0.05 * expected.std()
    assert half.new_cache(1).layers[0].keys.dtype == torch.bfloat16


# --- What it costs


@each_variant
def test_counted_parameters_are_there(config):
    model, parts = GPT(config), count_parameters(config)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert parts["mlp"] == sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)
    assert parts["norms"] == sum(p.numel() for n, p in model.named_parameters() if "norm" in n)


@each_variant
def test_counted_flops_are_those_of_pytorchs_counter(config):
    config = replace(config, dropout=0.0)
    model, ids = GPT(config), tokens(2, 16)
    with FlopCounterMode(display=False) as counter:
        logits = model(ids)
    assert counter.get_total_flops() == ids.numel() * flops_per_token(config, 16)
    with counter:
        logits.sum().backward()
    recomputed = ids.numel() * 2 * config.n_layers * 16 * config.d_model  # scores, by the kernel
    backward = counter.get_total_flops()
    forward = ids.numel() * flops_per_token(config, 16)
    assert (
        backward - recomputed == ids.numel() * flops_per_token(config, 16, training=True) - forward
    )


@each_variant
def test_counted_activations_are_what_autograd_saves(config):
    config = replace(config, dropout=0.0, d_ff=192)
    model, ids = GPT(config), tokens(4, 32)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage  # the storage itself, so that it isn't used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    measured = sum(storage.nbytes() for storage in saved.values())
    assert measured == pytest.approx(activation_bytes(config, 4, 32), rel=0.01)


@each_variant
def test_counted_cache_is_what_is_allocated(config):
    cache = GPT(config).new_cache(3, capacity=20)
    assert cache.nbytes == cache_bytes(config, 3, 20)
