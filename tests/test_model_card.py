"""Model cards: valid fields, what the files say, and nothing invented.

uv run pytest tests/test_model_card.py
"""

import re
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

from common.export import FORMATS, export
from common.gpt import GPT, GPTConfig
from common.model_card import CardFacts, model_card
from common.token_formats import Roles
from common.tokenizer import BPETokenizer
from common.weights import Pretrained, open_pretrained

TINY = GPTConfig(280, 16, d_model=24, n_layers=2, n_heads=3)
HISTORY = """step,loss,learning_rate,validation_loss,validation_bits_per_byte
1,5.6321,0.001,,
2,4.1,0.001,4.25,2.5
3,3.0004,0.001,3.5,2.125
"""


@pytest.fixture(scope="module")
def pretrained() -> Pretrained:
    tokenizer = BPETokenizer.train("ab ab abc abc hello hello", 262, ["<|endoftext|>"])
    return Pretrained.of(GPT(TINY), tokenizer, Roles(261, 261, None, "{{ messages }}"))


@pytest.mark.parametrize("to", FORMATS)
def test_the_lines_that_load_it_do_so(to, pretrained, tmp_path, monkeypatch):
    export(pretrained, tmp_path / "out", to)
    repo = f"{tmp_path}/out"
    text = model_card(tmp_path / "out", open_pretrained(tmp_path / "out"), repo, CardFacts())
    code = re.search(r"```python\n(.*)```", text, flags=re.S)[1]
    assert code.count("\n") == 3
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda path: path)  # is here already
    names = {}
    exec(code, names)  # what a reader would do
    ids = torch.tensor([[1, 2, 3]])
    actual = names["model"](ids)
    expected = GPT(TINY)
    expected.load_state_dict({name: pretrained.read(name) for name in pretrained.shapes})
    with torch.no_grad():
        torch.testing.assert_close(getattr(actual, "logits", actual), expected.eval()(ids))
    assert names["tokenizer"].decode([97, 98]) == "ab" or to == "transformers"
    assert ModelCard(text).data.tags == [to, "gpt2"]


def test_it_says_what_the_author_says(pretrained, tmp_path):
    facts = CardFacts("apache-2.0", ["en", "de"], "ada/base", ["ada/letters"])
    told = replace(pretrained, history=HISTORY)
    text = model_card(tmp_path / "final.safetensors", told, "ada/engine", facts)
    data = ModelCard(text).data.to_dict()
    assert data == {
        "license": "apache-2.0",
        "language": ["en", "de"],
        "library_name": "llm-by-coding",
        "base_model": "ada/base",
        "datasets": ["ada/letters"],
        "tags": ["safetensors", "gpt2"],
        "pipeline_tag": "text-generation",
    }
    for line in (
        "# engine",
        f"| parameters | {sum(p.numel() for p in GPT(TINY).parameters()):,} |",
        "| context | 16 tokens |",
        "| tokenizer | byte-level BPE, with a chat template |",
        "- Fine-tuned from: ada/base",
        "- Steps: 3",
        "- Loss: from 5.632 to 3.000",
        "- Validation bits per byte: from 2.500 to 2.125",
        "- Languages: en, de. Licence: apache-2.0.",
    ):
        assert line in text.splitlines()
    assert "unknown" not in text


def test_what_nobody_said_is_unknown(tmp_path):
    mixture = GPT(replace(TINY, position="none", causal=False))
    text = model_card(tmp_path / "a.npz", Pretrained.of(mixture), "ada/engine", CardFacts())
    data = ModelCard(text).data.to_dict()
    assert data == {"license": "unknown", "library_name": "llm-by-coding", "tags": ["numpy", "gpt"]}
    for line in (
        "- Fine-tuned from: unknown, or from random weights",
        "- Data: unknown",
        "- Steps and losses: unknown",
        "| tokenizer | none in these files |",
        "| architecture | a mixture of its own |",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize("history", ["", "not a table", "step,loss\n", "step,loss\n?,much\n"])
def test_a_history_that_says_nothing(history, pretrained, tmp_path):
    told = replace(pretrained, history=history)
    text = model_card(tmp_path / "a.gguf", told, "ada/engine", CardFacts())
    assert "- Steps and losses: unknown" in text.splitlines()
    assert "much" not in text
