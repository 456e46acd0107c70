"""Evaluations as a table for people."""

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from .perplexity import Evaluation

ABSENT = "-"


def table(evaluations: Mapping[str, Evaluation]) -> Table:
    """One line per evaluation, by the model's name; the caption is the protocol, or every line's where they differ."""
    protocols = {name: each.protocol for name, each in evaluations.items()}
    shared = len(set(protocols.values())) == 1
    lines = set(protocols.values()) if shared else [f"{name}: {protocol}" for name, protocol in protocols.items()]
    # Text, not str: rich would read the brackets of a protocol or of a name as markup.
    result = Table(caption=Text("\n".join(lines)), caption_justify="left")
    for title in ("model", "perplexity ±", "KL to base ±", "top-1", "Δnll ±", "tok/s"):
        result.add_column(title, justify="left" if title == "model" else "right")
    for name, each in evaluations.items():
        result.add_row(Text(name), *_cells(each))
    return result


def _cells(figures: Evaluation) -> list[str]:
    return [
        _with_error(figures.perplexity, figures.perplexity_stderr, "z.3f"),
        _with_error(figures.kl, figures.kl_stderr, "z.5f"),
        ABSENT if figures.top1_agreement is None else f"{figures.top1_agreement:.2%}",
        _with_error(figures.nll_difference, figures.nll_difference_stderr, "+z.5f"),
        f"{figures.tokens_per_second:,.0f}",
    ]


def _with_error(value: float | None, error: float | None, form: str) -> str:
    if value is None:
        return ABSENT
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form.removeprefix('+')}}"
