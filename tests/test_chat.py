"""A chat remembers, streams, can be stopped in the middle of an answer, and ends when told to."""

import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from test_chat_format import CHAT
from test_gpt import LLAMA, make
from test_instruction import ANSWERS, NO_DECAY, TALKS, model

from common.chat import HELP, Chat, converse, load_chat
from common.chat_format import CHATML, SMOLLM2
from common.export import export
from common.instruction import fine_tune
from common.lora import add_lora, lora_parameters, save_lora
from common.training import TrainingSettings
from common.weights import Pretrained, save_checkpoint


@pytest.fixture(scope="module")
def taught():
    """A tiny model that has learned four answers by heart, also as a second question."""
    gpt = model()
    second = [[*TALKS[0], *talk] for talk in TALKS]
    settings = TrainingSettings(150, 5e-3, warmup_steps=10, **NO_DECAY)
    fine_tune(gpt, CHAT, [*TALKS, *second], settings, batch_size=8, template=CHATML, progress=False)
    return gpt


def chat_with(gpt, **options) -> Chat:
    return Chat(gpt, CHAT, **{"template": CHATML, **options})


class Terminal:
    """What is typed, line by line, and what is shown. A line may be an exception to raise."""

    def __init__(self, *lines):
        self.lines, self.shown = list(lines), ""

    def read(self, prompt: str) -> str:
        self.write(prompt)
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text: str) -> None:
        self.shown += text

    def talk(self, chat: Chat) -> str:
        converse(chat, self.read, self.write)
        return self.shown.removeprefix(HELP + "\n")


# --- The conversation


def test_it_remembers_and_starts_over(taught):
    chat = chat_with(taught)
    assert "".join(chat.ask("sky?")) == "blue"
    assert "".join(chat.ask("coal?")) == "black"
    assert chat.messages == [*TALKS[0], *TALKS[3]]
    chat.restart()
    assert chat.messages == []
    chat = chat_with(taught, system="Be brief.")
    list(chat.ask("sky?"))
    assert [turn["role"] for turn in chat.messages] == ["system", "user", "assistant"]
    chat.restart()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_an_answer_stopped_half_way_counts_as_far_as_it_got(taught):
    chat = chat_with(taught)
    answer = chat.ask("grass?")
    assert [next(answer), next(answer)] == ["g", "r"]
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": "gr"}
    assert [turn["role"] for turn in chat.messages] == ["user", "assistant"]
    before_the_first_word = chat.ask("sky?")
    before_the_first_word.close()
    assert len(chat.messages) == 2, "what was never answered was never asked"


def test_a_session_in_the_terminal(taught):
    shown = Terminal("sky?", "", "snow?", "/new", "coal?", "/help", "/quit", "never read").talk(
        chat_with(taught)
    )
    assert shown.replace("you> ", "> ") == (
        f"> blue\n> > white\n> (a new conversation)\n> black\n> ({HELP})\n> "
    )


def test_the_end_of_the_input_ends_it(taught):
    assert Terminal("sky?").talk(chat_with(taught)) == "you> blue\nyou> \n"


def test_control_c_where_nothing_is_answered_says_how_to_end(taught):
    assert Terminal(KeyboardInterrupt(), "sky?").talk(chat_with(taught)) == (
        f"you> \n({HELP})\nyou> blue\nyou> \n"
    )


def test_control_c_stops_an_answer_and_the_next_question_is_answered(taught, monkeypatch):
    from common import chat as room

    def interrupted(*arguments, **options):
        yield "gre"
        raise KeyboardInterrupt

    chat, terminal = chat_with(taught), Terminal("grass?", "sky?")
    plain = room.stream_response
    answers = iter([interrupted, plain])
    monkeypatch.setattr(room, "stream_response", lambda *a, **o: next(answers)(*a, **o))
    assert terminal.talk(chat).startswith("you> gre [stopped]\nyou> ")
    assert chat.messages[1] == {"role": "assistant", "content": "gre"}
    assert chat.messages[2] == {"role": "user", "content": "sky?"}


def test_what_is_too_long_is_said_and_nothing_is_lost(taught):
    chat = chat_with(taught, max_new_tokens=20)
    shown = Terminal("sky?", "x" * 500, "coal?").talk(chat)
    assert "(the newest message, with the system prompt, has 5" in shown
    assert shown.endswith("you> black\nyou> \n")
    assert chat.messages == [*TALKS[0], *TALKS[3]]


def test_a_long_conversation_goes_on(taught):
    chat = chat_with(taught, max_new_tokens=8)
    for _ in range(12):
        assert "".join(chat.ask("sky?"))
    assert len(chat.messages) == 24


def test_settings_that_cannot_be():
    for options, message in (
        ({"temperature": -1}, "temperature -1"),
        ({"top_p": 2}, "top_p is 2"),
        ({"max_new_tokens": 500}, "max_new_tokens is 500"),
        ({"template": "llama"}, "no template is called 'llama'"),
    ):
        with pytest.raises(ValueError, match=message):
            chat_with(model(), **options)


# --- Loading


@pytest.fixture
def folder(taught, tmp_path):
    export(Pretrained.of(taught, CHAT), tmp_path / "mine", "safetensors")
    return tmp_path / "mine"


def test_a_folder_is_loaded_with_its_tokenizer(folder):
    chat = load_chat(folder, template="chatml", temperature=0.0, device="cpu")
    assert "".join(chat.ask("sky?")) == ANSWERS["sky?"]
    assert load_chat(folder).options["template"] is SMOLLM2, "the one that fits its tokens"


def test_adapters_are_loaded_and_heard(taught, folder, tmp_path):
    import copy

    other = add_lora(copy.deepcopy(taught), rank=2)
    for parameter in lora_parameters(other).values():
        parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    save_lora(other, tmp_path / "a.safetensors")
    chat = load_chat(folder, adapters=tmp_path / "a.safetensors", template="chatml")
    expected = "".join(chat_with(other).ask("sky?"))
    assert "".join(chat.ask("sky?")) == expected != "blue"


def test_weights_alone_need_a_tokenizer(taught, folder, tmp_path):
    save_checkpoint(taught, tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match="has no tokenizer: name another model's by --tokenizer"):
        load_chat(tmp_path / "alone.safetensors")
    chat = load_chat(tmp_path / "alone.safetensors", tokenizer=folder, template="chatml")
    assert "".join(chat.ask("snow?")) == "white"
    with pytest.raises(ValueError, match=r"has 49,152 tokens and the model 259: they do not"):
        load_chat(tmp_path / "alone.safetensors", tokenizer="smollm2-135m")


def test_a_seed_says_the_same_again(folder):
    say = lambda seed: "".join(
        load_chat(folder, template="chatml", temperature=5.0, seed=seed).ask("sky?")
    )
    assert say(1) == say(1) != say(2)


# --- The command, in a process of its own


@pytest.fixture
def endless(tmp_path):
    """A model that writes on and on: random weights, and control tokens are never the likeliest."""
    gpt = make(replace(LLAMA, vocab_size=CHAT.vocab_size, context_length=50_000))
    gpt.token_embedding.weight.data[list(CHAT.special_tokens.values())] = 0
    export(Pretrained.of(gpt, CHAT), tmp_path / "endless", "safetensors")
    return tmp_path / "endless"


class Session:
    """`course chat` with pipes for a keyboard and a screen."""

    def __init__(self, *arguments: str):
        command = [sys.executable, "-c", "import sys, common.cli; sys.exit(common.cli.main())"]
        restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # may be ignored in here
        self.process = subprocess.Popen(
            [*command, "chat", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=restore,
        )  # fmt: skip
        self.shown = b""

    def type(self, text: str) -> None:
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def wait_for(self, text: str, more: int = 0, seconds: float = 60) -> bytes:
        """What is shown up to and with `text`, and `more` bytes after it; the rest stays."""
        until = time.monotonic() + seconds
        while (at := self.shown.find(text.encode())) < 0 or len(self.shown) < at + len(text) + more:
            left = until - time.monotonic()
            ready, _, _ = select.select([self.process.stdout], [], [], max(left, 0))
            assert ready, f"{text!r} was not shown, but {self.shown[-300:]!r}"
            new = os.read(self.process.stdout.fileno(), 65536)
            assert new, f"it ended: {self.process.stderr.read()!r}"
            self.shown += new
        end = at + len(text) + more
        seen, self.shown = self.shown[:end], self.shown[end:]
        return seen

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@pytest.mark.skipif(os.name == "nt", reason="pipes and signals of Unix")
def test_the_command_survives_control_c_and_ends_by_quit(endless):
    session = Session("--model", str(endless), "--temperature", "0", "--max-tokens", "49000")
    try:
        session.wait_for("you> ")
        for _ in range(2):
            session.type("Say something.\n")
            session.wait_for("", more=200)  # it is in the middle of its answer
            session.interrupt()
            session.wait_for(" [stopped]\nyou> ")
        time.sleep(0.5)  # until it is reading: a signal just before that waits for the next line
        session.interrupt()
        session.wait_for(f"({HELP})\n")
        session.wait_for("you> ")
        session.type("/new\n")
        session.wait_for("(a new conversation)\nyou> ")
        session.type("/quit\n")
        assert session.process.wait(30) == 0
        assert session.process.stderr.read() == b""
    finally:
        session.process.kill()
        session.process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="pipes of Unix")
def test_the_command_ends_with_its_input_and_breaks_no_character(endless):
    session = Session("--model", str(endless), "--seed", "1", "--temperature", "2",
                      "--max-tokens", "300")  # fmt: skip
    out, err = session.process.communicate("Grüße 😀\n".encode(), timeout=120)
    assert (session.process.returncode, err) == (0, b"")
    assert len(out.decode("utf8")) > 50
    assert out.decode("utf8").count("you> ") == 2
