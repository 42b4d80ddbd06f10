"""Texts become a tokenizer and shards, once; what is held out is nowhere else."""

import json

import numpy as np
import pytest
import torch

from common import corpus, pretraining_data
from common.corpus import Document
from common.pretraining_data import (
    HELD_OUT_PLAYS,
    Texts,
    open_data,
    prepare,
    shakespeare,
    windows_in_order,
)
from common.tokenizer import END_OF_TEXT, BPETokenizer

STORY = "\n".join(f"Line {n}: the sea was calm, and {n * n} gulls sat on it." for n in range(200))


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(STORY, encoding="utf8")
    return str(path)


def text_of(documents) -> str:
    return "\n".join(document.text for document in documents())


def test_the_last_tenth_of_a_file_is_held_out_at_the_end_of_a_line(story):
    train, validation = Texts([story]).sides()
    assert text_of(train) + text_of(validation) == STORY
    assert text_of(train).endswith("\n")
    assert 0.08 < len(text_of(validation)) / len(STORY) < 0.13
    assert text_of(train) == text_of(train), "it can be read again"


def test_one_document_in_ten_of_a_folder_or_of_json_lines_is_held_out(tmp_path):
    texts = [f"Document {n} is like no other." for n in range(300)]
    (tmp_path / "folder").mkdir()
    for n, text in enumerate(texts):
        (tmp_path / "folder" / f"{n:03}.txt").write_text(text)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "odd[1].jsonl").write_text(lines)
    for name in ("folder", "odd[1].jsonl"):
        sides = Texts([str(tmp_path / name)]).sides()
        train, validation = ({document.text for document in side()} for side in sides)
        assert train | validation == set(texts)
        assert not train & validation
        assert 15 < len(validation) < 50


def test_validation_files_are_taken_as_they_are(story, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Something else.")
    train, validation = Texts([story], [str(other)]).sides()
    assert (text_of(train), text_of(validation)) == (STORY, "Something else.")


def test_three_plays_are_held_out():
    train, validation = shakespeare()
    assert {play.name for play in validation()} == set(HELD_OUT_PLAYS)
    assert len(train()) == 35
    assert not {play.name for play in train()} & set(HELD_OUT_PLAYS)


def test_docstrings_are_split_by_file_and_without_copies(monkeypatch):
    documents = [
        Document(f"p/f{n}.py:{m}", f"Function {n} {m} does " + f"what {n} times {m} asks for. " * 9)
        for n in range(100)
        for m in range(2)
    ]
    documents.append(Document("p/copy.py", documents[0].text))
    monkeypatch.setattr(corpus, "harvest_docstrings", lambda: iter(documents))
    sides = [list(side()) for side in pretraining_data.docstrings()]
    files = [{document.name.partition(":")[0] for document in side} for side in sides]
    assert not files[0] & files[1]
    assert files[1], "something is held out"
    texts = [document.text for side in sides for document in side]
    assert len(texts) == len(set(texts)) > 0


def test_prepared_once_then_opened(story, tmp_path):
    folder = prepare(tmp_path / "run", Texts([story]), vocab_size=300)
    data = open_data(folder)
    assert data.tokenizer.vocab_size == 300
    stream = np.concatenate(data.validation.arrays)
    end = data.tokenizer.special_tokens[END_OF_TEXT]
    held_out = data.tokenizer.decode([i for i in stream.tolist() if i != end])
    assert STORY.endswith(held_out)
    assert data.bytes_per_token == pytest.approx(len(held_out.encode()) / len(stream))
    assert data.characters_per_token == pytest.approx(len(held_out) / len(stream))
    merges = {a + b for a, b in data.tokenizer.merges}
    assert merges <= {STORY[i:j].encode() for i in range(9000) for j in range(i, i + 12)}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    prepare(folder, Texts([story]), vocab_size=300)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_what_a_killed_run_left_is_made_again(story, tmp_path):
    folder = prepare(tmp_path / "run", Texts([story]), vocab_size=300)
    identity = open_data(folder).identity
    (folder / "data.json").unlink()
    (folder / "shards" / "train" / "shard_00000.bin").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="its data is incomplete"):
        open_data(folder)
    assert open_data(prepare(folder, Texts([story]), vocab_size=300)).identity == identity


def test_a_tokenizer_may_be_given(story, tmp_path):
    tokenizer = BPETokenizer.train("gulls sat on the sea", 265, [END_OF_TEXT])
    folder = prepare(tmp_path / "run", Texts([story]), tokenizer=tokenizer)
    assert open_data(folder).tokenizer.vocab == tokenizer.vocab
    other = BPETokenizer.train("something else entirely", 265, [END_OF_TEXT])
    with pytest.raises(ValueError, match="holds the data of another tokenizer"):
        prepare(folder, Texts([story]), tokenizer=other)
    with pytest.raises(ValueError, match="holds the data of another vocabulary size"):
        prepare(folder, Texts([story]), vocab_size=300)


def test_another_text_is_noticed_under_the_same_name(story, tmp_path):
    folder = prepare(tmp_path / "run", Texts([story]), vocab_size=300)
    with open(story, "a") as file:
        file.write(".")
    with pytest.raises(ValueError, match="holds the data of another text"):
        prepare(folder, Texts([story]), vocab_size=300)


@pytest.mark.parametrize(
    ("names", "validation", "says"),
    [
        (["nothing.txt"], [], "nothing.txt: no such file, and no corpus (shakespeare, docstrings)"),
        (["shakespeare", "docstrings"], [], "stands alone"),
        (["shakespeare"], ["docstrings"], "stands alone"),
    ],
)
def test_texts_that_can_not_be(names, validation, says):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  what it says is compared below
        Texts(names, validation)
    assert says in str(refusal.value)


def test_a_folder_with_nothing_to_hold_out_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("One document.")
    with pytest.raises(ValueError, match="pass --validation FILE"):
        prepare(tmp_path / "run", Texts([str(tmp_path / "texts")]), vocab_size=260)
    assert not (tmp_path / "run" / "data.json").exists()


def test_a_damaged_record_is_refused(story, tmp_path):
    folder = prepare(tmp_path / "run", Texts([story]), vocab_size=300)
    for text in ("", "[]", '{"text": 1}'):
        (folder / "data.json").write_text(text)
        with pytest.raises(ValueError, match=r"data\.json is damaged; remove it"):
            open_data(folder)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("context_length", [1, 7, 64])
def test_every_token_is_a_target_once(batch_size, context_length, story, tmp_path):
    data = open_data(prepare(tmp_path / "run", Texts([story]), vocab_size=300))
    stream = np.concatenate(data.validation.arrays)
    batches = windows_in_order(data.validation, batch_size, context_length)
    assert {inputs.shape for inputs, _ in batches} == {(batch_size, context_length)}
    inputs, targets = (torch.cat(part).flatten() for part in zip(*batches, strict=True))
    real = targets != -100
    assert targets[real].tolist() == stream[1:].tolist()
    assert inputs[real].tolist() == stream[:-1].tolist()


def test_a_part_of_the_windows_lies_all_over_the_text(story, tmp_path):
    data = open_data(prepare(tmp_path / "run", Texts([story]), vocab_size=300))
    everything = torch.cat([inputs for inputs, _ in windows_in_order(data.validation, 1, 8)])
    chosen = torch.cat([inputs for inputs, _ in windows_in_order(data.validation, 1, 8, 40)])
    assert len(chosen) == 5
    assert torch.equal(chosen[[0, -1]], everything[[0, -1]])


def test_ranks_share_the_windows_and_have_equally_many_batches(story, tmp_path, monkeypatch):
    data = open_data(prepare(tmp_path / "run", Texts([story]), vocab_size=300))
    monkeypatch.setattr(pretraining_data.distributed, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(pretraining_data.distributed, "rank", lambda rank=rank: rank)
        shares.append(windows_in_order(data.validation, 2, 16))
    assert len({len(share) for share in shares}) == 1
    targets = torch.cat([targets.flatten() for share in shares for _, targets in share])
    expected = np.concatenate(data.validation.arrays)[1:]
    assert sorted(targets[targets != -100].tolist()) == sorted(expected.tolist())
