"""What is typed arrives, and what is left out has a sensible value."""

import shlex

import pytest

from common.pretrain_options import build_parser, check, settings_of


def test_options_arrive():
    options = (
        "--text a --out b --steps 200 --learning-rate 2 --schedule wsd --decay 10 --warmup 3 "
        "--accumulation 4 --dtype bfloat16 --weight-decay 0.5 --checkpoint-every 7"
    )
    parsed = build_parser().parse_args(shlex.split(options))
    found = settings_of(parsed)
    assert (found.n_steps, found.learning_rate, found.schedule) == (200, 2.0, "wsd")
    assert (found.decay_steps, found.warmup_steps, found.accumulation_steps) == (10, 3, 4)
    assert (found.dtype, found.weight_decay, found.checkpoint_every) == ("bfloat16", 0.5, 7)
    assert found.evaluate_every == found.sample_every == 20


def test_what_is_left_out_follows_from_the_number_of_steps():
    found = settings_of(build_parser().parse_args(["--text", "a", "--out", "b", "--steps", "400"]))
    assert found.warmup_steps == 20
    assert found.evaluate_every == found.checkpoint_every == 40
    found = settings_of(build_parser().parse_args(["--text", "a", "--out", "b", "--steps", "1"]))
    assert (found.warmup_steps, found.evaluate_every) == (0, 1)


@pytest.mark.parametrize("name", ["threads", "timeout", "evaluate-tokens", "evaluate-every"])
def test_numbers_below_one_are_refused(name):
    parsed = build_parser().parse_args(["--text", "a", "--out", "b", f"--{name}", "0"])
    with pytest.raises(ValueError, match=f"--{name} is 0"):
        check(parsed)


def test_wrong_usage_ends_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["--text", "a", "--out", "b", "--config", "enormous"])
    assert stop.value.code == 2
    assert "smollm2-135m" in capsys.readouterr().err, "it says what there is"
