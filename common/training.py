"""The training loop: any model, any loss, from a notebook cell to many processes.

    settings = TrainingSettings(n_steps=400, learning_rate=1e-3, warmup_steps=20)
    history = train(model, batches, next_token_loss, settings, evaluate=evaluate, sample=sample)

Read `train` first: the rest of the room is what its lines say. It knows nothing of language: the
loss function does, and whatever `batches` yields goes to it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import distributed
from common.allocator import keep_freed_memory
from common.checkpoint import Checkpoints, Run
from common.divergence import LossWatch, TrainingDiverged
from common.evaluation import (
    Evaluation,
    LossFunction,
    evaluate_loss,
    evaluation_mode,
    unchanged_chance,
)
from common.history import History, Step
from common.schedule import TrainingSettings, learning_rate_at

__all__ = [
    "Evaluation",
    "History",
    "TrainingDiverged",
    "TrainingSettings",
    "evaluate_loss",
    "learning_rate_at",
    "parameter_groups",
    "train",
]


def train(
    model: nn.Module,
    batches: Iterable,
    loss_fn: LossFunction,
    settings: TrainingSettings,
    *,
    evaluate: Callable[[nn.Module], Evaluation] | None = None,
    sample: Callable[[nn.Module], str] | None = None,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> History:
    """Train `model` in place, on the device where it is; returns what happened on the way.

    batches:     yields tuples of tensors, such as (inputs, targets); begun again where it ends
    loss_fn:     loss_fn(model, inputs, targets) -> (), a mean over the batch
    evaluate:    called with the model in evaluation mode; what it draws at random is not missed
    sample:      the same, and returns a text
    checkpoints: where to save; `resume` goes on from the last one there, if any
    progress:    a bar on stderr
    report:      called with a line per evaluation, and with samples; default: print beside the bar

    Raises TrainingDiverged, ValueError for batches that run out, and what `Checkpoints` raises.
    """
    objective = distributed.replicate(Objective(model, loss_fn))
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), betas=settings.betas, fused=True
    )
    run = Run(model, optimizer, batches, settings)
    save = Saver(run, checkpoints, resume)
    history, stream = run.history, without_end(batches)
    watch = LossWatch(history.losses, settings.stop_on_explosion)
    with training_mode(model), ProgressBar(run, progress) as bar:
        look = Observer(run, evaluate, sample, report or bar.say)
        look(step=len(history.steps))
        for step in range(len(history.steps) + 1, settings.n_steps + 1):
            begun, position = perf_counter(), data_position(batches, step)
            loss, n_tokens = accumulate_gradients(objective, stream, settings)
            norm = clip_gradients(model, settings.clip_norm)
            loss, norm = torch.stack([loss, norm]).tolist()  # a GPU is waited for once
            if problem := watch.problem(loss, norm):
                raise TrainingDiverged(step, problem, position, checkpoints)
            rate = update_weights(optimizer, learning_rate_at(step, settings))
            speed = n_tokens / (perf_counter() - begun)
            history.steps.append(Step(step, loss, rate, norm, speed))
            look(step)
            save(step, position, watch.calm)
            bar.advance(loss)
    return history


# --------------------------------------------------------------------------------- the lines of it


class Objective(nn.Module):
    """Model and loss as one module, since copies of a model are kept in step by `forward`."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss_fn(self.model, *batch)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """What AdamW takes: decay for matrices (and larger), none for biases and norms.

    A bias or the scale of a norm has no reason to be small. Frozen parameters are left out.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def without_end(batches: Iterable) -> Iterator:
    """Batch after batch; what ends, like a DataLoader, is begun again, or a ValueError follows."""
    while True:
        batch = None
        for batch in batches:
            yield batch
        if batch is None:
            raise ValueError("the batches have run out: pass a DataLoader, or batches without end")


def accumulate_gradients(
    objective: nn.Module, batches: Iterator, settings: TrainingSettings
) -> tuple[Tensor, int]:
    """The gradients of one step, in the parameters; its mean loss (), and its number of tokens.

    Several small batches give the gradients of a large one, in the memory of a small one.
    """
    device = next(objective.parameters()).device
    low = torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16")
    n_batches, losses, n_tokens = settings.accumulation_steps, [], 0
    for number in range(1, n_batches + 1):
        batch = [tensor.to(device, non_blocking=True) for tensor in next(batches)]
        with distributed.gradients_shared(objective, now=number == n_batches):
            with low:
                loss = objective(*batch) / n_batches
            loss.backward()
        losses.append(loss.detach().float())
        n_tokens += batch[0].numel()
    return distributed.mean(torch.stack(losses).sum()), n_tokens * distributed.world_size()


def clip_gradients(model: nn.Module, longest: float | None) -> Tensor:
    """All gradients scaled so that together they are no longer than `longest`; how long they were.

    Pascanu et al. 2013, arXiv:1211.5063.
    """
    longest = float("inf") if longest is None else longest
    return distributed.whole(nn.utils.clip_grad_norm_(model.parameters(), longest)).float()


def update_weights(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """One step of the optimizer at this learning rate, which is returned; no gradient is left."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return rate


def data_position(batches: Iterable, step: int) -> dict:
    """What to hand to `load_state_dict` of batches like these to get this step's again."""
    return batches.state_dict() if hasattr(batches, "state_dict") else {"step": step}


def is_due(step: int, every: int | None, settings: TrainingSettings) -> bool:
    """Whether what happens every so many steps happens after this one."""
    return step in (0, settings.n_steps) or (every is not None and step % every == 0)


# ------------------------------------------------------------------------------- around the steps


class Observer:
    """Evaluates and samples when it is due, into the history, without disturbing the training."""

    def __init__(self, run: Run, evaluate, sample, report: Callable[[str], None]):
        self.run, self.evaluate, self.sample, self.report = run, evaluate, sample, report

    def __call__(self, step: int) -> None:
        history, settings = self.run.history, self.run.settings
        wanted = lambda every, done: is_due(step, every, settings) and step not in done
        if self.evaluate and wanted(settings.evaluate_every, history.evaluations):
            history.evaluations[step] = found = self._ask(self.evaluate)
            self._say(f"step {step:,}: {self._recent()}validation {found}")
        if self.sample and wanted(settings.sample_every, history.samples):
            history.samples[step] = text = self._ask(self.sample)
            self._say(f"step {step:,}, sample: {text}")

    def _ask(self, question: Callable):
        with unchanged_chance(self.run.model), evaluation_mode(self.run.model):
            return question(self.run.model)

    def _recent(self) -> str:
        losses = self.run.history.losses[-20:]
        return f"training loss {sum(losses) / len(losses):.4f}, " if losses else ""

    def _say(self, text: str) -> None:
        if distributed.rank() == 0:
            self.report(text)


class Saver:
    """Saves when it is due, but nothing that has gone wrong: while the loss is up, it waits."""

    def __init__(self, run: Run, checkpoints: Checkpoints | None, resume: bool):
        self.run, self.checkpoints, self.due = run, checkpoints, False
        if checkpoints:
            checkpoints.begin(run, resume)
        elif resume:
            raise ValueError("there is nothing to resume from: pass checkpoints, too")

    def __call__(self, step: int, position: dict, calm: bool) -> None:
        settings = self.run.settings
        self.due |= is_due(step, settings.checkpoint_every, settings)
        if self.checkpoints and self.due and (calm or step == settings.n_steps):
            if not finite_weights(self.run.model):
                problem = "the weights are no longer finite"
                raise TrainingDiverged(step, problem, position, self.checkpoints)
            self.checkpoints.save(self.run)
            self.due = False


def finite_weights(model: nn.Module) -> bool:
    """Whether every weight is a number."""
    return bool(distributed.whole(nn.utils.get_total_norm(model.parameters())).isfinite())


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """The model with dropout, and memory that is not given back between two steps."""
    keep_freed_memory()
    try:
        with evaluation_mode(model, on=False):
            yield
    finally:
        model.zero_grad()
        keep_freed_memory(False)


class ProgressBar(tqdm):
    """The bar of rank 0, from the step at which the run goes on; lines appear above it."""

    def __init__(self, run: Run, visible: bool):
        super().__init__(
            total=run.settings.n_steps,
            initial=len(run.history.steps),
            desc="training",
            unit="step",
            disable=not visible or distributed.rank() > 0,
        )

    def say(self, text: str) -> None:
        """A line on stderr above the bar; nothing where there is no bar."""
        if not self.disable:
            self.write(text, file=sys.stderr)

    def advance(self, loss: float) -> None:
        """One step further."""
        self.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.update()
