"""The settings of a training run, and the learning rate that follows from them at every step.

    settings = TrainingSettings(n_steps=400, learning_rate=1e-3, warmup_steps=20)
    rates = [learning_rate_at(step, settings) for step in range(1, 401)]

A step is one update of the weights. Steps are counted from 1; step 0 is the model as it began.
"""

from dataclasses import dataclass
from math import cos, isfinite, pi

SCHEDULES = ("cosine", "wsd", "constant")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainingSettings:
    """Everything about a run that is neither the model, nor the data, nor the loss.

    What happens every N steps also happens at the end; evaluations and samples at step 0, too.
    Raises ValueError, in one line, for settings that make no sense.
    """

    n_steps: int
    learning_rate: float = 1e-3  # at its highest
    schedule: str = "cosine"  # or "wsd" (warm up, stay, decay), or "constant"
    warmup_steps: int = 0  # the learning rate rises in a straight line to its highest
    decay_steps: int | None = None  # of "wsd", at the end; None: a fifth of all steps
    final_fraction: float = 0.1  # what is left of the learning rate at the last step
    weight_decay: float = 0.1  # of matrices alone
    betas: tuple[float, float] = (0.9, 0.95)  # what AdamW keeps of its two running means
    clip_norm: float | None = 1.0  # longest gradient let through; None: any
    accumulation_steps: int = 1  # batches per step
    dtype: str = "float32"  # of the matrix products; the weights themselves stay as they are
    evaluate_every: int | None = None
    sample_every: int | None = None
    checkpoint_every: int | None = None
    stop_on_explosion: bool = True  # see `common.divergence.LossWatch`

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON knows lists only
        if self.schedule == "wsd" and self.decay_steps is None:
            object.__setattr__(self, "decay_steps", self.n_steps // 5)
        for problem, found in self._problems():
            if found:
                raise ValueError(f"impossible TrainingSettings: {problem}")

    def _problems(self):
        for name in ("n_steps", "accumulation_steps"):
            value = getattr(self, name)
            yield f"{name} is {value!r}, it must be a whole number above 0", not _whole(value, 1)
        for name in ("evaluate_every", "sample_every", "checkpoint_every"):
            value = getattr(self, name)
            wrong = value is not None and not _whole(value, 1)
            yield f"{name} is {value!r}, it must be a whole number above 0, or None", wrong
        for name, value, known in (
            ("schedule", self.schedule, SCHEDULES),
            ("dtype", self.dtype, DTYPES),
        ):
            yield f"{name} is {value!r}, it must be one of {', '.join(known)}", value not in known
        rate, clip, decay = self.learning_rate, self.clip_norm, self.weight_decay
        yield f"learning_rate is {rate}, it must be above 0", not (rate > 0 and isfinite(rate))
        yield f"clip_norm is {clip}, it must be above 0, or None", clip is not None and not clip > 0
        yield f"weight_decay is {decay}, it must be 0 or more", not decay >= 0
        fraction = self.final_fraction
        yield f"final_fraction is {fraction}, it must be from 0 to 1", not 0 <= fraction <= 1
        betas = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        yield f"betas are {self.betas}, two numbers in [0, 1) are needed", not betas
        warmup, down = self.warmup_steps, self.decay_steps
        yield f"warmup_steps is {warmup!r}, it must be 0 or more", not _whole(warmup, 0)
        only = f'decay_steps is for schedule "wsd", not for "{self.schedule}"'
        yield only, down is not None and self.schedule != "wsd"
        yield f"decay_steps is {down!r}, it must be 0 or more", not _whole(down or 0, 0)
        total = f"{warmup} steps up and {down or 0} down are more than the {self.n_steps} there are"
        yield total, warmup + (down or 0) > self.n_steps


def _whole(value, smallest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest


def learning_rate_at(step: int, settings: TrainingSettings) -> float:
    """The learning rate of a step, counted from 1.

    cosine: from the warm-up on, half a cosine down to `final_fraction` (Loshchilov and Hutter 2017,
    arXiv:1608.03983). wsd: level until `decay_steps` before the end, then straight down (Hu et al.
    2024, arXiv:2404.06395): one can decide late how long to train.
    """
    highest, warmup, last = settings.learning_rate, settings.warmup_steps, settings.n_steps
    if step < warmup:
        return highest * step / warmup
    if settings.schedule == "constant":
        return highest
    begins = warmup if settings.schedule == "cosine" else last - settings.decay_steps
    progress = min(max(step - begins, 0) / max(last - begins, 1), 1.0)
    left = (1 + cos(pi * progress)) / 2 if settings.schedule == "cosine" else 1 - progress
    return highest * (settings.final_fraction + (1 - settings.final_fraction) * left)
