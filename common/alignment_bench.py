"""What every stage of chapter 7's comparison needs at hand: the data, the records, the models.

bench = Bench("smollm2-135m", "ch07_instruction_finetune/results")
policy = bench.policy("sft")
answers = bench.answer(policy, [entry.prompt for entry in bench.instructions("test")])
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter

from torch import nn
from tqdm import tqdm

from common.alignment_models import (
    TEMPLATE,
    load_judge,
    low_precision,
    open_base,
    open_policy,
)
from common.alignment_records import Records, Row
from common.evaluation import Evaluation, evaluate_loss
from common.gpt import GPT
from common.history import History
from common.instruction import respond_all
from common.instruction_data import (
    Instruction,
    Preference,
    read_instructions,
    read_preferences,
)
from common.rewards import RewardModel
from common.training import TrainingSettings

MOST_TOKENS = 80  # of an answer
VALIDATION_SHARE = 5  # of a half of the pairs, every fifth is for choosing recipes


class Bench:
    """Data, records and models of one comparison.

    source: the base; out: the folder of the results; limit, steps: at most so many entries of each
    kind of data, and so many steps of each run, to try it all in seconds
    """

    def __init__(
        self, source: str, out: str | Path, limit: int | None = None, steps: int | None = None
    ):
        self.source, self.limit, self.steps = source, limit, steps
        self.records = Records(out)
        self.tokenizer = open_base(source)[1]

    # --- data

    def instructions(self, split: str) -> list[Instruction]:
        """The course's instructions of a split."""
        return read_instructions(split=split)[:: self._stride(1400 if split == "train" else 175)]

    def pairs(self, half: str) -> list[Preference]:
        """The course's pairs of a half."""
        return read_preferences(half=half)[:: self._stride(270)]

    def divided_pairs(self, half: str) -> tuple[list[Preference], list[Preference]]:
        """A half of the pairs: what is learned from, and what recipes are chosen by."""
        pairs = self.pairs(half)
        held_out = pairs[::VALIDATION_SHARE]
        return [pair for pair in pairs if pair not in held_out], held_out

    def _stride(self, n: int) -> int:
        return max(n // self.limit, 1) if self.limit else 1

    # --- models

    def adapters(self, name: str) -> Path:
        """The file of a model's adapters. Raises ValueError where the stage before is not done."""
        path = self.records.folder / f"{name}.safetensors"
        if not path.exists():
            raise ValueError(f"{path} is missing: run the stage that makes it first")
        return path

    def policy(self, name: str | None = None, seed: int = 0) -> GPT:
        """A model by name; without one, the base with adapters that change nothing yet."""
        return open_policy(self.source, self.adapters(name) if name else None, seed)[0]

    def judge(self, half: str) -> RewardModel:
        """The reward model that learned from a half of the pairs."""
        return load_judge(self.source, self.adapters("sft"), self.adapters(f"judge-{half}"))

    def settings(self, settings: TrainingSettings) -> TrainingSettings:
        """The same, no longer than `steps`."""
        n = min(settings.n_steps, self.steps or settings.n_steps)
        return replace(settings, n_steps=n, warmup_steps=min(settings.warmup_steps, n))

    # --- work

    def answer(
        self, model: GPT, prompts: Sequence[str], template: str = TEMPLATE, **options
    ) -> list[str]:
        """Greedy answers of at most `MOST_TOKENS`, in low precision."""
        options = {"batch_size": 48, "max_new_tokens": MOST_TOKENS, **options}
        progress = partial(tqdm, desc="answers", mininterval=10)
        with low_precision():
            return respond_all(
                model, self.tokenizer, prompts, template=template, progress=progress, **options
            )

    @contextmanager
    def unit(self, name: str, unit: str) -> Iterator[list[Row] | None]:
        """Rows to append to a file, each told its unit; None where that was done before.

        with bench.unit("sft", "training") as rows:
            if rows is not None: rows.append({...})
        """
        if self.records.rows(name, unit=unit):
            yield None
            return
        rows: list[Row] = []
        yield rows
        self.records.add(name, [{"unit": unit, **row} for row in rows])


def look(batches, loss_fn) -> partial:
    """What `fit` asks for: the loss on held-out batches, in low precision."""
    return partial(_look, batches=batches, loss_fn=loss_fn)


def _look(model: nn.Module, batches, loss_fn) -> Evaluation:
    with low_precision():
        return evaluate_loss(model, batches, loss_fn)


def summary(history: History, settings: TrainingSettings, begun: float, **about) -> Row:
    """One row for a run: its settings, its curves, the seconds since `begun`."""
    return {
        **about,
        "settings": asdict(settings),
        "losses": history.losses,
        "validation": {str(step): found.loss for step, found in history.evaluations.items()},
        "seconds": round(perf_counter() - begun, 1),
    }
