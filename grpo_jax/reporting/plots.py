"""Curves of one run, or of several in the same panels, as PNG."""

from collections.abc import Sequence
from pathlib import Path

from grpo_jax.reporting import metrics
from grpo_jax.reporting._figure import make_figure


def plot_runs(run_dirs: Sequence[str | Path], out_png: str | Path) -> Path:
    """The path of a PNG with the runs' curves in the same panels.

    Metrics that no run has are left out. Raises ValueError without any run, for a
    directory without metrics, and when there is nothing to draw.
    """
    if not run_dirs:
        raise ValueError("plot_runs needs at least one run directory, got none")
    histories = [metrics.read_metrics(run_dir) for run_dir in run_dirs]
    figure = make_figure(dict(zip(_labels(run_dirs), histories, strict=True)))
    path = Path(out_png)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _labels(run_dirs: Sequence[str | Path]) -> list[str]:
    """The runs' folder names, or whole paths where names alone would be the same."""
    paths = [Path(run_dir).resolve() for run_dir in run_dirs]
    labels = [path.name for path in paths]
    if len(set(labels)) == len(labels):
        return labels
    if len(set(paths)) < len(paths):
        raise ValueError(
            f"a run directory is given twice: {', '.join(map(str, paths))}"
        )
    return [str(path) for path in paths]
