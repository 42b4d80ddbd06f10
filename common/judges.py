"""Which of two answers is better: a judge says, and is asked both ways round.

    judge = LocalJudge(model, tokenizer)                           # any GPT that can chat
    judge = ServerJudge("http://localhost:8080/v1", "model-name")  # any OpenAI-compatible server
    judge.prefer("Name a prime number.", "7", "Prime numbers are great!")  # near 1: the first
    print(win_rate(judge, prompts, answers, others))               # 61.5% (54.1 to 68.4) of 174

A reward model (`common.preference`) is a judge, too. Judges like the answer that stands first, or
last: so each pair is shown in both orders and the two verdicts are averaged (Zheng et al. 2023,
arXiv:2306.05685, section 3.4). They also like long answers; look at lengths beside win rates.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import httpx
import torch

from common.chat_format import ChatFormat, Template
from common.evaluation import evaluation_mode
from common.gpt import GPT
from common.metrics import wilson_interval
from common.tokenizer import BPETokenizer

QUESTION = """Here is a request, and two answers to it.

Request: {prompt}

Answer A: {a}

Answer B: {b}

Which answer is more correct, helpful and safe? Reply with A or B and nothing else."""


class JudgeError(RuntimeError):
    """The judge can't be asked. The message is one line: where, why."""


class Judge(Protocol):
    """Whoever can compare two answers."""

    def prefer(self, prompt: str, a: str, b: str) -> float:
        """How likely `a` is the better answer to `prompt`, from 0 to 1; 0.5 is a tie."""


class AskingJudge:
    """A judge that is shown both answers at once: in one order, then in the other."""

    def prefer(self, prompt: str, a: str, b: str) -> float:
        """How likely `a` is better: the mean of two verdicts, whose liking for a place cancels."""
        first = self.verdict(QUESTION.format(prompt=prompt, a=a, b=b))
        second = self.verdict(QUESTION.format(prompt=prompt, a=b, b=a))
        return (first + 1 - second) / 2

    def verdict(self, question: str) -> float:
        """How likely the reply to `question` is "A" and not "B"."""
        raise NotImplementedError


class LocalJudge(AskingJudge):
    """A model on this machine; the verdict is its probability of "A" beside that of "B".

    A model of 135M parameters hardly knows better than chance: measure a judge before you trust it.
    """

    def __init__(self, model: GPT, tokenizer: BPETokenizer, template: Template | str | None = None):
        self.model, self.chat = model, ChatFormat(tokenizer, template)
        self.replies = [tokenizer.encode(letter)[0] for letter in "AB"]

    @torch.no_grad()
    def verdict(self, question: str) -> float:
        ids = self.chat.prompt(question, self.model.config.context_length)
        ids = torch.tensor([ids], device=self.model.token_embedding.weight.device)
        with evaluation_mode(self.model):
            logits = self.model.head(self.model.hidden(ids)[:, -1])  # (1, C) -> (1, V)
        return logits[0, self.replies].float().softmax(-1)[0].item()


class ServerJudge(AskingJudge):
    """A model behind an OpenAI-compatible server, such as llama.cpp's or vLLM's.

    url: up to and without "/chat/completions", such as "http://localhost:8080/v1". key: where the
    server wants one. A reply without A or B is a tie. Raises JudgeError, in one line, where the
    server can't be reached, refuses, or says what is no completion.
    """

    def __init__(self, url: str, model: str, key: str | None = None, timeout: float = 60.0):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url, self.model = url.rstrip("/") + "/chat/completions", model
        self.client = httpx.Client(headers=headers, timeout=timeout)

    def verdict(self, question: str) -> float:
        asked = {"model": self.model, "temperature": 0, "max_tokens": 16}
        asked["messages"] = [{"role": "user", "content": question}]
        try:
            reply = self.client.post(self.url, json=asked)
            reply.raise_for_status()
            said = reply.json()["choices"][0]["message"]["content"]
            letters = re.findall(r"\b[AB]\b", said)
        except httpx.HTTPStatusError as why:
            code, text = why.response.status_code, " ".join(why.response.text.split())[:200]
            raise JudgeError(f"{self.url} answered {code}: {text}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as why:
            raise JudgeError(f"{self.url} can't be reached: {why}; is the server on?") from None
        except (ValueError, LookupError, TypeError):
            raise JudgeError(f"{self.url} answered with what is no chat completion") from None
        return {"A": 1.0, "B": 0.0}[letters[0]] if letters else 0.5


@dataclass(frozen=True)
class WinRate:
    """How often the one answer was preferred to the other; a tie is half a win."""

    n: int
    share: float
    interval: tuple[float, float]  # 95%: Wilson 1927, wins rounded to a whole number

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} ({low:.1%} to {high:.1%}) of {self.n}"


def win_rate(
    judge: Judge, prompts: Sequence[str], answers: Sequence[str], others: Sequence[str]
) -> WinRate:
    """How often `judge` prefers an answer to the other one. The same text twice is a tie, unasked.

    Raises ValueError unless there are as many of each, and one at least.
    """
    if not prompts or not len(prompts) == len(answers) == len(others):
        raise ValueError(
            f"{len(prompts)} prompts, {len(answers)} answers, {len(others)} others: as many of "
            "each are needed, and one at least"
        )
    wins = 0.0
    for prompt, a, b in zip(prompts, answers, others, strict=True):
        preferred = 0.5 if a.strip() == b.strip() else judge.prefer(prompt, a, b)
        wins += 0.5 if preferred == 0.5 else preferred > 0.5
    n = len(prompts)
    return WinRate(n, wins / n, wilson_interval(round(wins), n))
