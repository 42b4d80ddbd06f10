"""`course chat`: a conversation in the terminal, streamed, until it is ended.

    chat = Chat(model, tokenizer, system="Answer in one sentence.", temperature=0.7)
    for text in chat.ask("Why is the sky blue?"):
        print(text, end="", flush=True)
    chat.messages  # what was said so far; chat.restart() forgets it

Ctrl-C stops an answer, and what there was of it counts as said; Ctrl-D or /quit ends the chat.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import torch

from common.chat_format import ChatFormat, Template
from common.decoding import FusedGPT
from common.device import pick_device
from common.generation import sampler
from common.gpt import GPT
from common.instruction import divide_context, stream_response
from common.lora import load_lora, merge_lora
from common.tokenizer import BPETokenizer
from common.weights import load_pretrained, open_pretrained

HELP = "/new starts over, /quit or Ctrl-D ends the chat, Ctrl-C stops an answer"


class Chat:
    """A model, and what was said so far.

    system:   what the model is told first, if anything; else what the template says
    sampling: temperature, top_k, top_p and generator, as in `generate`

    Raises ValueError for settings out of range, and for a template that does not fit.
    """

    def __init__(
        self,
        model: GPT | FusedGPT,
        tokenizer: BPETokenizer,
        *,
        system: str | None = None,
        template: Template | str | None = None,
        max_new_tokens: int | None = None,
        **sampling,
    ):
        sampler(**sampling)  # whatever is wrong with the settings is said now
        divide_context(model, max_new_tokens)
        self.model, self.tokenizer = model, tokenizer
        self.options = {"max_new_tokens": max_new_tokens, **sampling}
        self.options["template"] = ChatFormat(tokenizer, template).template
        self.system = system
        self.restart()

    def restart(self) -> None:
        """Forget everything but the system prompt."""
        system = {"role": "system", "content": self.system}
        self.messages: list[dict[str, str]] = [system] if self.system else []

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer piece by piece. If it is stopped, what there was of it counts as said;
        where there was nothing, the question was never asked. Raises as `stream_response`."""
        asked, said = {"role": "user", "content": text}, ""
        talk = [*self.messages, asked]
        try:
            for piece in stream_response(self.model, self.tokenizer, talk, **self.options):
                said += piece
                yield piece
        finally:
            if said.strip():
                self.messages = [*talk, {"role": "assistant", "content": said.strip()}]


def converse(
    chat: Chat,
    read: Callable[[str], str] = input,
    write: Callable[[str], object] = lambda text: print(text, end="", flush=True),
) -> None:
    """Read, answer, read, until /quit or the end of the input. Ctrl-C never ends it."""
    write(f"{HELP}\n")
    going = True
    while going:
        try:
            going = _take_turn(chat, read, write)
        except KeyboardInterrupt:  # while nothing was being answered
            write(f"\n({HELP})\n")
        except EOFError:
            write("\n")
            return


def _take_turn(chat: Chat, read: Callable[[str], str], write: Callable[[str], object]) -> bool:
    """One question and its answer, or a command. False: that was the last."""
    said = read("you> ").strip()
    if said == "/quit":
        return False
    if said == "/new":
        chat.restart()
        write("(a new conversation)\n")
    elif said in ("/help", "/?"):
        write(f"({HELP})\n")
    elif said:
        try:
            with closing(chat.ask(said)) as answer:
                for piece in answer:
                    write(piece)
        except KeyboardInterrupt:
            write(" [stopped]")
        except ValueError as error:
            write(f"({error})")
        write("\n")
    return True


def load_chat(
    source: str | Path,
    *,
    adapters: str | Path | None = None,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    seed: int | None = None,
    **options,
) -> Chat:
    """A chat with a pretrained model, as `course chat` begins it.

    source, tokenizer: as in `load_pretrained`; the latter for weights that come without. adapters:
    a file of `save_lora`, made beside the same weights. options: as in `Chat`. Raises what these
    raise, and ValueError for a model without a tokenizer: each in one line.
    """
    model, own = load_pretrained(source)
    own = open_pretrained(tokenizer).tokenizer if tokenizer else own
    if own is None:
        raise ValueError(
            f"{tokenizer or source} has no tokenizer: name another model's by --tokenizer"
        )
    if own.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {own.vocab_size:,} tokens and the model {model.config.vocab_size:,}"
            ": they do not belong together"
        )
    if adapters:
        merge_lora(load_lora(model, adapters))
    model.to(pick_device(device))
    weight = model.token_embedding.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        model = FusedGPT(model)
    if seed is not None:
        options["generator"] = torch.Generator(weight.device).manual_seed(seed)
    return Chat(model, own, **options)


def edit_lines() -> None:
    """Arrow keys and a history in what is typed, where the system has them."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401
