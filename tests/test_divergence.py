"""A run that has failed is stopped; one that is merely noisy is not."""

import math
import random

import pytest

from common.divergence import LossWatch, TrainingDiverged


def stopped_at(losses) -> int | None:
    watch = LossWatch()
    for step, loss in enumerate(losses, 1):
        if watch.problem(loss):
            return step
    return None


def falling(n: int, noise: float = 0.1, seed: int = 0) -> list[float]:
    """From 8.3 down to 3, as a language model's loss does, with the noise of single batches."""
    chance = random.Random(seed)
    return [3 + 5.3 * math.exp(-step / 50) + chance.gauss(0, noise) for step in range(n)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stops_at_once(value):
    assert "the loss is" in LossWatch().problem(value)
    assert "the gradient norm is" in LossWatch().problem(1.0, value)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_ordinary_noise_goes_on(noise, seed):
    assert stopped_at(falling(1000, noise, seed)) is None


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_only_wanders_goes_on(seed):
    chance = random.Random(seed)
    assert stopped_at([2.0 + chance.gauss(0, 0.5) for _ in range(1000)]) is None
    assert stopped_at([abs(chance.gauss(0, 0.05)) for _ in range(1000)]) is None
    assert stopped_at([chance.gauss(0, 0.05) for _ in range(1000)]) is None, "rewards do that"


def test_a_lucky_first_batch_is_no_standard():
    chance = random.Random(0)
    assert stopped_at([0.001] + [abs(chance.gauss(0.5, 0.3)) for _ in range(500)]) is None


def test_bad_batches_go_on():
    losses = falling(400)
    losses[200:209] = [50.0] * 9
    assert stopped_at(losses) is None


def test_losing_less_than_half_of_the_progress_goes_on():
    assert stopped_at(falling(400, noise=0.01) + [5.0] * 100) is None


@pytest.mark.parametrize("height", [6.5, 8.0, 1e4])
def test_a_loss_that_leaps_up_and_stays_stops_within_a_window(height):
    losses = falling(200) + [height] * 50
    assert 200 < stopped_at(losses) <= 200 + LossWatch.WINDOW


def test_a_loss_that_explodes_from_the_start_stops():
    assert stopped_at([8.3] + [100.0 * step for step in range(1, 40)]) == LossWatch.WINDOW
    assert stopped_at([1.5**step for step in range(60)]) is not None


def test_it_can_be_told_to_mind_numbers_only():
    watch = LossWatch(stop_on_explosion=False)
    assert not any(watch.problem(10.0**step) for step in range(30))
    assert watch.problem(math.nan)
    assert watch.calm


def test_a_spike_is_no_moment_for_a_checkpoint():
    watch = LossWatch(falling(200))
    assert watch.calm
    watch.problem(8.0)
    assert not watch.calm
    watch.problem(3.0)
    assert watch.calm


def test_a_watch_that_resumes_knows_what_the_first_one_knew():
    losses = falling(137)
    once, again = LossWatch(), LossWatch(losses)
    for loss in losses:
        once.problem(loss)
    assert vars(once) == vars(again)


def test_the_error_says_where_and_what_to_do():
    error = TrainingDiverged(7, "the loss is nan", {"windows_seen": 48})
    assert (error.step, error.position, error.checkpoint) == (7, {"windows_seen": 48}, None)
    assert str(error).startswith("step 7: the loss is nan, on the batch at {'windows_seen': 48}")
    assert "lower learning rate" in str(error)
