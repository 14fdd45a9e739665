"""Figures: that they show the numbers they were given."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from spkfast.errors import InputError
from spkfast.evaluation import det_plot, eer
from spkfast.evaluation.plots import Scale, deviate, error_curve, loss_curve, score_histogram, step_plot


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


def legend(figure):
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def named(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_curves_on_two_axes_have_their_own_scale_and_one_legend():
    speed, wait, busy = [100.0, 200.0], [1.0, 2.0], [99.0, None]
    figure = step_plot(
        [10, 20],
        Scale("crops per second", {"speed": speed}, low=0),
        Scale("share (%)", {"wait": wait, "busy": busy}, low=0, high=100),
    )
    left, right = figure.axes
    assert left.get_ylabel() == "crops per second" and right.get_ylabel() == "share (%)"
    assert left.get_ylim()[0] == 0 and left.get_ylim()[1] >= 200 and right.get_ylim() == (0, 100)
    np.testing.assert_array_equal(named(left)["speed"].get_xydata(), [[10, 100], [20, 200]])
    np.testing.assert_array_equal(named(right)["busy"].get_ydata(), [99, np.nan])
    assert legend(figure) == ["speed", "wait", "busy"]
    colours = [line.get_color() for axes in (left, right) for line in axes.get_lines()]
    assert len(set(colours)) == 3


def test_a_logarithmic_scale_has_plain_numbers_and_its_limit():
    figure = step_plot([1, 2, 3], Scale("norm", {"norm": [0.5, 20.0, 3.0]}, log=True, limit=("clipped above 5", 5.0)))
    (axes,) = figure.axes
    figure.draw_without_rendering()
    assert axes.get_yscale() == "log" and legend(figure) == ["norm", "clipped above 5"]
    assert list(named(axes)["clipped above 5"].get_ydata()) == [5, 5]
    assert {"0.5", "1", "2", "5", "10"} <= {label.get_text() for label in axes.get_yticklabels()}


def test_one_entry_is_seen():
    figure = step_plot([100], Scale("loss", {"loss": [2.0]}, mean=True))
    assert named(figure.axes[0])["loss"].get_marker() == "o"


def test_steps_are_whole_and_grouped():
    figure = step_plot([1, 2, 1_000_000], Scale("loss", {"loss": [3, 2, 1]}))
    figure.draw_without_rendering()
    assert "1,000,000" in {label.get_text() for label in figure.axes[0].get_xticklabels()}
    figure = step_plot([1, 2], Scale("loss", {"loss": [3, 2]}))
    ticks = figure.axes[0].get_xticks()
    assert all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize("gap", [None, float("nan"), float("inf")])
def test_a_gap_spoils_no_running_mean(gap):
    losses = [4.0] * 40
    losses[10] = losses[11] = gap
    figure = loss_curve(range(40), losses)
    raw, mean = figure.axes[0].get_lines()
    assert mean.get_ydata()[9] == 4 and np.isnan(mean.get_ydata()[11]) and (mean.get_ydata()[12:] == 4).all()
    figure.draw_without_rendering()
    assert raw.get_ydata()[20] == 4


def test_error_curve_has_a_line_and_a_band_for_each_list_and_marks_the_best():
    rates = {"dev": [9.0, 4.0, 5.0], "clean": [None, 2.0, 3.0]}
    intervals = {"dev": ([7.0, 3.0, None], [30.0, 5.0, None])}
    figure = error_curve([10, 20, 30], rates, intervals=intervals, best=20)
    (axes,) = figure.axes
    assert legend(figure) == ["dev", "clean", "best (step 20)"]
    np.testing.assert_array_equal(named(axes)["dev"].get_ydata(), rates["dev"])
    np.testing.assert_array_equal(named(axes)["clean"].get_ydata(), [np.nan, 2, 3])
    assert list(named(axes)["best (step 20)"].get_xdata()) == [20, 20]
    (band,) = axes.collections
    assert band.get_datalim(axes.transData).ymin == 3 and band.get_datalim(axes.transData).ymax == 30
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 30
    assert legend(error_curve([10], {"dev": [9.0]})) == ["dev"]


def test_bad_input_is_named():
    with pytest.raises(InputError, match="one length above 0, got steps 2, wait 1, busy 2"):
        step_plot([1, 2], Scale("share", {"wait": [1.0], "busy": [1.0, 2.0]}))
    with pytest.raises(InputError, match="got steps 1, dev 0"):
        error_curve([1], {"dev": []})
    with pytest.raises(InputError, match="at least one system"):
        det_plot({})
    with pytest.raises(InputError, match="labels"):
        score_histogram([0.1, 0.2], [1, 1])
    with pytest.raises(InputError, match="one length above 0, got steps 2, loss 1"):
        loss_curve([1, 2], [0.5])
    with pytest.raises(InputError, match="got steps 0, loss 0"):
        loss_curve([], [])


def test_no_display_and_no_pyplot_is_needed(tmp_path):
    code = (
        "import sys; from spkfast.evaluation.plots import loss_curve; assert 'matplotlib' not in sys.modules;"
        "loss_curve([1, 2], [3, 2]).savefig('curve.png'); assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
