"""The learning rate is what its schedule says; impossible settings are refused."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.schedule import TrainingSettings, learning_rate_at


def rates(**settings) -> list[float]:
    settings = TrainingSettings(**settings)
    return [learning_rate_at(step, settings) for step in range(settings.n_steps + 1)]


def test_cosine_by_hand():
    found = rates(n_steps=8, learning_rate=2.0, warmup_steps=4, final_fraction=0.1)
    assert found[:5] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])
    assert found[6] == pytest.approx(2 * (0.1 + 0.9 / 2)), "half way down: the mean of both ends"
    assert found[8] == pytest.approx(0.2)
    assert found[5] > 2 * (0.1 + 0.9 * 0.75), "a cosine leaves slower than a straight line"


def test_wsd_by_hand():
    found = rates(
        n_steps=10, learning_rate=1.0, schedule="wsd", warmup_steps=2, decay_steps=4,
        final_fraction=0.0,
    )  # fmt: skip
    assert found == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_wsd_decays_over_a_fifth_unless_told():
    assert TrainingSettings(n_steps=100, schedule="wsd").decay_steps == 20
    assert TrainingSettings(n_steps=100, schedule="wsd", decay_steps=0).decay_steps == 0


def test_constant_stays():
    assert rates(n_steps=3, learning_rate=0.5, schedule="constant") == [0.5] * 4
    assert rates(n_steps=3, learning_rate=0.5, schedule="constant", warmup_steps=2)[1] == 0.25


def test_beyond_the_end_it_stays_at_the_last():
    for schedule in ("cosine", "wsd"):
        settings = TrainingSettings(n_steps=10, schedule=schedule)
        assert learning_rate_at(99, settings) == learning_rate_at(10, settings)


@given(
    n_steps=st.integers(1, 60),
    data=st.data(),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    final_fraction=st.floats(0, 1),
)
def test_any_schedule_rises_then_falls_and_stays_within_its_bounds(
    n_steps, data, schedule, final_fraction
):
    warmup = data.draw(st.integers(0, n_steps))
    decay = data.draw(st.integers(0, n_steps - warmup)) if schedule == "wsd" else None
    found = rates(
        n_steps=n_steps, schedule=schedule, warmup_steps=warmup, decay_steps=decay,
        final_fraction=final_fraction, learning_rate=1.0,
    )  # fmt: skip
    assert found[: warmup + 1] == sorted(found[: warmup + 1])
    after = found[warmup:]
    assert all(a >= b - 1e-12 for a, b in pairwise(after))
    assert max(found) == pytest.approx(1.0)
    assert min(after) >= final_fraction - 1e-12
    if schedule != "constant" and (decay or (schedule == "cosine" and warmup < n_steps)):
        assert found[-1] == pytest.approx(final_fraction)


def test_settings_survive_json():
    import json
    from dataclasses import asdict

    settings = TrainingSettings(n_steps=10, betas=(0.8, 0.9), schedule="wsd")
    assert TrainingSettings(**json.loads(json.dumps(asdict(settings)))) == settings


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n_steps": 0}, "n_steps is 0"),
        ({"n_steps": 2.5}, "n_steps is 2.5"),
        ({"n_steps": True}, "n_steps is True"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"schedule": "linear"}, "schedule is 'linear', it must be one of cosine, wsd, constant"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_steps": 11}, "11 steps up and 0 down are more than the 10"),
        ({"warmup_steps": 6, "schedule": "wsd", "decay_steps": 5}, "6 steps up and 5 down"),
        ({"decay_steps": 5}, 'decay_steps is for schedule "wsd"'),
        ({"schedule": "wsd", "decay_steps": -1}, "decay_steps is -1"),
        ({"final_fraction": 1.5}, "final_fraction is 1.5"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"betas": (0.9,)}, "betas are"),
        ({"clip_norm": 0}, "clip_norm is 0"),
        ({"accumulation_steps": 0}, "accumulation_steps is 0"),
        ({"evaluate_every": 0}, "evaluate_every is 0"),
        ({"sample_every": -3}, "sample_every is -3"),
        ({"checkpoint_every": 1.0}, "checkpoint_every is 1.0"),
    ],
)
def test_nonsense_is_refused_in_one_line(wrong, says):
    with pytest.raises(ValueError, match="impossible TrainingSettings") as refusal:
        TrainingSettings(**{"n_steps": 10, **wrong})
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
