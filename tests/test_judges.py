"""A judge is asked both ways round, says so when it can't be asked, and its wins are counted."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from test_chat_format import CHAT
from test_gpt import LLAMA, make

from common.chat_format import ChatFormat
from common.judges import QUESTION, AskingJudge, JudgeError, LocalJudge, ServerJudge, win_rate


class Scripted(AskingJudge):
    """Prefers longer answers; and, by `bias`, whatever stands first."""

    def __init__(self, bias: float = 0.0):
        self.bias, self.asked = bias, []

    def verdict(self, question: str) -> float:
        self.asked.append(question)
        a, b = question.split("Answer A: ")[1].split("\n\nAnswer B: ")
        a_longer = len(a) > len(b.split("\n\nWhich")[0])
        return min(max((0.9 if a_longer else 0.1) + self.bias, 0), 1)


def test_the_place_does_not_matter():
    for bias in (0.0, 0.1, -0.1):
        judge = Scripted(bias)
        assert judge.prefer("?", "long answer", "short") == pytest.approx(0.9)
        assert judge.prefer("?", "short", "long answer") == pytest.approx(0.1)
    first, second = judge.asked[:2]
    assert first == QUESTION.format(prompt="?", a="long answer", b="short")
    assert second == QUESTION.format(prompt="?", a="short", b="long answer")


def test_a_judge_who_only_looks_at_the_place_finds_a_tie():
    judge = Scripted()
    judge.verdict = lambda question: 1.0
    assert judge.prefer("?", "a", "b") == 0.5


def test_wins_are_counted():
    judge = Scripted()
    found = win_rate(
        judge, ["?"] * 4, ["longer", "a", "same", "longest"], ["x", "bb", "same ", "y"]
    )
    assert (found.n, found.share) == (4, 2.5 / 4)
    low, high = found.interval
    assert 0 < low < 2.5 / 4 < high < 1
    assert str(found).startswith("62.5% (")
    assert not any("same" in question for question in judge.asked), "a tie needs no judge"
    with pytest.raises(ValueError, match="1 prompts, 2 answers, 1 others"):
        win_rate(judge, ["?"], ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="one at least"):
        win_rate(judge, [], [], [])


# --- A local model


def test_a_local_model_is_asked_for_a_letter():
    """Its verdict is its probability of A beside that of B, and no other token's."""
    gpt = make(replace(LLAMA, vocab_size=CHAT.vocab_size, context_length=1000))
    judge = LocalJudge(gpt, CHAT)
    question = QUESTION.format(prompt="Hi", a="x", b="y")
    ids = torch.tensor([ChatFormat(CHAT).prompt(question)])
    with torch.no_grad():
        p = gpt(ids)[0, -1].softmax(-1)
    expected = (p[ord("A")] / (p[ord("A")] + p[ord("B")])).item()
    assert judge.verdict(question) == pytest.approx(expected, rel=1e-4)
    assert judge.prefer("Hi", "x", "y") == pytest.approx(1 - judge.prefer("Hi", "y", "x"), abs=1e-6)


# --- A server


class Server:
    """An OpenAI-compatible server of a few lines; `reply` says what it answers with."""

    def __enter__(self):
        outer, self.requests, self.reply = self, [], (200, {})

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((self.path, dict(self.headers), json.loads(body)))
                status, said = (
                    outer.reply(json.loads(body)) if callable(outer.reply) else outer.reply
                )
                content = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def completion(text: str) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def server():
    with Server() as running:
        yield running


def test_a_server_is_asked_both_ways_round(server):
    good_first = lambda asked: "Answer A: good" in asked["messages"][0]["content"]
    server.reply = lambda asked: (200, completion("A" if good_first(asked) else "The answer is B."))
    judge = ServerJudge(server.url + "/", "some-model", key="secret")
    assert judge.prefer("Why?", "good", "bad") == 1.0
    assert judge.prefer("Why?", "bad", "good") == 0.0
    path, headers, asked = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (asked["model"], asked["temperature"]) == ("some-model", 0)
    assert asked["messages"] == [
        {"role": "user", "content": QUESTION.format(prompt="Why?", a="good", b="bad")}
    ]
    assert len(server.requests) == 4


def test_a_server_that_does_not_decide_is_a_tie(server):
    server.reply = 200, completion("Both are fine.")
    judge = ServerJudge(server.url, "m")
    assert judge.prefer("?", "a", "b") == 0.5
    assert "Authorization" not in server.requests[0][1]
    server.reply = 200, completion("A")  # whatever stands first
    assert judge.prefer("?", "a", "b") == 0.5


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {"error": "no\nkey"}), "answered 401: .*key"),
        ((500, b"<h1>sorry</h1>"), "answered 500: <h1>sorry</h1>"),
        ((200, b"hello"), "answered with what is no chat completion"),
        ((200, {"choices": []}), "answered with what is no chat completion"),
        ((200, completion(None)), "answered with what is no chat completion"),
    ],
    ids=str,
)
def test_what_goes_wrong_is_one_line(server, reply, message):
    server.reply = reply
    with pytest.raises(JudgeError, match=message) as caught:
        ServerJudge(server.url, "m").prefer("?", "a", "b")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(server.url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "nonsense", "http://[/v1"])
def test_no_server_at_all(url):
    with pytest.raises(JudgeError, match=r"can't be reached: .*; is the server on") as caught:
        ServerJudge(url, "m").prefer("?", "a", "b")
    assert "\n" not in str(caught.value)
