from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from observe_trees import evaluated, make_tree, single

from system.config import Config
from system.flow.loop import FinishedStep
from system.observe import plots
from system.observe.recorder import Recorder
from system.observe.rundir import RunDir
from system.observe.sinks import RunFiles
from system.tree.stats import TreeStats


def record_a_run(run_dir: RunDir, config: Config, steps: int) -> None:
    recorder = Recorder(run_dir, config, [RunFiles(run_dir)])
    recorder.evaluated(0, evaluated(single("a", 0)), "before", 3.0, 1.0)
    recorder.training_began()
    for step in range(1, steps + 1):
        tree = TreeStats.of(make_tree(str(step), (1.0, 0.0, 0.5), version=step))
        recorder.tree_closed(tree, step)
        recorder.idle_total("learner", "trees", 0.1 * step)
        recorder.train_step(
            FinishedStep(step, [tree], {"loss": float("nan") if step == 2 else 1.0}, [step % 3])
        )
        recorder.flush(step)
    recorder.finish(ended=True)


@pytest.mark.parametrize("steps", [1, 45])
def test_every_curve_is_drawn_and_not_blank(run_dir: RunDir, config: Config, steps: int):
    record_a_run(run_dir, config, steps)
    files = plots.draw(run_dir)
    assert files[0].name == "overview.png"
    assert {file.stem for file in files[1:]} == {curve.name for curve in plots.CURVES}
    for file in files:
        assert imread(file).std() > 0.02


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved while a test runs."""
    figures: list[Figure] = []
    save = Figure.savefig

    def saving(figure: Figure, *args: Any, **options: Any) -> None:
        save(figure, *args, **options)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", saving)
    return figures


def test_a_legend_hides_no_data_and_hangs_over_no_edge(
    run_dir: RunDir, config: Config, figures: list[Figure]
):
    record_a_run(run_dir, config, 45)
    plots.draw(run_dir)
    legends = 0
    for ax in (ax for figure in figures for ax in figure.axes if ax.get_visible()):
        if legend := ax.get_legend():
            legends += 1
            inner, outer = legend.get_window_extent(), ax.get_window_extent()
            label, page = ax.xaxis.label.get_window_extent(), ax.get_figure(root=True)
            assert isinstance(page, Figure)
            title = ax.get_title("left")
            assert outer.x0 <= inner.x0, title
            assert inner.x1 <= outer.x1, title
            assert inner.y1 <= label.y0, title  # below the axis, its numbers and its label
            assert page.bbox.y0 <= inner.y0, title
    assert legends == 2 * len(plots.CURVES)


def test_an_accuracy_is_written_as_everywhere_else(run_dir: RunDir, config: Config, figures: list[Figure]):
    recorder = Recorder(run_dir, config, [RunFiles(run_dir)])
    singles = [single(f"{i}", int(i > 0)) for i in range(200)]
    recorder.evaluated(0, evaluated(*singles), "before", 3.0, 1.0)
    plots.draw(run_dir)
    assert "0.995" in {text.get_text() for text in figures[0].axes[0].texts}


def test_only_what_has_data_is_drawn(run_dir: RunDir, config: Config):
    recorder = Recorder(run_dir, config, [RunFiles(run_dir)])
    recorder.evaluated(0, evaluated(single("a", 0)), "before", 3.0, 1.0)
    assert {file.stem for file in plots.draw(run_dir)} == {"overview", "accuracy"}


def test_no_metrics_no_pictures(run_dir: RunDir):
    assert plots.draw(run_dir) == []
    assert list(run_dir.curves.iterdir()) == []


def test_smoothing_is_a_trailing_mean():
    assert plots.smooth([1, 2, 3, 4, 8], 3) == [1, 1.5, 2, 3, 5]
    assert plots.smooth([5.0, 7.0], 1) == [5.0, 7.0]
    assert plots.smooth([6.0, 12.0, 1.0], 2, [2.0, 1.0, 10.0]) == [6, 8, 2]


def test_drawing_leaves_an_importers_backend_alone():
    """A notebook that imports this must keep its own windows."""
    code = (
        "import matplotlib\nmatplotlib.use('svg')\n"
        "import system.observe.plots\nassert matplotlib.get_backend().lower() == 'svg'\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
