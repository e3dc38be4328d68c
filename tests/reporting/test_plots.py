import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.reporting import metrics
from grpo_jax.reporting._figure import make_figure, to_svg
from grpo_jax.reporting._panels import PANELS, trend
from grpo_jax.reporting.plots import plot_runs


def _axes(figure, title):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}[title]


def test_trend_is_the_mean_of_the_last_values_by_hand():
    # 100 values: a window of 4. Then entry 3 is (0+1+2+3)/4, entry 4 is (1+2+3+4)/4.
    values = [float(i) for i in range(100)]
    assert trend(values)[:5] == [0.0, 0.5, 1.0, 1.5, 2.5]
    assert trend(values)[-1] == 97.5


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=24))
def test_short_curves_are_not_smoothed(values):
    np.testing.assert_allclose(trend(values), values, atol=1e-6)


def test_each_run_is_a_line_with_its_own_values_and_a_band():
    few = [
        {"step": 0, "eval/accuracy": 0.1},
        {"step": 1, "reward": 0.2, "reward_std": 0.1, "kl": None},
        {"step": 2, "reward": 0.4, "reward_std": 0.3, "eval/accuracy": 0.5},
    ]
    other = [{"step": 1, "reward": 1.0}, {"step": 3, "reward": 3.0, "grad_norm": 2.0}]
    figure = make_figure({"few": few, "other": other})
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Reward", "Held-out accuracy", "Gradient norm"]  # no KL: all null
    reward = _axes(figure, "Reward")
    lines = {line.get_label(): line.get_xydata().tolist() for line in reward.lines}
    assert lines == {
        "few": [[1.0, 0.2], [2.0, 0.4]],
        "other": [[1.0, 1.0], [3.0, 3.0]],
    }
    (band,) = reward.collections
    corners = band.get_paths()[0].vertices
    # 0.2 -+ 0.1 and 0.4 -+ 0.3
    assert corners[:, 1].min() == pytest.approx(0.1)
    assert corners[:, 1].max() == pytest.approx(0.7)
    accuracy = _axes(figure, "Held-out accuracy").lines[0]
    assert accuracy.get_xydata().tolist() == [[0.0, 0.1], [2.0, 0.5]]
    assert accuracy.get_marker() == "o"
    assert len({line.get_color() for line in reward.lines}) == 2
    for axes in figure.axes:
        assert axes.get_xlabel() == "step" and axes.get_ylabel()
        assert axes.get_xlim() == figure.axes[0].get_xlim()


def test_several_reward_functions_have_a_panel_each():
    def run(**means):
        line = {"step": 1, "reward": 1.0, "rewards/neat/std": 0.1, "grad_norm": 1.0}
        return [line | {f"rewards/{name}/mean": mean for name, mean in means.items()}]

    def titles(**runs):
        return [axes.get_title(loc="left") for axes in make_figure(runs).axes]

    one = run(neat=0.25)
    assert titles(one=one) == ["Reward", "Gradient norm"]  # it is the reward
    both = titles(one=one, two=run(neat=0.5, right=0.75))
    assert both == ["Reward", "Reward: neat", "Reward: right", "Gradient norm"]
    neat = _axes(make_figure({"two": run(neat=0.5, right=0.75)}), "Reward: neat")
    assert neat.lines[0].get_ydata().tolist() == [0.5]


def test_a_flat_curve_is_not_drawn_on_a_scale_of_hundredths():
    flat = [{"step": i, "reward": i, "kl": 0.0} for i in range(3)]
    low, high = _axes(make_figure({"a": flat}), "KL to the reference").get_ylim()
    assert low < 0.0 < 0.9 < high


def test_a_flat_curve_is_flat_when_its_running_mean_is_rounded():
    flat = [{"step": i, "kl": 0.8} for i in range(120)]
    low, high = _axes(make_figure({"a": flat}), "KL to the reference").get_ylim()
    assert low < 0.8 < 1.7 < high


def test_the_name_of_a_reward_is_no_formula_and_moves_no_cursor(tmp_path):
    line = {"step": 1, "rewards/$x$/mean": 1.0, "rewards/\x1b[1m$/mean": 2.0}
    figure = make_figure({"a": [line]})
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Reward: $x$", "Reward: \\x1b[1m$"]
    assert ">Reward: $x$<" in to_svg(figure)  # and no italic x


def test_the_same_figure_is_the_same_svg():
    history = [{"step": i, "reward": i % 7, "reward_std": 1.0} for i in range(50)]
    svgs = {to_svg(make_figure({"a": history})) for _ in range(2)}
    assert len(svgs) == 1 and svgs.pop().startswith("<svg")


def test_legend_names_every_run_once_and_one_run_is_the_title():
    history = [{"step": 1, "reward": 1.0, "kl": 0.1}]
    several = make_figure({"a": history, "b": history, "c": history})
    (legend,) = several.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]
    single = make_figure({"mine": history})
    assert single.get_suptitle() == "mine" and not single.legends


def test_legend_covers_no_panel(tmp_path):
    history = [{"step": 1, "reward": 1.0}, {"step": 2, "reward": 2.0}]
    figure = make_figure({"a": history, "b": history})
    figure.savefig(tmp_path / "plot.png")
    box = figure.legends[0].get_window_extent()
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_many_steps_keep_the_single_values_beside_their_trend():
    values = [float(step % 7) for step in range(100)]
    history = [{"step": step, "kl": value} for step, value in enumerate(values)]
    raw, smooth = _axes(make_figure({"a": history}), "KL to the reference").lines
    assert raw.get_ydata().tolist() == values
    assert smooth.get_ydata().tolist() == trend(values)


def test_more_runs_than_colors_still_look_different():
    history = [{"step": 1, "reward": 1.0}, {"step": 2, "reward": 2.0}]
    figure = make_figure({f"run {index}": history for index in range(20)})
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 20


def test_run_directories_become_a_picture(tmp_path, synthetic):
    runs = [
        synthetic.write_run(tmp_path / "long", steps=60, completions=False),
        synthetic.write_run(
            tmp_path / "short", steps=1, evaluations=False, completions=False, seed=1
        ),
    ]
    path = plot_runs(runs, tmp_path / "plots" / "runs.png")
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[:2] > (600, 1200)
    # ink of the first run's color, #0072B2, is there
    blue = np.array([0x00, 0x72, 0xB2]) / 255
    assert (np.abs(picture[..., :3] - blue).max(axis=-1) < 0.02).sum() > 200


def test_equal_names_of_runs_are_told_apart_by_their_paths(tmp_path):
    for parent in ("x", "y"):
        (tmp_path / parent / "run").mkdir(parents=True)
        (tmp_path / parent / "run" / metrics.METRICS_FILE).write_text(
            '{"step": 1, "kl": 0.5}\n'
        )
    plot_runs([tmp_path / "x/run", tmp_path / "y/run"], tmp_path / "plot.png")
    with pytest.raises(ValueError, match="given twice"):
        plot_runs([tmp_path / "x/run", tmp_path / "x/run"], tmp_path / "plot.png")


def test_nothing_to_draw_is_an_error_that_names_the_metrics(tmp_path):
    with pytest.raises(ValueError, match=rf"no run has any of {PANELS[0].metric}"):
        make_figure({"empty": [{"step": 1, "other": 2.0}]})
    with pytest.raises(ValueError, match="at least one run"):
        plot_runs([], tmp_path / "plot.png")
