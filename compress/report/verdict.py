"""Whether a result can be trusted: from its predictions against those of the original, and from the figures of its layers.

The bounds come from `benchmarks/verdicts.py` (docs/measurements.md): trained models, rounded to 2, 3, 4 and 8 bits and
pruned by magnitude to 30, 50, 70 and 95 %. A divergence of `d` nats per token multiplies the perplexity by about `exp(d)`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

BROKEN_KL, SUSPECT_KL = 1.0, 0.3  # nats per token: the perplexity is about 2.7 times, 1.35 times that of the original
BROKEN_AGREEMENT, SUSPECT_AGREEMENT = 0.4, 0.7  # share of the tokens for which both predict the same next token
BROKEN_ERROR = 0.9  # a layer whose output differs by nine tenths of its norm carries no signal
OUTLYING_ERROR = 10.0  # times the median layer's error

BEFORE_TRAINING = "_before_training"  # the end of the name of a figure from before a layer was trained
Figures = dict[str, float | int | str]
Word = Literal["HEALTHY", "UNMEASURED", "SUSPECT", "BROKEN"]
RANKS: tuple[Word, ...] = ("HEALTHY", "UNMEASURED", "SUSPECT", "BROKEN")


class Measured(Protocol):
    """The predictions of a result against those of the original: `Fidelity`, or an evaluation against the original."""

    @property
    def kl(self) -> float | None: ...

    @property
    def top1_agreement(self) -> float | None: ...


@dataclass(frozen=True)
class Verdict:
    """HEALTHY, UNMEASURED, SUSPECT or BROKEN, and the reason for it."""

    word: Word
    reason: str = ""


def output_errors(layers: Sequence[Figures]) -> dict[str, float]:
    """The relative output error of every layer that was solved for, by its name.

    If the layer was trained, the error from before the training: afterwards only the whole block approximates the original.
    """
    found = {}
    for layer in layers:
        error = layer.get("relative_error", layer.get(f"relative_error{BEFORE_TRAINING}"))
        if error is not None:
            found[str(layer["name"])] = float(error)
    return found


def judge(layers: Sequence[Figures], measured: Sequence[Measured] = (), unmeasured: str = "") -> Verdict:
    """The worst of what the layers' figures and the measurements say; `unmeasured` is why there is no measurement."""
    found = [of_layers(layers), *map(of_predictions, measured)]
    if not any(each.kl is not None for each in measured):
        found.append(
            Verdict("UNMEASURED", unmeasured or "the predictions were not compared with those of the original")
        )
    return worse(*found)


def worse(*verdicts: Verdict) -> Verdict:
    """The worst of the verdicts, the first of equal ones."""
    return max(verdicts, key=lambda verdict: RANKS.index(verdict.word))


def of_evaluation(verdict: Verdict, figures: Mapping[str, Any]) -> Verdict:
    """A verdict after an evaluation against the original, whose figures are those of its JSON."""
    kl, agreement = figures.get("kl"), figures.get("top1_agreement")
    if kl is None or agreement is None:
        return verdict
    measured = of_figures(float(kl), float(agreement))
    return measured if verdict.word == "UNMEASURED" else worse(verdict, measured)


def of_predictions(measured: Measured) -> Verdict:
    """Judge by the divergence and the agreement of the predictions."""
    kl, agreement = measured.kl, measured.top1_agreement
    return Verdict("HEALTHY") if kl is None or agreement is None else of_figures(kl, agreement)


def of_figures(kl: float, agreement: float) -> Verdict:
    """Judge by a divergence in nats per token and the share of tokens with the same prediction; NaN is BROKEN."""
    said = f"KL divergence {kl:.3g} nats per token, same next token {agreement:.1%}"
    if not kl < BROKEN_KL or not agreement > BROKEN_AGREEMENT:
        return Verdict("BROKEN", f"the predictions are not those of the original: {said}")
    if kl > SUSPECT_KL or agreement < SUSPECT_AGREEMENT:
        return Verdict("SUSPECT", f"the predictions are far from those of the original: {said}")
    return Verdict("HEALTHY")


def of_layers(layers: Sequence[Figures]) -> Verdict:
    """Judge by the relative output errors of the layers, and by the layers for which the solver fell back to rounding."""
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


def figures_of(verdict: Verdict, fidelity: Any) -> dict[str, Any]:
    """The verdict and its measurement, for report.json."""
    return {"verdict": verdict.word, "reason": verdict.reason} | (
        {} if fidelity is None else {"fidelity": fidelity.as_dict()}
    )
