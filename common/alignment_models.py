"""The models of chapter 7: one base, adapters for each step of the way, answers in low precision.

    policy, tokenizer = open_policy("smollm2-135m", "sft.safetensors")  # adapters go on learning
    with low_precision():
        answers = respond_all(policy, tokenizer, prompts, template=TEMPLATE)
    save_policy(policy, "smollm2-135m", "dpo.safetensors")  # adapters alone, as `load_lora` wants

Frozen weights are kept in bf16, adapters learn in fp32, products are computed in bf16: several
times faster on a CPU that can, and half the memory. SFT, DPO and PPO train the same adapters one
after the other, so that each file stands for itself beside the base.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from common.fine_tuning import trained_parameters
from common.gpt import GPT
from common.instruction import InstructionBatches
from common.instruction_data import conversation
from common.lora import (
    add_lora,
    fill,
    load_lora,
    lora_parameters,
    lora_settings,
    merge_lora,
    read_tensors,
    save_lora,
    write_tensors,
)
from common.losses import IGNORED
from common.rewards import RewardModel
from common.tokenizer import BPETokenizer
from common.weights import load_pretrained

TEMPLATE = "chatml"  # SmolLM2's own without its system prompt: a third fewer tokens
RANK, ALPHA = 4, 16.0
UNTRAINED = 1 / 3  # of the blocks, from the first on, have no adapters; of a reward model 2 / 3


@contextmanager
def low_precision() -> Iterator[None]:
    """Products in bf16, wherever fp32 and bf16 meet. No weights may change inside."""
    with torch.autocast("cpu", torch.bfloat16):
        yield


def halve_frozen(model: torch.nn.Module) -> torch.nn.Module:
    """Frozen weights to bf16, in place; what learns stays fp32. Returns the model."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model.eval()


def open_base(source: str) -> tuple[GPT, BPETokenizer]:
    """A pretrained model in fp32. ValueError: it comes without a tokenizer."""
    gpt, tokenizer = load_pretrained(source)
    if tokenizer is None:
        raise ValueError(f"{source} comes without a tokenizer: choose another model")
    return gpt.requires_grad_(False), tokenizer


def put_adapters(gpt: GPT, untrained: float, seed: int) -> GPT:
    """Freeze the model and put adapters beside all matrices of the upper blocks, in place."""
    generator, first = torch.Generator().manual_seed(seed), int(untrained * gpt.config.n_layers)
    add_lora(gpt.requires_grad_(False).blocks[first:], RANK, ALPHA, generator=generator)
    return gpt


def open_policy(
    source: str, adapters: str | Path | None = None, seed: int = 0
) -> tuple[GPT, BPETokenizer]:
    """The base with the adapters of a file, or with new ones, which change nothing yet."""
    gpt, tokenizer = open_base(source)
    gpt = load_lora(gpt, adapters) if adapters else put_adapters(gpt, UNTRAINED, seed)
    return halve_frozen(gpt), tokenizer


@torch.no_grad()
def round_trained(model: torch.nn.Module) -> torch.nn.Module:
    """What was trained at the precision of fp16, in place, still stored in fp32."""
    for parameter in trained_parameters(model).values():
        parameter.copy_(parameter.half())
    return model


@torch.no_grad()
def save_policy(policy: GPT, source: str, path: str | Path) -> None:
    """Round the adapters to fp16, in place, and write them: what is judged is what is shipped."""
    round_trained(policy)
    fresh, settings = open_base(source)[0], lora_settings(policy)
    add_lora(fresh, settings["rank"], settings["alpha"], settings["targets"])
    fill(lora_parameters(fresh), lora_parameters(policy))
    for parameter in lora_parameters(fresh).values():
        parameter.data = parameter.data.half()
    save_lora(fresh, path)


# ------------------------------------------------------------------------------- reward models


def open_judge(source: str, sft: str | Path, seed: int = 0) -> RewardModel:
    """An untrained reward model on the fine-tuned model, with adapters in its last third."""
    gpt, tokenizer = open_base(source)
    put_adapters(merge_lora(load_lora(gpt, sft)), 2 / 3, seed)
    return halve_frozen(RewardModel(gpt, tokenizer, TEMPLATE))


def save_judge(judge: RewardModel, path: str | Path) -> None:
    """Round adapters and head to fp16, in place, and write them."""
    tensors = {name: p.half() for name, p in trained_parameters(round_trained(judge)).items()}
    write_tensors(path, tensors, {"reward_model": "adapters and head"})


def load_judge(source: str, sft: str | Path, path: str | Path) -> RewardModel:
    """What `save_judge` wrote, beside the same fine-tuned model. Raises as `read_tensors`."""
    judge = open_judge(source, sft)
    fill(trained_parameters(judge), read_tensors(path)[1])
    return judge


# ------------------------------------------------------------------------------------- distance


@torch.no_grad()
def token_kl(policy: GPT, reference: GPT, batches: InstructionBatches) -> list[tuple[float, int]]:
    """How far a policy has strayed on each conversation: KL in nats over its answer, and tokens.

    Not of the drawn tokens alone: at each place of the answer, over the whole vocabulary.
    """
    found = []
    for inputs, targets in batches.rows:
        learned = targets != IGNORED
        with low_precision():
            p, q = (
                model.head(model.hidden(inputs[None])[0, learned]).float().log_softmax(-1)
                for model in (policy, reference)
            )  # (R, V)
        found.append(((p.exp() * (p - q)).sum().item(), len(p)))
    return found


def answered(prompts: Sequence[str], answers: Sequence[str]) -> list[list[dict[str, str]]]:
    """Conversations; an empty answer, which no template takes, becomes an ellipsis."""
    return [conversation(p, a.strip() or "…") for p, a in zip(prompts, answers, strict=True)]


def rewards(judge: RewardModel, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
    """What a judge gives to answers in words, (N,)."""
    with low_precision():
        return judge.rewards(answered(prompts, answers), 32)
