"""Adapters that are shipped are those that were judged; distances are 0 to oneself."""

from dataclasses import replace

import pytest
import torch
from test_chat_format import CHAT
from test_instruction import model
from torch.testing import assert_close

from common.alignment_models import (
    RANK,
    TEMPLATE,
    answered,
    halve_frozen,
    load_judge,
    low_precision,
    open_base,
    open_judge,
    open_policy,
    rewards,
    save_judge,
    save_policy,
    token_kl,
)
from common.chat_format import ChatFormat
from common.fine_tuning import trained_parameters
from common.gpt import GPT
from common.instruction import InstructionBatches
from common.lora import lora_parameters
from common.weights import save_checkpoint

PROMPTS, ANSWERS = ["Hi?", "Why?", "Who?"], ["Hello.", "", "I"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """A tiny model with a tokenizer that has ChatML's tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(1)
    gpt = GPT(replace(model().config, context_length=1200))  # a token is a byte: many of them
    save_checkpoint(gpt, folder / "model.safetensors")
    CHAT.save(folder / "tokenizer.json")
    return str(folder)


def moved(policy, seed: int = 0):
    """Trained, as it were."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained_parameters(policy).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return policy


def rows() -> InstructionBatches:
    return InstructionBatches(ChatFormat(CHAT, TEMPLATE), answered(PROMPTS, ANSWERS), 1)


def test_new_adapters_change_nothing_and_alone_learn(source):
    base, policy = open_base(source)[0].bfloat16(), open_policy(source)[0]
    trained = trained_parameters(policy)
    assert trained.keys() == lora_parameters(policy).keys()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = [p for p in policy.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert min(trained["blocks.0.mlp.up.lora_A"].shape) == RANK
    ids = torch.tensor([CHAT.encode("Hello there")])
    with torch.no_grad(), low_precision():
        assert_close(policy(ids), base(ids))


def test_what_is_saved_says_the_same(source, tmp_path):
    policy = moved(open_policy(source)[0])
    path = tmp_path / "mine.safetensors"
    save_policy(policy, source, path)  # rounds the policy's own
    again = open_policy(source, path)[0]
    for name, parameter in lora_parameters(policy).items():
        assert torch.equal(parameter, lora_parameters(again)[name])
        assert torch.equal(parameter, parameter.half().float())
    assert (
        path.stat().st_size < 2.1 * sum(p.numel() for p in lora_parameters(policy).values()) + 5e3
    )


def test_a_judge_is_saved_with_its_head(source, tmp_path):
    sft, path = tmp_path / "sft.safetensors", tmp_path / "judge.safetensors"
    save_policy(moved(open_policy(source)[0]), source, sft)
    judge = moved(open_judge(source, sft), seed=1)
    assert judge.n_frozen == 1, "of two blocks the last third, rounded up"
    save_judge(judge, path)
    expected = rewards(judge, PROMPTS, ANSWERS)
    assert expected.unique().numel() == 3
    assert torch.equal(rewards(load_judge(source, sft, path), PROMPTS, ANSWERS), expected)


def test_the_distance_is_that_of_whole_distributions(source):
    policy, reference = moved(open_policy(source)[0]), open_policy(source)[0]
    found, batches = token_kl(policy, reference, rows()), rows()
    assert [n for _, n in found] == [len("Hello.") + 1, len("…".encode()) + 1, 2]
    assert token_kl(policy, policy, rows()) == [(0.0, n) for _, n in found]
    inputs, targets = batches.rows[0]
    with torch.no_grad(), low_precision():
        p, q = (m(inputs[None])[0].float().log_softmax(-1) for m in (policy, reference))
    slow = sum((p[t].exp() * (p[t] - q[t])).sum() for t in (targets != -100).nonzero()[:, 0])
    assert found[0][0] == pytest.approx(slow.item(), rel=0.02)
    assert found[0][0] > 0.01


def test_halved_weights_are_those_that_do_not_learn():
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    halve_frozen(layer)
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.float32, torch.bfloat16)
