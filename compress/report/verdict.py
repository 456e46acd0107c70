"""Whether a result can be trusted, judged by the figures of its layers alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

BROKEN_ERROR = 0.9  # a layer whose output is off by nine tenths of its norm carries no signal
OUTLYING_ERROR = 10.0  # times the median layer's error

BEFORE_TRAINING = "_before_training"  # suffix of the figures that a layer had before it was trained
Figures = dict[str, float | int | str]


@dataclass(frozen=True)
class Verdict:
    """HEALTHY, SUSPECT or BROKEN, and the layer that decided it."""

    word: Literal["HEALTHY", "SUSPECT", "BROKEN"]
    reason: str = ""


def output_errors(layers: Sequence[Figures]) -> dict[str, float]:
    """The relative output error of every solved layer, by its name.

    If a layer was trained afterwards, it is the error before the training: training a block defines no error of one layer.
    """
    found = {}
    for layer in layers:
        error = layer.get("relative_error", layer.get(f"relative_error{BEFORE_TRAINING}"))
        if error is not None:
            found[str(layer["name"])] = float(error)
    return found


def judge(layers: Sequence[Figures]) -> Verdict:
    """Judge by the relative output errors and by the fallbacks of the solver."""
    errors = output_errors(layers)
    if not errors:
        return Verdict("HEALTHY")
    worst = max(errors, key=lambda name: errors[name])
    median = sorted(errors.values())[len(errors) // 2]
    if not errors[worst] < BROKEN_ERROR:
        return Verdict("BROKEN", f"{worst} has a relative output error of {errors[worst]:.2f} (median {median:.3f})")
    unseen = [str(layer["name"]) for layer in layers if layer.get("tokens") == 0]
    if unseen:
        return Verdict(
            "SUSPECT", f"no calibration token reached {len(unseen)} layers, which were rounded: {', '.join(unseen[:3])}"
        )
    fallen = [str(layer["name"]) for layer in layers if "fallback" in layer]
    if fallen:
        return Verdict(
            "SUSPECT", f"{len(fallen)} layers were rounded, because solving made them worse: {', '.join(fallen[:3])}"
        )
    if errors[worst] > OUTLYING_ERROR * median and errors[worst] > 0.1:
        return Verdict("SUSPECT", f"{worst} has a relative output error of {errors[worst]:.2f} (median {median:.3f})")
    return Verdict("HEALTHY")
