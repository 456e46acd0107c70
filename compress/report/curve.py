"""The held-out losses of a training as a picture."""

from collections.abc import Sequence
from pathlib import Path

from ...calibrate.model.safetensors_io import storage_errors

INCHES = (6.0, 3.5)


def save(curve: Sequence[tuple[int, float, float]], best_step: int, path: Path) -> str | None:
    """Draw the KL divergence of `[step, loss, kl]` into the PNG `path`; without matplotlib, say what is missing instead."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture of the losses, which needs matplotlib: pip install lmpress[plot]"
    steps, divergences = [entry[0] for entry in curve], [entry[2] for entry in curve]
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, divergences, marker=".")
    axes.axvline(best_step, linewidth=0.8, color="black", linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step (dotted: the one that was kept)")
    axes.set_ylabel("KL to the teacher on held-out rows, nats a token")
    with storage_errors(path):
        figure.savefig(path, format="png")
    return None
