"""The command: what it prints, what it saves, and one line for everything that can be wrong."""

import json
import subprocess
import sys

import pytest
import torch
from test_classifier import BYTES, CONFIGS
from test_classifier_training import made_up

from common.classification import BASELINES, SPAM_LABELS, fold_digits, main, tfidf_scores
from common.classifier import load_classifier
from common.gpt import GPT
from common.messages import Message, Split, distinct, divide, read_messages
from common.weights import save_checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """Options for a tiny model and for a table of 400 messages, most of them distinct."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    save_checkpoint(GPT(CONFIGS["llama"]), folder / "model.safetensors")
    BYTES.save(folder / "tokenizer.json")
    rows = "".join(f"{m.label},{m.text}\n" for m in made_up(400))
    (folder / "mine.csv").write_text("label,text\n" + rows, encoding="utf8")
    small = ["--test", "40", "--labelled", "32", "--threads", "1", "--device", "cpu"]
    return ["--model", str(folder), "--messages", str(folder / "mine.csv"), *small]


def run(capsys, *options: str) -> tuple[int, str, str]:
    status = main(list(options))
    return status, *capsys.readouterr()


# --- What it prints


def test_a_line_for_people(capsys, files):
    status, out, err = run(capsys, *files, "--method", "head")
    assert (status, err) == (0, "")
    assert out.startswith("head, 32 labelled messages (16 spam), seed 0: accuracy ")
    assert "98 parameters trained" in out
    assert out.count("\n") == 1


def test_a_line_for_programs_and_the_seed_decides(capsys, files):
    rows = []
    for seed in ("1", "1", "2"):
        status, out, _ = run(capsys, *files, "--method", "last-block", "--seed", seed, "--json")
        assert status == 0
        rows.append(json.loads(out))
        assert rows[-1].pop("seconds") > 0
        del rows[-1]["summary"]
    assert rows[0] == rows[1] != rows[2]
    low, high = rows[0]["interval"]
    assert low < rows[0]["accuracy"] <= high
    assert rows[0]["n"] == sum(map(sum, rows[0]["confusion"])) == 40
    assert rows[0]["labelled"] == 32
    assert rows[0]["labels"] == list(SPAM_LABELS)


def test_random_weights_are_other_weights(capsys, files):
    options = [*files, "--method", "head", "--json", "--seed", "3"]
    rows = [json.loads(run(capsys, *options, *more)[1]) for more in ([], ["--random-weights"])]
    assert [row["random_weights"] for row in rows] == [False, True]
    assert rows[0]["calibration_error"] != rows[1]["calibration_error"]


def test_what_is_saved_is_what_was_scored(capsys, files, tmp_path):
    out = tmp_path / "mine.safetensors"
    lora = [*files, "--json", "--out", str(out), "--validation", "0.25", "--learning-rate", "0.01"]
    model = ["--method", "last-block"]
    row = json.loads(run(capsys, *lora, *model)[1])
    split = divide(distinct([Message(*m) for m in made_up(400)]), 32, 0, 40)
    classifier = load_classifier(out)
    found = classifier.predict([m.text for m in split.test])
    right = sum(p.label == m.label for p, m in zip(found, split.test, strict=True))
    assert right / 40 == pytest.approx(row["accuracy"])


def test_what_the_head_reads_can_be_chosen(capsys, files):
    found = {}
    for pool in ("last", "mean"):
        options = [
            *files,
            "--method",
            "head",
            "--json",
            *([] if pool == "mean" else ["--pool", pool]),
        ]
        row = json.loads(run(capsys, *options)[1])
        assert row["pool"] == pool
        found[pool] = row["calibration_error"]
    assert found["last"] != found["mean"]


# --- The baseline


def test_tfidf_learns_and_knows_which_label_is_which():
    messages = made_up(200)
    split = Split(messages[:100], [], messages[100:])
    scores = tfidf_scores(split, SPAM_LABELS)
    swapped = tfidf_scores(split, SPAM_LABELS[::-1])
    assert scores.roc_auc == pytest.approx(swapped.roc_auc)
    assert scores.accuracy == swapped.accuracy > 0.5


def test_tfidf_on_real_messages(capsys):
    """Letters with folded digits are the baseline to beat; words are not."""
    found = {}
    for method in BASELINES:
        status, out, _ = run(capsys, "--method", method, "--json")
        row = json.loads(out)
        assert status == 0
        assert (row["model"], row["trained_parameters"], row["n"]) == (None, 0, 300)
        found[method] = row["accuracy"]
    assert found["tfidf-chars"] > 0.95 > found["tfidf"] > 0.9


def test_digits_are_alike():
    assert fold_digits("Call 0906-12 NOW") == "Call 0000-00 NOW"


# --- A real model


def test_a_linear_head_on_smollm2():
    """On 24 messages, and judged by 24: enough to see that pretraining is worth something."""
    split = divide(distinct(read_messages()), n_labelled=24, seed=0, n_test=24)
    assert len(split.train) == len(split.test) == 24
    options = ["--labelled", "24", "--test", "24", "--method", "head", "--json", "--threads", "1"]
    command = [sys.executable, "-m", "common.classification", *options]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    row = json.loads(ran.stdout)
    assert row["trained_parameters"] == 2 * 576 + 2
    assert row["accuracy"] >= 0.7
    assert ran.stderr == ""


# --- What can be wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labelled", "5000"], "5,000 labelled messages are asked for, and 4,015 are left"),
        (["--labelled", "1"], "no spam among the 1 labelled messages"),
        (["--labelled", "0"], "n_labelled 0"),
        (["--validation", "2"], "validation 2.0"),
        (["--messages", "nowhere.csv"], "nowhere.csv"),
        (["--model", "nowhere"], "nowhere: no such file or folder, and none of the names"),
        (["--model", "gpt2-1558m"], "gpt2-1558m"),
        (["--device", "gpu"], "no device is called 'gpu'"),
        (["--method", "head", "--rank", "4"], "--rank is 4: it is for --method lora"),
        (["--threads", "0"], "--threads is 0, it must be above 0"),
        (["--learning-rate", "-1"], "learning_rate is -1.0"),
        (["--rank", "0"], "--rank is 0: it is for --method lora, and must be above 0"),
        (["--random-weights", "--out", "c"], "without --random-weights"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_says_what_is_wrong(capsys, options, message, monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    status, out, err = run(capsys, *options)
    assert (status, out) == (1, "")
    assert err.startswith("classification: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_model_with_fewer_blocks_than_the_recipe_wants_trains_all(capsys, files):
    status, out, err = run(capsys, *files, "--method", "lora", "--rank", "1")
    assert status == 0, err
    ins_and_outs = 4 * 48 + 2 * (48 + 16) + 3 * (48 + 80)  # query, output; key, value; the MLP
    assert f"{2 * ins_and_outs + 98:,} parameters trained" in out


def test_a_place_that_cannot_be_written_is_said_before_the_training(capsys, files, tmp_path):
    out = str(tmp_path / "nowhere" / "c.safetensors")
    status, _, err = run(capsys, *files, "--method", "head", "--out", out)
    assert status == 1
    assert "nowhere" in err
    assert err.count("\n") == 1
