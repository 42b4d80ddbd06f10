"""Pretrained weights against `transformers`, to 1e-4 in the logits; and files that must be refused.

uv run pytest tests/test_weights.py
"""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from common.assets import ASSETS, DATA, AssetUnavailable, fetch
from common.corpus import normalise
from common.export import export
from common.generation import generate
from common.gpt import GPT, PRESETS, GPTConfig
from common.weights import Pretrained, WeightsFileError, load_pretrained, save_checkpoint

VOCAB = 40


def randomised(model):
    """Every parameter far from where initialisation puts it: no bias is 0, no norm's weight 1."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=g)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + noise if is_norm else noise)
    return model.eval()


def gpt2(**changes) -> GPT2LMHeadModel:
    sizes = {"vocab_size": VOCAB, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}
    return randomised(
        GPT2LMHeadModel(GPT2Config(**sizes | {"bos_token_id": 0, "eos_token_id": 0} | changes))
    )


def llama(**changes) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }
    return randomised(LlamaForCausalLM(LlamaConfig(**sizes | changes)))


def assert_same_logits(ours, theirs, vocab_size: int = VOCAB, length: int = 16) -> None:
    ids = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        actual, expected = ours(ids), theirs(ids).logits.float()
    assert expected.std() > 0.1  # a model that says nothing would prove nothing
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------- safetensors of other libraries


@pytest.mark.parametrize(
    "theirs",
    [
        gpt2(),
        gpt2(n_inner=32, n_head=4, layer_norm_epsilon=1e-3),
        gpt2(tie_word_embeddings=False),
        llama(),
        llama(tie_word_embeddings=True, num_key_value_heads=6),
        llama(attention_bias=True, mlp_bias=True, num_key_value_heads=1),
        llama(rope_parameters={"rope_type": "default", "rope_theta": 100.0}, rms_norm_eps=1e-3),
    ],
    ids=lambda model: f"{model.config.model_type}",
)
def test_logits_are_those_of_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours, tokenizer = load_pretrained(tmp_path)
    assert tokenizer is None
    assert not ours.training
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in ours.parameters())
    assert_same_logits(ours, theirs)
    assert_same_logits(load_pretrained(str(tmp_path / "model.safetensors"))[0], theirs)


def test_names_without_the_prefix_and_with_buffers(tmp_path):
    """As OpenAI's GPT-2 lies on the hub: no prefix, and the causal mask among the weights."""
    theirs = gpt2()
    theirs.config.save_pretrained(tmp_path)
    weights = {name: tensor.clone() for name, tensor in theirs.transformer.state_dict().items()}
    for i in range(2):
        weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors")
    assert_same_logits(load_pretrained(tmp_path)[0], theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_half_precision_files_become_float32(make, dtype, tmp_path):
    make().to(dtype).save_pretrained(tmp_path)
    ours, _ = load_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same_logits(ours, again)


def test_a_head_stored_although_it_is_tied(tmp_path):
    theirs = llama(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, file)
    assert_same_logits(load_pretrained(file)[0], theirs)
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, file)
    assert_refused(file, "said to be tied")


@pytest.mark.parametrize("kind", [GPT2Model, LlamaModel])
def test_models_without_a_head(kind, tmp_path):
    """GPT-2's head is its embedding. Llama's own can't be made up."""
    whole = gpt2() if kind is GPT2Model else llama()
    whole.base_model.save_pretrained(tmp_path)
    if kind is GPT2Model:
        assert_same_logits(load_pretrained(tmp_path)[0], whole)
    else:
        assert_refused(tmp_path, "lacks lm_head.weight")


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """GPT-2 124M with random weights, written by transformers; and a probe of its logits."""
    folder = tmp_path_factory.mktemp("gpt2")
    theirs = GPT2LMHeadModel(GPT2Config()).eval()
    theirs.save_pretrained(folder)
    (folder / "config.json").unlink()
    return folder / "model.safetensors", theirs


def test_full_size_gpt2_is_recognised_and_equal(full_size):
    file, theirs = full_size
    ours, tokenizer = load_pretrained(file)
    assert ours.config == PRESETS["gpt2-124m"]
    assert sum(p.numel() for p in ours.parameters()) == 124_439_808
    assert_same_logits(ours, theirs, PRESETS["gpt2-124m"].vocab_size, length=32)
    assert tokenizer.encode("Hello world") == [15496, 995]


# --------------------------------------------------------------------------------------------- GGUF


def interleave(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """What llama.cpp does to the rows of q and k: pairs half a head apart come side by side."""
    halves = rows.reshape(n_heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, theirs, dtype=np.float32) -> None:
    """A tiny Llama or GPT-2 as llama.cpp's converter writes it."""
    config, family = theirs.config, theirs.config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if family == "llama":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    else:
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    arch = gguf.MODEL_ARCH.LLAMA if family == "llama" else gguf.MODEL_ARCH.GPT2
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads}
    heads["k_proj"] = getattr(config, "num_key_value_heads", 0)
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        part = name.split(".")[-2]
        if part in heads:
            data = interleave(data, heads[part])
        if part in ("c_attn", "c_proj", "c_fc"):
            data = data.T
        kind = dtype if data.ndim > 1 else np.float32
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data.copy().astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "theirs",
    [llama(), llama(tie_word_embeddings=True, num_key_value_heads=3), gpt2()],
    ids=["llama", "llama-tied", "gpt2"],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_logits_of_gguf_files(theirs, dtype, tmp_path):
    write_gguf(tmp_path / "model.gguf", theirs, dtype)
    ours, tokenizer = load_pretrained(tmp_path / "model.gguf")
    assert tokenizer is None
    if dtype == np.float16:  # round the reference likewise
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(parameter.half() if parameter.dim() > 1 else parameter)
    assert_same_logits(ours, theirs)


@pytest.fixture(scope="module")
def smollm2():
    return load_pretrained("smollm2-135m")


@pytest.fixture(scope="module")
def their_smollm2():
    """The same file, dequantised and put together by transformers; it takes its time."""
    path = fetch("smollm2-135m")
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def test_smollm2_is_the_preset(smollm2):
    model, tokenizer = smollm2
    assert model.config == PRESETS["smollm2-135m"]
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.vocab_size == 49_152


def test_smollm2_has_the_logits_of_transformers(smollm2, their_smollm2):
    assert_same_logits(smollm2[0], their_smollm2, 49_152, length=40)


def test_smollm2_writes_what_transformers_would(smollm2, their_smollm2):
    """Greedy text, 64 tokens on 5 prompts. The reference reads our text in one pass: if its first
    choice after each token is the token that follows, it would have written the same."""
    model, tokenizer = smollm2
    prompts = [
        "Once upon a time, in a village by the sea,",
        "The capital of France is",
        "def fibonacci(n):\n",
        "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
        "Water boils at 100 degrees",
    ]
    rows = [tokenizer.encode(prompt, allowed_special="all") for prompt in prompts]
    written = generate(model, rows, 64)
    for row, ids in zip(rows, written, strict=True):
        text = ids[-64 - len(row) :][None]
        with torch.no_grad():
            choices = their_smollm2(text).logits.argmax(-1)
        torch.testing.assert_close(text[0, len(row) :], choices[0, len(row) - 1 : -1])


# ------------------------------------------------------------------------------ our own checkpoints

OWN = GPTConfig(VOCAB, 16, d_model=24, n_layers=2, n_heads=3)


@pytest.mark.parametrize(
    "config",
    [
        OWN,
        replace(OWN, tie_embeddings=False, bias=False, dropout=0.1),
        replace(OWN, norm="rms", mlp="swiglu", position="rotary", n_kv_heads=1, d_ff=40),
        replace(OWN, position="none", causal=False),
    ],
)
def test_a_checkpoint_comes_back(config, tmp_path):
    model = randomised(GPT(config))
    path = tmp_path / "mine.safetensors"
    save_checkpoint(model, path)
    again, tokenizer = load_pretrained(path)
    assert tokenizer is None
    assert again.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert [file.name for file in tmp_path.iterdir()] == ["mine.safetensors"]


def test_what_was_loaded_can_be_saved_and_loaded(tmp_path):
    """Query, key and value of a GPT-2 come out of one tensor; they must not share its memory."""
    gpt2().save_pretrained(tmp_path)
    model, _ = load_pretrained(tmp_path)
    save_checkpoint(model, tmp_path / "mine.safetensors")
    again, _ = load_pretrained(tmp_path / "mine.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_model_owns_its_memory(make, tmp_path):
    """Whoever writes into the file afterwards does not write into the model."""
    make().save_pretrained(tmp_path)
    model, _ = load_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        stream.write(bytes(size))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_tensors_at_odd_places_of_a_file(tmp_path):
    """The library pads a file's header to 8 bytes; the format does not ask for it."""
    theirs = llama()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].rstrip() + b" " * 3
    header += b" " * (len(header) % 2 == 0)  # an odd length
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    assert_same_logits(load_pretrained(tmp_path)[0], theirs)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "mine.safetensors"
    save_checkpoint(GPT(OWN), path)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(GPT(OWN), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["mine.safetensors"]
    with pytest.raises(OSError, match="can't be written") as caught:
        save_checkpoint(GPT(OWN), tmp_path / "no such folder" / "mine.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{}", "lacks blocks.2"),
        ("not JSON", "can't be understood"),
        ("[1]", "can't be understood"),
        ('{"n_heads": 7}', "can't be understood"),
        ('{"n_experts": 8}', "can't be understood"),
        ('{"norm": [1]}', "can't be understood"),
        ('{"n_layers": 1000000000}', "absurd"),
        ('{"vocab_size": 1e300}', "can't be understood"),
        ('{"vocab_size": 100000000000000000000}', "absurd"),
        ('{"d_ff": 1099511627776}', "absurd"),
        ("[" * 100_000, "can't be understood"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_configurations_that_do_not_belong(config, reason, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_file(GPT(OWN).state_dict(), path, {"gpt_config": config})
    assert_refused(path, reason)


# ------------------------------------------------------------------------------------------- strict


def assert_refused(path, reason: str, **arguments) -> None:
    with pytest.raises(WeightsFileError) as caught:
        load_pretrained(path, **arguments)
    message = str(caught.value)
    assert reason in message
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 600


def test_names_of_models(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    for name in ("gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1558m"):
        assert name in ASSETS
        with pytest.raises(AssetUnavailable):  # in one line, by `fetch`
            load_pretrained(name)


def test_a_name_brings_its_configuration(full_size, monkeypatch, tmp_path):
    file = tmp_path / "anything"
    file.hardlink_to(full_size[0])
    (tmp_path / "config.json").write_text("{}", encoding="utf8")  # of something else
    monkeypatch.setattr("common.weights.fetch", lambda name: file)
    model, _ = load_pretrained("gpt2-124m")
    assert model.config == PRESETS["gpt2-124m"]


def test_every_tensor_is_needed_and_none_is_left_over(tmp_path):
    llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for name in weights:
        save_file({key: tensor for key, tensor in weights.items() if key != name}, file)
        short = name.removeprefix("model.")
        reason = "neither GPT-2's" if "embed" in name else f"lacks {short}"
        assert_refused(file, reason)
        wrong = weights[name].unsqueeze(0).contiguous()
        save_file(weights | {name: wrong}, file)
        assert_refused(file, f"its tensor '{short}' is {tuple(wrong.shape)}")
    save_file(weights | {f"model.layers.{i}.extra": torch.ones(1) for i in range(5)}, file)
    assert_refused(file, "layers.0.extra, layers.1.extra, layers.2.extra and 2 more")
    save_file(weights, file)
    load_pretrained(file)


def test_a_configuration_can_be_said(tmp_path):
    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert_refused(tmp_path, "config.json beside it")
    model, _ = load_pretrained(tmp_path, config=OWN)
    assert_same_logits(model, theirs)
    assert_refused(tmp_path, "model needs (40, 48)", config=replace(OWN, d_model=48))
    assert_refused(tmp_path, "has what this model has not: h.1", config=replace(OWN, n_layers=1))
    assert_refused(tmp_path, "lacks blocks.0.mlp.gate", config=replace(OWN, mlp="swiglu"))


# ------------------------------------------------------------------------------- damage, and memory


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory) -> list[Path]:
    """One small file of every format."""
    folder = tmp_path_factory.mktemp("sound")
    write_gguf(folder / "a.gguf", llama())
    save_checkpoint(GPT(OWN), folder / "b.safetensors")
    gpt2().save_pretrained(folder / "c")
    for to in ("pytorch", "numpy"):
        export(Pretrained.of(GPT(OWN)), folder / to, to)
    archives = [folder / "pytorch" / "model.pt", folder / "numpy" / "model.npz"]
    files = [folder / "a.gguf", folder / "b.safetensors", folder / "c" / "model.safetensors"]
    return files + archives


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage_is_loaded_or_refused_in_one_line(sound_files, data):
    path = data.draw(st.sampled_from(sound_files))
    sound = path.read_bytes()
    content = bytearray(sound)
    header = min(len(sound), 4000)  # where damage hurts; in the weights, any bits are numbers
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(sound)))]
    broken = path.with_name("broken" + path.suffix)
    broken.write_bytes(content)
    message = ""
    try:
        load_pretrained(broken)
    except WeightsFileError as refusal:
        message = str(refusal)
    assert "\n" not in message
    assert len(message) < 600


# What follows runs in a process of its own, whose peak of memory is of this one load alone.
MEASURE = """
import random, resource, sys
from pathlib import Path
import torch
from common.weights import WeightsFileError, load_pretrained, save_checkpoint
from common.gpt import GPT, GPTConfig

def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux: ru_maxrss remembers the parent, this line of the table is the process's own.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
"""

pytest_resource = pytest.mark.skipif(sys.platform == "win32", reason="needs Unix's resource module")


def measured(code: str, *arguments) -> str:
    command = [sys.executable, "-c", MEASURE + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest_resource
@pytest.mark.parametrize("which", ["GGUF", "safetensors"])
def test_loading_takes_little_more_than_the_model(which, full_size):
    output = measured(
        """
tiny = Path(sys.argv[2]) / "tiny.safetensors"
save_checkpoint(GPT(GPTConfig(9, 8, d_model=8, n_layers=1, n_heads=2)), tiny)
modules = set(sys.modules)
load_pretrained(tiny)
before = peak()
model, _ = load_pretrained(sys.argv[1])
size = sum(p.nbytes for p in model.parameters())
print((peak() - before) / size, len(set(sys.modules) - modules))
""",
        "smollm2-135m" if which == "GGUF" else full_size[0],
        full_size[0].parent,
    )
    ratio, new_modules = output.split()
    assert 0.9 < float(ratio) < 1.3
    assert int(new_modules) < 50  # drawing random numbers on "meta" would import 900


@pytest_resource
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit address space")
def test_no_damage_makes_it_ask_for_wild_amounts_of_memory(sound_files):
    output = measured(
        """
load_pretrained(sys.argv[1])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)  # beyond, MemoryError
rng, refused = random.Random(0), 0
for path in map(Path, sys.argv[1:]):
    sound = path.read_bytes()
    broken = path.with_name("broken" + path.suffix)
    for _ in range(200):
        content = bytearray(sound)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(min(len(sound), 4000))] = rng.choice((0, 1, 127, 128, 255))
        broken.write_bytes(content)
        try:
            load_pretrained(broken)
        except WeightsFileError:
            refused += 1
print(refused)
""",
        *sound_files,
    )
    assert int(output) > 150


def test_the_shipped_model_is_what_its_card_says():
    card = (DATA / "course-small" / "README.md").read_text(encoding="utf8")
    model, tokenizer = load_pretrained("course-small")
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    assert ASSETS["shakespeare"].sha256 in card
    assert model.config == PRESETS["small-llama"]
    raw = (fetch("shakespeare") / "tragedies" / "hamlet.md").read_text(encoding="utf8")
    text = normalise(raw)[:40_000]
    ids = torch.tensor(tokenizer.encode(text))
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)
    with torch.no_grad():
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    bits = loss.item() / math.log(2) * len(ids) / len(text)
    said = float(re.search(r"([\d.]+) bits per character", card)[1])  # of three plays
    assert abs(bits - said) < 0.2, f"{bits:.3f} bits per character on Hamlet, the card has {said}"
