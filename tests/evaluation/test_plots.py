"""Figures: that they show the numbers they were given."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from spkfast.errors import InputError
from spkfast.evaluation import det_plot, eer
from spkfast.evaluation.plots import deviate, loss_curve, score_histogram


def trials(separation: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], 2000)
    return rng.normal(separation * labels), labels


def test_det_curve_of_normal_scores_is_a_straight_line():
    figure = det_plot({"system": trials(3.0)})
    assert isinstance(figure, Figure)
    curve = next(line for line in figure.axes[0].get_lines() if line.get_label().startswith("system"))
    x, y = (np.asarray(values) for values in curve.get_data())
    inner = (x > deviate([0.02])) & (y > deviate([0.02]))
    slope, offset = np.polyfit(x[inner], y[inner], 1)
    assert slope == pytest.approx(-1, abs=0.1) and offset == pytest.approx(-3, abs=0.15)


def test_det_plot_marks_and_names_the_equal_error_rate():
    systems = {"good": trials(3.0), "poor": trials(1.0)}
    axes = det_plot(systems).axes[0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    for index, (name, pair) in enumerate(systems.items()):
        rate = eer(*pair).value
        assert f"{name} ({rate:.2%})" in legend
        (mark,) = [line for line in axes.get_lines() if line.get_gid() == f"eer-{index}"]
        np.testing.assert_allclose(mark.get_data(), [deviate([rate])] * 2)
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        label.get_text() for label in axes.get_yticklabels()
    ]


def test_deviates_are_normal_quantiles_and_finite():
    np.testing.assert_allclose(deviate([0.5, 0.8413447, 0.0227501]), [0, 1, -2], atol=1e-5)
    assert np.isfinite(deviate([0.0, 1.0])).all()


def test_histogram_counts_both_kinds_and_draws_the_threshold():
    scores, labels = trials(2.0)
    axes = score_histogram(scores, labels, threshold=1.25).axes[0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "same speaker (2,000 trials)" in legend and "different speakers (2,000 trials)" in legend
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [1.25, 1.25]
    assert not score_histogram(scores, labels).axes[0].get_lines()
    area = sum(patch.get_height() * patch.get_width() for patch in axes.patches)
    assert area == pytest.approx(2)


def test_loss_curve_shows_values_and_their_running_mean():
    steps, losses = np.arange(40) * 10, np.linspace(4, 1, 40)
    figure = loss_curve(steps, losses, accuracies=np.linspace(0, 1, 40))
    raw, mean = figure.axes[0].get_lines()
    np.testing.assert_array_equal(raw.get_ydata(), losses)
    np.testing.assert_allclose(mean.get_ydata()[1:], (losses[1:] + losses[:-1]) / 2)
    assert figure.axes[1].get_lines()[0].get_ydata()[-1] == 100
    assert len(loss_curve([1], [2.0]).axes) == 1


def test_bad_input_is_named():
    with pytest.raises(InputError, match="at least one system"):
        det_plot({})
    with pytest.raises(InputError, match="labels"):
        score_histogram([0.1, 0.2], [1, 1])
    with pytest.raises(InputError, match="one length above 0, got 2, 1"):
        loss_curve([1, 2], [0.5])
    with pytest.raises(InputError, match="got 0, 0"):
        loss_curve([], [])


def test_no_display_and_no_pyplot_is_needed(tmp_path):
    code = (
        "import sys; from spkfast.evaluation.plots import loss_curve; assert 'matplotlib' not in sys.modules;"
        "loss_curve([1, 2], [3, 2]).savefig('curve.png'); assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
