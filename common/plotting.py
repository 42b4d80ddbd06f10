"""Figures that more than one notebook draws, in one style; call `house_style()` once per notebook.

Each draws into the axes it is given, or into a new figure, and returns them; `plt.show()` is yours.
Values may be lists, NumPy arrays or torch tensors of any device and dtype.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np

# Okabe and Ito's palette, made for colour-blind readers. Lines also differ by their dashes, since a
# projector or a black-and-white print may take the colours away.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLE = {
    "axes.prop_cycle": plt.cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.figsize": (7, 3.5),
    "font.size": 11,
    "image.cmap": "cividis",  # brightness grows evenly, for every kind of eye
}


def house_style() -> None:
    """Make `STYLE` matplotlib's default in this kernel."""
    plt.rcParams.update(STYLE)


def visible(token) -> str:
    """A token as a label: blanks can be seen, and `$` does not start a formula."""
    return str(token).translate(str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "$": r"\$"}))


def heatmap(matrix, row_labels=None, column_labels=None, ax=None, title=None, vmin=0, vmax=None):
    """Draw `matrix` (R, C) as colours, and as numbers too if it is no larger than 12 × 12.

    `vmin` and `vmax` are the ends of the colour scale; None takes the smallest and largest value.
    Raises ValueError for another shape, or if the labels are not R and C.
    """
    values = _array(matrix)
    if values.ndim != 2:
        raise ValueError(f"a heatmap takes a matrix (R, C), this has the shape {values.shape}")
    width, height = np.clip(0.45 * np.array(values.shape[::-1]) + 1, 2.5, 7)
    ax = ax or plt.subplots(figsize=(width, height))[1]
    image = ax.imshow(values, vmin=vmin, vmax=vmax)
    ax.locator_params(integer=True)
    if row_labels is not None:
        ax.set_yticks(range(values.shape[0]), [visible(label) for label in row_labels])
    if column_labels is not None:
        ax.set_xticks(range(values.shape[1]), [visible(label) for label in column_labels])
    if max(values.shape) <= 12:
        for (row, column), value in np.ndenumerate(values):
            color = "black" if image.norm(value) > 0.5 else "white"
            ax.text(column, row, f"{value:.3g}", ha="center", va="center", color=color)
    ax.set_title(title)
    return ax


def plot_losses(losses: Mapping, ax=None, title=None, xlabel="step", ylabel="loss"):
    """Draw one line per name: a sequence of losses, one per step from 0, or a dict {step: loss}."""
    ax = ax or plt.subplots()[1]
    for number, (name, series) in enumerate(losses.items()):
        points = series if isinstance(series, Mapping) else dict(enumerate(series))
        dashes = ("-", "--", "-.", ":")[number % 4] + ("o" if points is series else "")
        ax.plot(list(points), [float(loss) for loss in points.values()], dashes, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, loc="left")
    # Beside the title, where no curve runs through it.
    ax.legend(frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    return ax


def plot_history(history, ax=None, title=None):
    """Draw a `common.history.History`: the training loss, its running mean, the evaluations.

    The mean is over a twentieth of all steps: what is left when the noise of single batches goes.
    """
    losses = np.array(history.losses)
    steps = np.array([step.step for step in history.steps])
    ax = ax or plt.subplots()[1]
    window = max(len(losses) // 20, 1)
    if window > 1:
        means = np.convolve(losses, np.ones(window) / window, "valid")
        ax.plot(steps, losses, color=COLORS[4], linewidth=0.7, alpha=0.6)
        ax.plot(steps[window - 1 :], means, color=COLORS[0], label="training")
    else:
        ax.plot(steps, losses, color=COLORS[0], label="training")
    if history.evaluations:
        points = {step: found.loss for step, found in history.evaluations.items()}
        ax.plot(list(points), list(points.values()), "--o", color=COLORS[1], label="validation")
    ax.set(xlabel="step", ylabel="loss in nats per token")
    ax.set_title(title, loc="left")
    ax.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return ax


def plot_next_tokens(tokens: Sequence[str], probabilities, top=10, ax=None, title=None):
    """Draw the `top` likeliest of N `tokens` as bars; `probabilities` is (N,), else ValueError."""
    values = _array(probabilities)
    if values.shape != (len(tokens),):
        raise ValueError(f"{len(tokens)} tokens do not fit probabilities of shape {values.shape}")
    best = np.argsort(-values, kind="stable")[:top]
    ax = ax or plt.subplots(figsize=(7, 0.8 + 0.27 * len(best)))[1]
    bars = ax.barh(range(len(best)), values[best])
    ax.set_yticks(range(len(best)), [visible(tokens[index]) for index in best])
    ax.bar_label(bars, fmt="%.3f", padding=3)
    ax.invert_yaxis()
    ax.set(xlabel="probability", title=title)
    return ax


def _array(values) -> np.ndarray:
    """As NumPy: also bfloat16, what lies on a GPU, and what autograd tracks."""
    return np.asarray(
        values.detach().cpu().double() if hasattr(values, "detach") else values, float
    )
