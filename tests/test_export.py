"""Weights out: every format read back, by us bit for bit, and by its own framework.

uv run pytest tests/test_export.py
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from weakref import finalize

import gguf
import numpy as np
import pytest
import torch
from test_sources import strings
from test_weights import assert_same_logits, gpt2, randomised
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import cli
from common.export import DTYPES, FORMATS, ExportError, export, with_tokenizer_of
from common.gpt import GPT, PRESETS, GPTConfig
from common.token_formats import Roles
from common.tokenizer import BPETokenizer
from common.weights import (
    Pretrained,
    WeightsFileError,
    load_pretrained,
    open_pretrained,
    save_checkpoint,
)

GPT2 = GPTConfig(280, 16, d_model=24, n_layers=2, n_heads=3)
LLAMA = replace(
    GPT2, n_heads=6, n_kv_heads=2, d_ff=40, norm="rms", mlp="swiglu", position="rotary", bias=False
)
MIXTURE = replace(GPT2, n_heads=6, n_kv_heads=2, position="rotary", bias=False, causal=False)
OURS = ("safetensors", "pytorch", "numpy")
CASES = [
    *((config, to) for config in (GPT2, LLAMA) for to in FORMATS),
    *((replace(config, tie_embeddings=False), to) for config in (GPT2, LLAMA) for to in FORMATS),
    *((replace(LLAMA, bias=True), to) for to in FORMATS),
    *((MIXTURE, to) for to in OURS),
]
STORY = ("ab ab abc abc 12 12 hello hello world. " * 3, 270, ["<|endoftext|>", "<|pad|>"])
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    text, vocab_size, special = STORY
    return BPETokenizer.train(text, vocab_size, special)


def made(config: GPTConfig, tokenizer: BPETokenizer | None = None) -> Pretrained:
    """A random model; with a tokenizer, also roles and a chat template."""
    roles = None
    if tokenizer:
        end, pad = tokenizer.special_tokens.values()
        roles = Roles(end, end, pad, TEMPLATE)
    return Pretrained.of(randomised(GPT(config)), tokenizer, roles)


def weights_of(pretrained: Pretrained) -> dict[str, torch.Tensor]:
    return {name: pretrained.read(name) for name in pretrained.shapes}


def assert_same_weights(actual: Pretrained, expected: dict[str, torch.Tensor]) -> None:
    assert actual.shapes.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual.read(name), tensor), name


# ---------------------------------------------------------------------------------- read back by us


@pytest.mark.parametrize(("config", "to"), CASES)
def test_every_format_comes_back_bit_for_bit(config, to, tokenizer, tmp_path):
    model = made(config, tokenizer)
    sizes = export(model, tmp_path / "out", to)
    assert sizes == {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    again = open_pretrained(tmp_path / "out")
    assert again.config == config
    assert again.roles == model.roles
    assert again.tokenizer.merges == tokenizer.merges
    assert again.tokenizer.vocab == tokenizer.vocab
    assert again.tokenizer.special_tokens == tokenizer.special_tokens
    assert_same_weights(again, weights_of(model))
    ids = torch.arange(2 * 16).view(2, 16)
    with torch.no_grad():
        assert torch.equal(load_pretrained(tmp_path / "out")[0](ids), as_model(model)(ids))


def as_model(pretrained: Pretrained) -> GPT:
    model = GPT(pretrained.config).eval()
    model.load_state_dict(weights_of(pretrained))
    return model


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("to", FORMATS)
def test_half_the_size_is_rounded_once(to, dtype, tmp_path):
    model = made(GPT2)
    if (to, dtype) == ("numpy", "bfloat16"):
        with pytest.raises(ExportError, match="NumPy has no bfloat16"):
            export(model, tmp_path / "out", to, dtype)
        return
    whole = export(model, tmp_path / "whole", to)
    half = export(model, tmp_path / "out", to, dtype)
    assert sum(half.values()) < 0.7 * sum(whole.values())
    expected = weights_of(model)
    for name, tensor in expected.items():
        exact = to == "gguf" and (tensor.dim() == 1 or name.startswith("position"))
        expected[name] = tensor if exact else tensor.to(DTYPES[dtype]).float()
    assert_same_weights(open_pretrained(tmp_path / "out"), expected)
    assert load_pretrained(tmp_path / "out")[1] is None


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_from_any_format_to_any_other(first, second, tokenizer, tmp_path):
    model = made(LLAMA, tokenizer)
    export(model, tmp_path / "a", first)
    export(open_pretrained(tmp_path / "a"), tmp_path / "b", second)
    again = open_pretrained(tmp_path / "b")
    assert_same_weights(again, weights_of(model))
    assert (again.roles, again.tokenizer.vocab) == (model.roles, tokenizer.vocab)


def test_what_transformers_wrote_goes_through_us_and_back(tmp_path):
    theirs = gpt2()
    theirs.save_pretrained(tmp_path / "a")
    export(open_pretrained(tmp_path / "a"), tmp_path / "b", "numpy")
    export(open_pretrained(tmp_path / "b"), tmp_path / "c", "transformers")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


# --------------------------------------------------------------------- read by their own frameworks


@pytest.mark.parametrize(("config", "to"), [case for case in CASES if case[1] == "transformers"])
def test_transformers_loads_it_offline(config, to, tokenizer, tmp_path):
    model = made(config, tokenizer)
    export(model, tmp_path / "out", to)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", local_files_only=True, output_loading_info=True
    )
    assert not any(report.values()), report
    assert theirs.generation_config.eos_token_id == model.roles.eos
    assert theirs.config.tie_word_embeddings == config.tie_embeddings
    assert_same_logits(as_model(model), theirs.eval(), config.vocab_size)


@pytest.fixture(scope="module")
def smollm2():
    return open_pretrained("smollm2-135m")


@pytest.mark.parametrize("which", ["gpt2", "smollm2", "own"])
def test_auto_tokenizer_gives_our_ids(which, smollm2, tokenizer, tmp_path):
    ours, roles = {
        "gpt2": lambda: (BPETokenizer.gpt2(), Roles.usual(BPETokenizer.gpt2())),
        "smollm2": lambda: (smollm2.tokenizer, smollm2.roles),
        "own": lambda: (tokenizer, Roles(268, 268, 269, TEMPLATE)),
    }[which]()
    config = replace(GPT2, vocab_size=ours.vocab_size, d_model=6, n_layers=1)
    export(Pretrained.of(GPT(config), ours, roles), tmp_path / "out", "transformers")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    special = "".join(ours.special_tokens)
    for text in [*strings(300), f"a{special} b", special * 2]:
        ids = ours.encode(text, allowed_special="all")
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids) == ours.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (roles.bos, roles.eos)
    assert theirs.pad_token_id == roles.pad
    assert theirs.chat_template == roles.chat_template
    again = open_pretrained(tmp_path / "out")
    assert (again.tokenizer.vocab, again.roles) == (ours.vocab, roles)


@pytest.mark.parametrize(("config", "to"), [case for case in CASES[:20] if case[1] == "gguf"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gguf_is_read_by_its_own_package_and_transformers(config, to, dtype, tokenizer, tmp_path):
    # Of a GPT-2, transformers does not read the context and takes 1,024.
    model = made(replace(config, context_length=1024), tokenizer)
    export(model, tmp_path / "out", to, dtype)
    file = tmp_path / "out" / "model.gguf"
    fields = gguf.GGUFReader(file).fields
    family = "llama" if config.norm == "rms" else "gpt2"
    expected = {
        "general.architecture": family,
        "general.file_type": {"float32": 0, "float16": 1}[dtype],
        f"{family}.block_count": config.n_layers,
        f"{family}.attention.head_count": config.n_heads,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": model.roles.eos,
        "tokenizer.chat_template": TEMPLATE,
    }
    assert {key: fields[key].contents() for key in expected} == expected
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert tokens[268:271] == ["<|endoftext|>", "<|pad|>", "[PAD270]"]
    assert [kinds[i] for i in (0, 267, 268, 269, 270, 279)] == [1, 1, 3, 3, 5, 5]
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    assert_same_logits(load_pretrained(file)[0], theirs.eval(), config.vocab_size)


def test_numpy_and_pytorch_read_theirs_without_running_code(tmp_path):
    model = made(MIXTURE)
    expected = weights_of(model)
    export(model, tmp_path / "np", "numpy")
    export(model, tmp_path / "pt", "pytorch")
    with np.load(tmp_path / "np" / "model.npz", allow_pickle=False) as arrays:
        assert GPTConfig(**json.loads(arrays["gpt_config.json"])) == MIXTURE
        assert {*arrays} == {*expected, "gpt_config.json"}
        for name, tensor in expected.items():
            assert arrays[name].tobytes() == tensor.numpy().tobytes(), name
    table = torch.load(tmp_path / "pt" / "model.pt", weights_only=True)
    assert GPTConfig(**table["gpt_config"]) == MIXTURE
    GPT(MIXTURE).load_state_dict(table["state_dict"])
    for name, tensor in expected.items():
        assert torch.equal(table["state_dict"][name], tensor), name


def test_smollm2_goes_through_gguf_unchanged(smollm2, capsys, tmp_path):
    """The real one, as the command line writes it: 540 MB in float32."""
    arguments = ["convert", "smollm2-135m", "--to", "gguf", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("model.gguf  540 MB")
    assert lines[1].startswith("540 MB in ")
    again = open_pretrained(tmp_path / "out")
    assert again.config == smollm2.config == PRESETS["smollm2-135m"]
    assert again.roles == smollm2.roles
    assert again.roles.chat_template.startswith("{% for message in messages %}")
    assert (again.roles.bos, again.roles.eos, again.roles.pad) == (1, 2, 2)
    assert again.tokenizer.vocab == smollm2.tokenizer.vocab
    assert again.tokenizer.special_tokens == smollm2.tokenizer.special_tokens
    ids = torch.tensor([again.tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        assert torch.equal(load_pretrained(tmp_path / "out")[0](ids), as_model(smollm2)(ids))


# --------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_from_elsewhere(tokenizer, tmp_path):
    """A fine-tuned model whose checkpoint holds weights alone."""
    export(made(GPT2, tokenizer), tmp_path / "base", "transformers")
    save_checkpoint(as_model(made(GPT2)), tmp_path / "mine.safetensors")
    mine = open_pretrained(tmp_path / "mine.safetensors")
    assert mine.tokenizer is None
    for source in (tmp_path / "base", tmp_path / "base" / "tokenizer.json"):
        both = with_tokenizer_of(mine, source)
        assert both.tokenizer.vocab == tokenizer.vocab
        assert both.roles.chat_template == TEMPLATE
    assert with_tokenizer_of(mine, "smollm2-135m").roles.eos == 2
    with pytest.raises(ExportError, match=r"mine.safetensors has no tokenizer"):
        with_tokenizer_of(mine, tmp_path / "mine.safetensors")


def test_the_trainer_s_history_comes_along(tmp_path):
    save_checkpoint(as_model(made(GPT2)), tmp_path / "final.safetensors")
    (tmp_path / "history.csv").write_text("step,loss\n1,5.5\n", encoding="utf8")
    export(open_pretrained(tmp_path / "final.safetensors"), tmp_path / "out", "gguf")
    assert (tmp_path / "out" / "history.csv").read_text(encoding="utf8") == "step,loss\n1,5.5\n"


# ------------------------------------------------------------------------------ refused in one line


def assert_refused(reason: str, *arguments, **named) -> None:
    with pytest.raises(ExportError) as caught:
        export(*arguments, **named)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("to", ["transformers", "gguf"])
def test_mixtures_that_no_foreign_family_can_say(to, tmp_path):
    reason = f"{to} can't hold this model: its mixture belongs to no family that others know"
    assert_refused(reason, made(MIXTURE), tmp_path / "out", to)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("to", ["transformers", "gguf"])
def test_tokenizers_that_others_can_not_say(to, tmp_path):
    text, vocab_size, special = STORY
    own_way = BPETokenizer.train(text, vocab_size, special, pattern=r"\s+|\S+")
    assert_refused("cuts words by a pattern of its own", made(GPT2, own_way), tmp_path / "out", to)
    twin = BPETokenizer.train(text, vocab_size, ["!", "<|pad|>"])
    assert_refused("special token '!' is written like", made(GPT2, twin), tmp_path / "out", to)
    for tokenizer in (own_way, twin):
        export(made(GPT2, tokenizer), tmp_path / "ours", "safetensors", force=True)
        again = open_pretrained(tmp_path / "ours").tokenizer
        assert (again.pattern, again.vocab) == (tokenizer.pattern, tokenizer.vocab)


def test_a_tokenizer_of_another_model(tokenizer, tmp_path):
    small = made(replace(GPT2, vocab_size=100), tokenizer)
    reason = "the tokenizer has 270 tokens, and the model 100"
    assert_refused(reason, small, tmp_path / "out", "numpy")


def test_weights_beyond_float16(tmp_path):
    model = randomised(GPT(GPT2))
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[0, 0] = 1e5
    reason = "'blocks.1.mlp.up.weight' has weights beyond the largest number of float16"
    assert_refused(reason, Pretrained.of(model), tmp_path / "out", "gguf", "float16")
    assert [*tmp_path.iterdir()] == []
    export(Pretrained.of(model), tmp_path / "out", "gguf", "bfloat16")


def test_formats_and_dtypes_that_are_not_there(tmp_path):
    for to, dtype in (("onnx", "float32"), ("gguf", "int4")):
        reason = "there are safetensors, pytorch, numpy, transformers, gguf"
        assert_refused(reason, made(GPT2), tmp_path / "out", to, dtype)
    assert (tuple(FORMATS), tuple(DTYPES)) == (cli.FORMATS, cli.DTYPES)


# ------------------------------------------------------------------------------ whole or not at all


@pytest.mark.parametrize("to", ["safetensors", "numpy", "gguf", "transformers"])
def test_one_tensor_at_a_time(to, tmp_path):
    model, alive, most = made(GPT2), [0], [0]

    def read(name: str) -> torch.Tensor:
        tensor = model.read(name).clone()
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        finalize(tensor, lambda: alive.__setitem__(0, alive[0] - 1))
        return tensor

    export(replace(model, read=read), tmp_path / "out", to)
    assert most[0] <= (3 if to in ("gguf", "transformers") else 2)  # query, key, value in one
    assert alive[0] == 0


def test_what_is_there_stays_unless_forced(tmp_path, tokenizer):
    out = tmp_path / "out"
    out.mkdir()
    export(made(GPT2, tokenizer), out, "transformers")  # an empty folder is nobody's loss
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert_refused("is there already", made(LLAMA), out, "gguf")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    export(made(LLAMA), out, "gguf", force=True)
    assert [file.name for file in out.iterdir()] == ["model.gguf"]
    (out / "thesis.txt").write_text("years of work", encoding="utf8")
    assert_refused("holds 'thesis.txt'", made(GPT2), out, "numpy", force=True)
    assert_refused("is a file", made(GPT2), out / "thesis.txt", "numpy", force=True)
    assert sorted(file.name for file in out.iterdir()) == ["model.gguf", "thesis.txt"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_source_that_breaks_leaves_what_was_there(to, tmp_path):
    model, out = made(GPT2), tmp_path / "out"
    export(made(GPT2), out, "gguf")
    before = (out / "model.gguf").read_bytes()

    def read(name: str) -> torch.Tensor:
        if name == "blocks.1.mlp.down.weight":
            raise WeightsFileError("the source is damaged")
        return model.read(name)

    with pytest.raises(WeightsFileError, match="damaged"):
        export(replace(model, read=read), out, to, force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert (out / "model.gguf").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_is_one_line(to, tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"can't write .*out: ") as caught:
            export(made(GPT2), tmp_path / "out", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert [*tmp_path.iterdir()] == []


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", os.replace
    export(made(GPT2), out, "gguf")

    def fails(source: Path, target: Path) -> None:
        if Path(source).suffix == ".part":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space left on device; name a folder on another disk"):
        export(made(GPT2), out, "numpy", force=True)
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "model.gguf"]


def test_a_place_that_can_not_be(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf8")
    with pytest.raises(OSError, match=r"can't write .*: Not a directory"):
        export(made(GPT2), tmp_path / "file" / "out", "numpy")
