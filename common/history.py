"""What a training run leaves to look at: every step, every evaluation, the samples on the way.

history = train(...)
history.losses, history.evaluations[400].perplexity, history.samples[0]
history.to_frame().plot(y="loss")
history.save("history.json"); History.load("history.json") == history
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from common.evaluation import Evaluation
from common.tokenizer_file import write_atomically


class Step(NamedTuple):
    """One update of the weights; `loss` is that of the weights before it, on this step's batch."""

    step: int
    loss: float  # nats, mean over the step's batches
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens_per_second: float


@dataclass
class History:
    """Steps in order, and {step: evaluation} and {step: sample}; step 0 is before the first."""

    steps: list[Step] = field(default_factory=list)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    samples: dict[int, str] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        """The training loss of every step."""
        return [step.loss for step in self.steps]

    def to_frame(self):
        """A pandas table with one row per step, and the evaluation where there was one."""
        import pandas as pd  # here, because it takes half a second

        steps = pd.DataFrame(self.steps, columns=Step._fields).set_index("step")
        found = {step: astuple(evaluation) for step, evaluation in self.evaluations.items()}
        names = [f"validation_{column.name}" for column in fields(Evaluation)]
        looks = pd.DataFrame.from_dict(found, orient="index", columns=names)
        return steps.join(looks)

    def looks(self) -> dict:
        """Evaluations and samples as JSON takes them."""
        evaluations = {step: asdict(evaluation) for step, evaluation in self.evaluations.items()}
        return {"evaluations": evaluations, "samples": self.samples}

    @classmethod
    def restored(cls, rows: Sequence[Sequence[float]], looks: dict) -> "History":
        """From rows of five numbers, and from what `looks` gave, whose keys JSON made texts."""
        return cls(
            [Step(int(step), *rest) for step, *rest in rows],
            {int(step): Evaluation(**values) for step, values in looks["evaluations"].items()},
            {int(step): text for step, text in looks["samples"].items()},
        )

    def save(self, path: str | Path) -> None:
        """Write a JSON file, all of it or nothing. Raises OSError, in one line, where it can't."""
        columns = dict(zip(Step._fields, zip(*self.steps, strict=True), strict=False))
        write_atomically(Path(path), json.dumps({"steps": columns, **self.looks()}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """Read what `save` wrote. Raises ValueError, in one line, for anything else."""
        try:
            table = json.loads(Path(path).read_text(encoding="utf8"))
            columns = [table["steps"].get(name, ()) for name in Step._fields]
            return cls.restored(list(zip(*columns, strict=True)), table)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is damaged, or no history that History.save wrote") from None
