"""Timings as a picture."""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ...calibrate.model.safetensors_io import storage_errors
from ...errors import UsageError
from .bench import Bench, Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES_PER_BAR, WIDTH = 0.22, 5.0


def save(found: Bench, path: Path) -> None:
    """Draw the ratios to the baseline, a dense product of torch, into `path`, in the format of its suffix (.svg, .png, .pdf).

    One row of charts per shape, one column per number of input rows. Raises `UsageError` if matplotlib is missing, or for a
    suffix that it does not support.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("--plot needs matplotlib", "pip install lmpress[plot]") from error
    panels = [list(each) for _, each in groupby(found.timings, key=lambda t: (t.rows, t.columns, t.inputs))]
    shapes = list(dict.fromkeys((panel[0].rows, panel[0].columns) for panel in panels))
    columns = len(panels) // len(shapes)
    height = INCHES_PER_BAR * (max(map(len, panels)) + 4) * len(shapes)
    figure = Figure(figsize=(WIDTH * columns, height), layout="constrained")
    if path.suffix.removeprefix(".") not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"--plot expects a file that ends in .svg, .png or .pdf, got {path.name}")
    for axes, panel in zip(figure.subplots(len(shapes), columns, squeeze=False).flat, panels, strict=True):
        _draw(axes, [timing for timing in panel if timing.ratio is not None])
    figure.supxlabel(f"times as fast as torch {found.machine.dtype} ({found.machine.name})")
    with storage_errors(path):
        figure.savefig(path)


def _draw(axes: "Axes", panel: list[Timing]) -> None:
    ratios = [timing.ratio or 0.0 for timing in panel]
    bars = axes.barh([timing.name for timing in panel], ratios)
    axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.axvline(1, linewidth=0.8, color="black")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(ratios))
    axes.set_title(f"{panel[0].rows} x {panel[0].columns}, {panel[0].inputs} row(s)")
