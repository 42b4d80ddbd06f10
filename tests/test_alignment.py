"""The command runs all stages on a tiny model, goes on where it was, and says what is wrong."""

import pytest
import torch
from test_alignment_models import source  # noqa: F401

from common.alignment import STAGES, main
from common.alignment_comparison import MODELS
from common.alignment_records import Records


def test_all_stages_and_nothing_twice(source, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("common.alignment_supervised.UNTRAINED", source)
    command = ["all", "--out", str(tmp_path), "--model", source, "--limit", "5", "--steps", "1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines() if ": done in" in line] == [*STAGES]
    table = Records(tmp_path).rows("compare")
    assert [row["model"] for row in table] == list(MODELS)
    for row in table:
        assert row["win_interval"][0] <= row["win_rate"] <= row["win_interval"][1]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    torch.manual_seed(1)
    assert main(command) == 0
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sft", "--limit", "0"], "--limit is 0, it must be above 0"),
        (["dpo", "--steps", "-1"], "--steps is -1"),
        (["sft", "--model", "nowhere"], "nowhere: no such file or folder"),
        (["dpo"], "sft.safetensors is missing: run the stage that makes it first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_says_what_is_wrong(options, message, source, tmp_path, capsys):  # noqa: F811
    options = options if "--model" in options else [*options, "--model", source]
    assert main([*options, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("alignment: ")
    assert message in said
    assert said.count("\n") == 1
