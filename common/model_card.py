"""The model card: what a stranger must know about a model, in the README.md that goes with it.

    pretrained = open_pretrained("mine")
    print(model_card(Path("mine"), pretrained, "owner/name", CardFacts(license="apache-2.0")))

A card says what can be seen in the files and what its author has said, and nothing else: what
nobody has said is "unknown". The fields at its top are those of Hugging Face's model cards; the
idea is Mitchell et al. 2019, Model Cards for Model Reporting, arXiv:1810.03993.
"""

import csv
import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from textwrap import dedent

from huggingface_hub import ModelCardData

from common.configurations import FAMILIES, family_of
from common.weights import Pretrained

LIBRARY = "llm-by-coding"
NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")


@dataclass(frozen=True)
class CardFacts:
    """What only the author knows. Names as Hugging Face's cards have them."""

    license: str = "unknown"  # such as "apache-2.0" or "mit"
    language: list[str] = field(default_factory=list)  # such as ["en"]
    base_model: str | None = None  # "owner/name" of what it was fine-tuned from
    datasets: list[str] = field(default_factory=list)


def model_card(weights: Path, pretrained: Pretrained, repo: str, facts: CardFacts) -> str:
    """The text of README.md, in Markdown with a table of fields at its top.

    weights: the file or folder of weights, whose form decides how the model is loaded
    repo:    "owner/name", where it will be found
    """
    form = _form(weights)
    fields = ModelCardData(
        license=facts.license,
        language=facts.language or None,
        library_name={"transformers": "transformers", "gguf": "gguf"}.get(form, LIBRARY),
        base_model=facts.base_model,
        datasets=facts.datasets or None,
        tags=[form, _family(pretrained)],
        pipeline_tag="text-generation" if pretrained.config.causal else None,
    )
    sections = {
        f"# {repo.partition('/')[2]}": _description(pretrained),
        "## How it was trained": _training(pretrained.history, facts),
        "## Intended use and limits": _limits(pretrained, facts),
        "## How to load it": _loading(form, weights.name, repo),
    }
    body = "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items())
    return f"---\n{fields.to_yaml()}\n---\n\n{body}\n"


def _form(weights: Path) -> str:
    """The kind of files: transformers, gguf, or one of our own."""
    if weights.is_dir():
        if (weights / "config.json").exists():
            return "transformers"
        weights = next(file for file in sorted(weights.iterdir()) if file.suffix in OWN_FORMS)
    return OWN_FORMS.get(weights.suffix, "safetensors")


OWN_FORMS = {".safetensors": "safetensors", ".gguf": "gguf", ".npz": "numpy", ".pt": "pytorch"}


def _family(pretrained: Pretrained) -> str:
    try:
        return family_of(pretrained.config)
    except ValueError:
        return "gpt"


def _description(pretrained: Pretrained) -> str:
    config, tokenizer = pretrained.config, pretrained.tokenizer
    family = _family(pretrained)
    kind = FAMILIES[family][0] if family in FAMILIES else "its own"
    parameters = sum(map(prod, pretrained.shapes.values()))
    with_template = ", with a chat template" if pretrained.roles.chat_template else ""
    rows = {
        "parameters": f"{parameters:,}",
        "architecture": f"that of {kind}" if family in FAMILIES else "a mixture of its own",
        "layers, heads, key/value heads": f"{config.n_layers}, {config.n_heads}, "
        f"{config.n_kv_heads}",
        "width, feed-forward width": f"{config.d_model:,}, {config.d_ff:,}",
        "norm, MLP, positions": f"{config.norm}, {config.mlp}, {config.position}",
        "context": f"{config.context_length:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "tokenizer": f"byte-level BPE{with_template}" if tokenizer else "none in these files",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"A decoder-only language model.\n\n| | |\n| --- | --- |\n{table}"


def _training(history: str | None, facts: CardFacts) -> str:
    """From what the author says, and the table that the trainer leaves beside its weights."""
    lines = [
        f"- Fine-tuned from: {facts.base_model or 'unknown, or from random weights'}",
        f"- Data: {', '.join(facts.datasets) or 'unknown'}",
    ]
    measured = []
    rows = list(csv.DictReader((history or "").splitlines()))
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows if row[name] and NUMBER.fullmatch(row[name])]
        if values and name == "step":
            measured.append(f"- Steps: {values[-1]}")
        elif values and any(word in name for word in ("loss", "perplexity", "bits")):
            what = name.replace("_", " ").capitalize()
            measured.append(f"- {what}: from {float(values[0]):.3f} to {float(values[-1]):.3f}")
    return "\n".join(lines + (measured or ["- Steps and losses: unknown"]))


def _limits(pretrained: Pretrained, facts: CardFacts) -> str:
    config = pretrained.config
    languages = ", ".join(facts.language) or "unknown"
    return dedent(f"""\
        - Written for learning how language models work. It was not tested for any other use.
        - Languages: {languages}. Licence: {facts.license}.
        - It reads at most {config.context_length:,} tokens at a time.
        - It writes what is likely, not what is true, and repeats the biases of what it has read.
          Nothing in these files filters what it writes.""")


def _loading(form: str, name: str, repo: str) -> str:
    """Three lines that work once the files are where `repo` says."""
    code = {
        "transformers": f"""\
            from transformers import AutoModelForCausalLM, AutoTokenizer
            tokenizer = AutoTokenizer.from_pretrained("{repo}")
            model = AutoModelForCausalLM.from_pretrained("{repo}")""",
        "gguf": f"""\
            from huggingface_hub import snapshot_download
            from common.weights import load_pretrained  # or a program built on llama.cpp
            model, tokenizer = load_pretrained(snapshot_download("{repo}"))""",
    }
    own = code["gguf"].replace("or a program built on llama.cpp", "the course's library")
    return f"```python\n{dedent(code.get(form, own))}\n```"
