"""What is drawn must be what was given: values, places, labels, and a clear refusal of the rest."""

import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.evaluation import Evaluation
from common.history import History, Step
from common.plotting import (
    COLORS,
    STYLE,
    heatmap,
    house_style,
    plot_history,
    plot_losses,
    plot_next_tokens,
    visible,
)


@pytest.fixture(autouse=True)
def untouched_defaults():
    """Whatever a test sets or draws is gone after it."""
    with plt.rc_context():
        yield
    plt.close("all")


def ticks(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def luminance(color: str) -> float:
    """Relative luminance as in WCAG 2.2: 0 is black, 1 is white."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_heatmap_shows_each_value_in_its_cell(kind):
    ax = heatmap(kind([[0.0, 0.25, 1.0], [0.5, 0.125, 0.0]]), "ab", ["x", " ", "\n"], title="T")
    assert ax.images[0].get_array().tolist() == [[0.0, 0.25, 1.0], [0.5, 0.125, 0.0]]
    shown = {text.get_position(): text.get_text() for text in ax.texts}
    assert shown[(2, 0)] == "1"
    assert shown[(1, 1)] == "0.125"
    assert len(shown) == 6
    assert (ticks(ax.yaxis), ticks(ax.xaxis)) == (["a", "b"], ["x", "␣", "⏎"])
    assert ax.get_title() == "T"


def test_heatmap_numbers_can_be_read_on_their_colour():
    ax = heatmap([[value / 10 for value in range(11)]])
    image = ax.images[0]
    for text in ax.texts:
        cell = luminance(image.cmap(image.norm(text.get_position()[0] / 10)))
        ink = luminance(text.get_color())
        contrast = (max(cell, ink) + 0.05) / (min(cell, ink) + 0.05)
        assert contrast >= 3, f"{text.get_text()}: contrast {contrast:.1f} (WCAG asks for 3)"


def test_heatmap_of_a_large_matrix_has_no_numbers_and_a_shared_scale_is_kept():
    ax = heatmap(np.eye(13), vmax=2)
    assert not ax.texts
    assert ax.images[0].get_clim() == (0, 2)
    assert heatmap([[-3.0, 5.0]], vmin=None).images[0].get_clim() == (-3, 5)


def test_a_constant_matrix_and_one_cell_are_drawn():
    assert len(heatmap(np.zeros((2, 2))).texts) == 4
    assert heatmap([[7.0]]).texts[0].get_text() == "7"


@pytest.mark.parametrize("matrix", [[1.0, 2.0], np.zeros((2, 2, 2)), 3.0])
def test_heatmap_refuses_what_is_no_matrix(matrix):
    with pytest.raises(ValueError, match=r"takes a matrix \(R, C\)"):
        heatmap(matrix)


def test_heatmap_without_labels_counts_in_whole_numbers():
    ax = heatmap(np.eye(3))
    ax.figure.canvas.draw()
    assert all(float(tick).is_integer() for tick in [*ax.get_xticks(), *ax.get_yticks()])


def test_heatmap_refuses_labels_that_do_not_fit():
    with pytest.raises(ValueError, match="number of labels"):
        heatmap(np.eye(2), "abc")


def test_tensors_of_any_kind_are_drawn():
    tracked = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16, requires_grad=True)
    assert heatmap(tracked).images[0].get_array().tolist() == [[1.0, 2.0]]
    assert heatmap(torch.tensor([[1, 2]])).texts[1].get_text() == "2"


def test_losses_are_drawn_step_by_step_or_where_they_were_measured():
    ax = plot_losses({"training": [3.0, 2.0, 1.0], "held back": {0: 3.5, 2: 2.5}}, title="T")
    training, held_back = ax.lines
    assert training.get_xydata().tolist() == [[0, 3], [1, 2], [2, 1]]
    assert held_back.get_xydata().tolist() == [[0, 3.5], [2, 2.5]]
    assert training.get_linestyle() != held_back.get_linestyle(), "colour alone must not tell"
    assert held_back.get_marker() == "o"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["training", "held back"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title("left")) == ("step", "loss", "T")


def test_losses_may_be_a_tensor_and_go_into_given_axes():
    _, (left, right) = plt.subplots(ncols=2)
    assert plot_losses({"a": torch.tensor([1.0, 0.5])}, ax=right) is right
    assert right.lines[0].get_ydata().tolist() == [1.0, 0.5]
    assert not left.lines


def test_a_history_is_drawn_with_its_mean_and_its_evaluations():
    losses = [10.0, 8.0] * 20
    steps = [Step(n, loss, 1e-3, 1.0, 1.0) for n, loss in enumerate(losses, 1)]
    evaluations = {step: Evaluation.of(loss) for step, loss in ((0, 11.0), (40, 9.5))}
    ax = plot_history(History(steps, evaluations), title="T")
    noisy, mean, validation = ax.lines
    assert noisy.get_xydata().tolist() == [[n, loss] for n, loss in enumerate(losses, 1)]
    assert mean.get_xydata().tolist() == [[n, 9.0] for n in range(2, 41)], "of the last two each"
    assert validation.get_xydata().tolist() == [[0, 11], [40, 9.5]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["training", "validation"]
    assert "nats" in ax.get_ylabel()


@pytest.mark.parametrize("n", [0, 1, 5])
def test_a_short_history_is_drawn_as_it_is(n):
    ax = plot_history(History([Step(i, 2.0, 1e-3, 1.0, 1.0) for i in range(1, n + 1)]))
    assert len(ax.lines) == 1
    assert len(ax.lines[0].get_xdata()) == n


def test_next_tokens_are_sorted_and_cut():
    ax = plot_next_tokens([" the", "\n", "b", "$"], torch.tensor([0.5, 0.1, 0.3, 0.1]), top=3)
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.5, 0.3, 0.1])
    assert ticks(ax.yaxis) == ["␣the", "b", "⏎"]
    assert [text.get_text() for text in ax.texts] == ["0.500", "0.300", "0.100"]
    bottom, top = ax.get_ylim()
    assert bottom > top, "the likeliest token stands at the top"


def test_next_tokens_with_the_same_label_stay_apart():
    assert len(plot_next_tokens(["a", "a"], [0.6, 0.4]).patches) == 2


def test_next_tokens_refuse_lengths_that_differ():
    with pytest.raises(ValueError, match="2 tokens do not fit"):
        plot_next_tokens("ab", [0.2, 0.3, 0.5])


def test_blanks_are_visible_and_dollars_are_no_formula():
    assert visible("a b\n\t") == "a␣b⏎⇥"
    ax = plot_next_tokens(["$x$ 5$"], [1.0])
    ax.figure.canvas.draw()  # an unescaped formula would fail or be set in italics here
    assert r"\$x\$" in ticks(ax.yaxis)[0]


def test_every_label_has_a_glyph(recwarn):
    heatmap(np.eye(3), [" ", "\n", "\t"]).figure.canvas.draw()
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_house_style_is_set_when_asked_not_on_import():
    plt.rcdefaults()
    before = plt.rcParams["font.size"]
    assert before != STYLE["font.size"]
    house_style()
    assert plt.rcParams["font.size"] == STYLE["font.size"]
    assert plt.rcParams["axes.prop_cycle"].by_key()["color"] == list(COLORS)


def test_lines_can_be_told_from_a_white_page():
    for color in COLORS[:4]:
        contrast = 1.05 / (luminance(color) + 0.05)
        assert contrast >= 3 or math.isclose(contrast, 3, abs_tol=0.2), f"{color}: {contrast:.2f}"
