"""Conversations as token ids: prompt templates, control tokens, and which tokens are learned.

    chat = ChatFormat(tokenizer)          # the model's own template, by its tokens
    chat.prompt([{"role": "user", "content": "Name a prime number."}])        # ids to go on from
    chat.example([*messages, {"role": "assistant", "content": "7"}])  # ids, and what is learned

A control token such as <|im_end|> is put there by this room and by nobody else: whatever people
type is encoded as plain text, so that a "<|im_end|>" of theirs ends no turn. Words of a template
that are no control tokens ("### Response:") can't be protected in this way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from common.pretokenizer import split_special
from common.token_formats import Roles
from common.tokenizer import END_OF_TEXT, BPETokenizer

Message = Mapping[str, str]  # {"role": "user", "content": "…"}, as everywhere
Messages = str | Sequence[Message]  # a text alone is the one message of a user
BEGIN, END = "<|im_start|>", "<|im_end|>"
SPEAKERS = ("system", "user", "assistant")


class ConversationTooLong(ValueError):
    """One message alone does not fit into the context. The message is one line, with the sizes."""


@dataclass(frozen=True)
class Template:
    """How turns are written: a layout per role, in which {} stands for what was said.

    answer:         what stands before an answer: a prompt ends with it
    controls:       what in the layouts is a control token; one stands right after each answer
    default_system: what the system says where the conversation does not
    """

    name: str
    layouts: Mapping[str, str]
    answer: str
    controls: tuple[str, ...]
    default_system: str | None = None

    @property
    def end(self) -> str:
        """The control token that ends an answer."""
        after = self.layouts["assistant"].partition("{}")[2]
        return min((c for c in self.controls if c in after), key=after.index)

    def text(self, messages: Messages) -> str:
        """A conversation as people read it, control tokens included."""
        turns = check_turns(messages, self.default_system)
        return "".join(self.layouts[t["role"]].replace("{}", t["content"], 1) for t in turns)


_CHATML = {role: f"{BEGIN}{role}\n{{}}{END}\n" for role in SPEAKERS}
CHATML = Template("chatml", _CHATML, f"{BEGIN}assistant\n", (BEGIN, END))
SMOLLM2 = Template(
    "smollm2", _CHATML, f"{BEGIN}assistant\n", (BEGIN, END),
    default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)  # fmt: skip
ALPACA = Template(  # headings as in Taori et al. 2023, Stanford Alpaca; any tokenizer has them
    "alpaca",
    {
        "system": "{}\n\n",
        "user": "### Instruction:\n{}\n\n",
        "assistant": "### Response:\n{}" + END_OF_TEXT + "\n\n",
    },
    "### Response:\n",
    (END_OF_TEXT,),
)
TEMPLATES = {template.name: template for template in (ALPACA, CHATML, SMOLLM2)}


class Example(NamedTuple):
    """A conversation to learn from."""

    ids: list[int]
    learned: list[bool]  # True for the tokens of answers, and for the one that ends each


class _Piece(NamedTuple):
    text: str
    control: bool = False
    learned: bool = False


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer and a template: conversations in, token ids out.

    template: one of `TEMPLATES`, or its name; default: the one that fits, by `template_for`
    Raises ValueError for an unknown name, and for a tokenizer that lacks the control tokens.
    """

    tokenizer: BPETokenizer
    template: Template | str | None = None
    end_id: int = field(init=False)  # the token that ends an answer

    def __post_init__(self):
        template = self.template or template_for(self.tokenizer)
        if isinstance(template, str):
            if template not in TEMPLATES:
                known = ", ".join(TEMPLATES)
                raise ValueError(f"no template is called '{template}': choose among {known}")
            template = TEMPLATES[template]
        special = self.tokenizer.special_tokens
        if missing := [token for token in template.controls if token not in special]:
            fitting = [t.name for t in TEMPLATES.values() if set(t.controls) <= special.keys()]
            use = f"use '{fitting[0]}'" if fitting else f"train one with {END_OF_TEXT}"
            raise ValueError(f"template '{template.name}' needs {missing[0]}, which this "
                             f"tokenizer has not: {use}")  # fmt: skip
        object.__setattr__(self, "template", template)
        object.__setattr__(self, "end_id", special[template.end])

    def prompt(self, messages: Messages, longest: int | None = None) -> list[int]:
        """Ids of a conversation that ends with the user, up to where the answer begins.

        longest: tokens there is room for. What does not fit is left out from the oldest turns on;
        the system prompt and the newest message stay.
        Raises ValueError for turns out of order or empty, ConversationTooLong where the newest
        message and the system prompt alone do not fit.
        """
        turns = check_turns(messages, self.template.default_system, answered=False)
        head = [turn for turn in turns if turn["role"] == "system"]
        rest = turns[len(head) :]
        while True:
            ids = self._encode(self._pieces(head + rest) + self._of_template(self.template.answer))
            if longest is None or len(ids) <= longest:
                return ids
            if len(rest) == 1:
                raise ConversationTooLong(
                    f"the newest message, with the system prompt, has {len(ids):,} tokens, and "
                    f"there is room for {max(longest, 0):,}: shorten it"
                )
            rest = rest[2:]  # the oldest question, and its answer

    def example(self, messages: Messages) -> Example:
        """Ids of a conversation that ends with an answer, and which of them are learned.

        Learned are the answers and the token that ends each, nothing else: not the questions, and
        not what the template puts after an end.
        """
        turns = check_turns(messages, self.template.default_system, answered=True)
        pieces = self._pieces(turns)
        ids, learned = [], []
        for is_learned, group in groupby(pieces, key=lambda piece: piece.learned):
            found = self._encode(list(group))
            ids += found
            learned += [is_learned] * len(found)
        return Example(ids, learned)

    def _pieces(self, turns: Sequence[Message]) -> list[_Piece]:
        """What the template and what people say, told apart."""
        pieces = []
        for turn in turns:
            before, _, after = self.template.layouts[turn["role"]].partition("{}")
            answer = turn["role"] == "assistant"
            pieces += self._of_template(before)
            pieces.append(_Piece(turn["content"], learned=answer))
            after = self._of_template(after)
            if answer:
                after[0] = after[0]._replace(learned=True)
            pieces += after
        return pieces

    def _of_template(self, text: str) -> list[_Piece]:
        split = split_special(text, self.template.controls, self.tokenizer.special_tokens)
        return [_Piece(part, control) for control, part in split]

    def _encode(self, pieces: Sequence[_Piece]) -> list[int]:
        """Control tokens by their ids; plain text between two of them in one go, as BPE is not
        the same in parts."""
        ids = []
        for control, group in groupby(pieces, key=lambda piece: piece.control):
            texts = [piece.text for piece in group]
            if control:
                ids += [self.tokenizer.special_tokens[text] for text in texts]
            else:
                ids += self.tokenizer.encode("".join(texts))
        return ids


def template_for(tokenizer: BPETokenizer, roles: Roles | None = None) -> Template:
    """The template a tokenizer was made for: ChatML where it has its tokens, else Alpaca's.

    Of ChatML, SmolLM2's own, unless `roles` of the model's file say something else.
    """
    if not {BEGIN, END} <= tokenizer.special_tokens.keys():
        return ALPACA
    written = roles.chat_template if roles else None
    return SMOLLM2 if written is None or SMOLLM2.default_system in written else CHATML


def check_turns(
    messages: Messages, default_system: str | None = None, answered: bool | None = None
) -> list[Message]:
    """The turns of a conversation, a system prompt first if there is one.

    answered: whether the last one must be the assistant's (True) or the user's (False)
    Raises ValueError, in one line, for a turn that is empty, of an unknown role, or out of order.
    """
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    if not turns:
        raise ValueError("the conversation is empty: it needs a message of the user")
    for number, turn in enumerate(turns, 1):
        turn = turn if isinstance(turn, Mapping) else {}
        role, content = turn.get("role"), turn.get("content")
        if role not in SPEAKERS:
            raise ValueError(f"message {number}: role {role!r} is none of {', '.join(SPEAKERS)}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {number} ({role}) is empty: leave it out, or say something")
    if default_system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": default_system})
    first = int(turns[0]["role"] == "system")
    for number, turn in enumerate(turns[first:]):
        expected = ("user", "assistant")[number % 2]
        if turn["role"] != expected:
            raise ValueError(
                f"turn {number + 1} is the {turn['role']}'s, it must be the {expected}'s: a system "
                "prompt may come first, then user and assistant take turns"
            )
    last, wanted = turns[-1]["role"], "assistant" if answered else "user"
    if answered is not None and last != wanted:
        raise ValueError(
            f"the conversation ends with the {last}'s turn: it must end with the {wanted}'s"
        )
    return turns
