"""Instruction fine-tuning: a model that goes on with text becomes one that answers.

    add_lora(model, rank=8)                       # or leave it out: then all weights learn
    talks = [entry.messages for entry in read_instructions(split="train")]
    fine_tune(model, tokenizer, talks, TrainingSettings(200, 3e-4, warmup_steps=20))
    respond(model, tokenizer, "Name a prime number.")
    for text in stream_response(model, tokenizer, messages): print(text, end="", flush=True)

The loss is that of the next token, as ever; but only answers and their ends count (Wei et al. 2022,
arXiv:2109.01652; Ouyang et al. 2022, arXiv:2203.02155). B batch, T tokens.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common.chat_format import ChatFormat, Example, Messages, Template
from common.evaluation import evaluate_loss
from common.fine_tuning import by_length, fit
from common.generation import generate, stream
from common.gpt import GPT
from common.history import History
from common.losses import IGNORED, linear_cross_entropy
from common.tokenizer import BPETokenizer
from common.training import TrainingSettings

BLUR = 0.05  # of lengths: instructions are many, and about equally long

# ---------------------------------------------------------------------------------------- learning


def learnable(example: Example) -> tuple[Tensor, Tensor]:
    """What the model reads, and what it should say after each token: (T,) and (T,) of ids.

    A target is -100 where nothing is learned. What comes after the last learned token is cut off.
    """
    end = len(example.learned) - example.learned[::-1].index(True)
    ids, learned = torch.tensor(example.ids[:end]), torch.tensor(example.learned[:end])
    return ids[:-1], ids[1:].masked_fill(~learned[1:], IGNORED)


class InstructionBatches:
    """Batches of (inputs, targets), (B, T) each, conversations of similar length together.

    Filled up at the right: inputs by 0, which no real token sees, targets by -100, which no loss
    counts. Each pass is one epoch; with a generator every epoch has other batches.
    Raises ValueError for a conversation that does not end with an answer, or is longer than
    `longest` tokens.
    """

    def __init__(
        self,
        chat: ChatFormat,
        conversations: Iterable[Messages],
        batch_size: int,
        generator: torch.Generator | None = None,
        longest: int | None = None,
    ):
        self.rows = []
        for number, messages in enumerate(conversations, 1):
            try:
                row = learnable(chat.example(messages))
            except ValueError as why:
                raise ValueError(f"conversation {number}: {why}") from None
            if longest is not None and len(row[0]) > longest:
                raise ValueError(
                    f"conversation {number} has {len(row[0]):,} tokens, and the context "
                    f"{longest:,}: shorten it, or leave it out"
                )
            self.rows.append(row)
        self.batch_size, self.generator = batch_size, generator
        self.lengths = [len(inputs) for inputs, _ in self.rows]

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for places in by_length(self.lengths, self.batch_size, self.generator, BLUR):
            inputs, targets = zip(*(self.rows[i] for i in places), strict=True)
            yield (
                pad_sequence(inputs, batch_first=True),
                pad_sequence(targets, batch_first=True, padding_value=IGNORED),
            )


def response_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of what is learned, () in nats per token: the mean over a batch's targets.

    Equal to `next_token_loss`, which would compute the logits of questions, too.
    """
    learned = targets != IGNORED
    return linear_cross_entropy(model.hidden(inputs)[learned], model.head.weight, targets[learned])


def fine_tune(
    model: GPT,
    tokenizer: BPETokenizer,
    conversations: Iterable[Messages],
    settings: TrainingSettings,
    *,
    batch_size: int = 8,
    validation: Iterable[Messages] = (),
    template: Template | str | None = None,
    seed: int = 0,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> History:
    """Teach a model to answer, in place; returns what happened on the way.

    Whatever of the model is not frozen learns: everything, or adapters after `add_lora`. With
    `validation` conversations the weights of the best look at them are kept; `settings` say how
    often to look. progress and report as in `train`. Raises ValueError as `InstructionBatches`.
    """
    chat, generator = ChatFormat(tokenizer, template), torch.Generator().manual_seed(seed)
    longest = model.config.context_length
    batches = InstructionBatches(chat, conversations, batch_size, generator, longest)
    held_out = InstructionBatches(chat, validation, batch_size, longest=longest)
    look = lambda model: evaluate_loss(model, held_out, response_loss)
    return fit(
        model, batches, response_loss, settings,
        look=look if held_out.rows else None, progress=progress, report=report,
    )  # fmt: skip


# --------------------------------------------------------------------------------------- answering


def stream_response(
    model: GPT,
    tokenizer: BPETokenizer,
    messages: Messages,
    *,
    max_new_tokens: int | None = None,
    template: Template | str | None = None,
    **sampling,
) -> Iterator[str]:
    """Yields the answer to a conversation piece by piece, each of complete characters.

    It ends with the token that ends answers, at any other control token, or after `max_new_tokens`
    (default: 256, or half of the context where that is less).
    sampling: temperature, top_k, top_p and generator, as in `generate`; greedy by default. A
    conversation that does not fit loses its oldest turns, see `ChatFormat.prompt`.
    Raises ValueError for `max_new_tokens` that leave no room to ask, and what `prompt` raises.
    """
    chat = ChatFormat(tokenizer, template)
    room, most = divide_context(model, max_new_tokens)
    ids = chat.prompt(messages, room)
    tokens = stream(model, [ids], most, eos_id=chat.end_id, **sampling)
    yield from characters(tokenizer, (token.item() for token in tokens))


def respond(model: GPT, tokenizer: BPETokenizer, messages: Messages, **options) -> str:
    """The whole answer to a conversation. Arguments as in `stream_response`."""
    return "".join(stream_response(model, tokenizer, messages, **options)).strip()


def respond_all(
    model: GPT,
    tokenizer: BPETokenizer,
    conversations: Sequence[Messages],
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    template: Template | str | None = None,
    progress: Callable[[Iterable], Iterable] = lambda batches: batches,
    **sampling,
) -> list[str]:
    """An answer to each conversation, in their order, `batch_size` at a time; greedy by default.

    The same as `respond`, one by one, and several times faster. progress: such as `tqdm`.
    """
    chat, (room, most) = ChatFormat(tokenizer, template), divide_context(model, max_new_tokens)
    prompts = [chat.prompt(messages, room) for messages in conversations]
    answers = [""] * len(prompts)
    for places in progress(by_length([len(ids) for ids in prompts], batch_size)):
        rows = [prompts[i] for i in places]
        ids = generate(model, rows, most, eos_id=chat.end_id, **sampling)
        for place, row in zip(places, ids[:, max(map(len, rows)) :].tolist(), strict=True):
            answers[place] = "".join(characters(tokenizer, row)).strip()
    return answers


def characters(tokenizer: BPETokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come, up to the first control token.

    A character may take several tokens: it is yielded when its last byte is there. Bytes that are
    no UTF-8 become U+FFFD.
    """
    special = set(tokenizer.special_tokens.values())
    decoder = codecs.getincrementaldecoder("utf8")(errors="replace")
    for token in takewhile(lambda token: token not in special, ids):
        if text := decoder.decode(tokenizer.vocab.get(token, b"")):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def divide_context(model: GPT, max_new_tokens: int | None) -> tuple[int, int]:
    """The most tokens that a prompt may have, and its answer, so that both fit the context.

    max_new_tokens: of the answer; None: 256, or half of the context where that is less.
    """
    context = model.config.context_length
    most = min(256, context // 2) if max_new_tokens is None else max_new_tokens
    if not 0 < most < context:
        raise ValueError(
            f"max_new_tokens is {most}: it must be above 0, and below the context of {context:,}, "
            "so that there is room for the question"
        )
    return context - most, most
