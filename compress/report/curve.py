"""A plot of the held-out losses of a training."""

from collections.abc import Sequence
from pathlib import Path

from ...calibrate.model.safetensors_io import storage_errors

INCHES = (6.0, 3.5)


def save(curve: Sequence[tuple[int, float, float]], best_step: int, path: Path) -> str | None:
    """Draw the KL divergences of the `(step, loss, kl)` of `curve` into the PNG `path`.

    Returns None, or a message if matplotlib is not installed. Raises `CompressError` if the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "the losses were not plotted, because matplotlib is not installed: pip install lmpress[plot]"
    steps, divergences = [entry[0] for entry in curve], [entry[2] for entry in curve]
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, divergences, marker=".")
    axes.axvline(best_step, linewidth=0.8, color="black", linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step (dotted: the one that was kept)")
    axes.set_ylabel("KL to the teacher on held-out rows, nats per token")
    with storage_errors(path):
        figure.savefig(path, format="png")
    return None
