"""When to stop a training run: a loss that is no number, or that has exploded.

watch = LossWatch()
if problem := watch.problem(loss, gradient_norm): raise TrainingDiverged(step, problem, ...)
"""

from collections import deque
from collections.abc import Iterable
from math import isfinite
from statistics import median


class TrainingDiverged(RuntimeError):
    """Training failed at `step`, on the data at `position`; the last good one is `checkpoint`."""

    def __init__(self, step: int, problem: str, position: dict, checkpoints=None):
        self.step, self.position = step, position
        self.checkpoint = checkpoints and checkpoints.latest
        super().__init__(
            f"step {step}: {problem}, on the batch at {position}; the last good checkpoint is "
            f"{self.checkpoint or 'none'}; try a lower learning rate or a longer warm-up"
        )


class LossWatch:
    """Tells a loss that has exploded from one that is noisy.

    It has exploded when the median of the last 20 is above `limit`: three times the first loss and
    three nats more; or, once there was progress, when half of all progress is lost, and more than
    twice the noise there was at the best of times. A bad batch, or nine, can't do that.
    """

    WINDOW = 20

    def __init__(self, losses: Iterable[float] = (), stop_on_explosion: bool = True):
        self.recent: deque[float] = deque(maxlen=self.WINDOW)
        self.stop_on_explosion, self.first = stop_on_explosion, None
        self.lowest = self.noise = self.limit = float("inf")
        for loss in losses:
            self.problem(loss)

    def problem(self, loss: float, gradient_norm: float = 0.0) -> str | None:
        """What is wrong with the next loss, in words; None if nothing is."""
        for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
            if not isfinite(value):
                return f"the {name} is {value}"
        if self.first is None:
            self.first, self.limit = loss, 3 * abs(loss) + 3
        self.recent.append(loss)
        if len(self.recent) < self.WINDOW:
            return None
        middle = median(self.recent)
        if middle > self.limit and self.stop_on_explosion:
            return f"the loss has exploded: {middle:.3g} is the median of the last {self.WINDOW}"
        if middle < self.lowest:
            self.lowest, noise = middle, max(self.recent) - middle
            margin = max((self.first - middle) / 2, 2 * noise, abs(self.first) / 10)
            self.limit = min(3 * abs(self.first) + 3, middle + margin)
        return None

    @property
    def calm(self) -> bool:
        """Whether the last loss is no reason to worry: only then is a checkpoint worth keeping."""
        return not self.stop_on_explosion or self.recent[-1] <= self.limit
