"""Tables on a terminal of 80 columns: names stay whole, and long ones are folded, not cut."""

import runpy
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from lmpress.eval.perplexity import Evaluation
from lmpress.eval.tables import WHOLE, speeds, table
from lmpress.eval.timing.speed import Speed

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
PROTOCOL = "ppl[python-stdlib heldout, win=512]"
FIGURES = Evaluation(
    6.9463,
    0.1234,
    32704,
    PROTOCOL,
    "0",
    12345.6,
    6.908,
    0.12,
    0.00431,
    0.00012,
    0.969,
    0.00553,
    0.00061,
    9.0,
    51200,
    327680,
)


@pytest.fixture(scope="module")
def demo() -> dict:
    return runpy.run_path(str(DEMO))


def rendered(found: RenderableType) -> str:
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(found)
    assert all(len(line) <= 80 for line in captured.get().splitlines())
    return captured.get()


def first_column(shown: str) -> list[str]:
    return [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]


def test_the_demo_shows_whole_names_and_figures(demo: dict) -> None:
    names = [demo["MODEL"].name, *(f"sample-{method}-w{bits}" for method, bits in demo["RUNS"])]
    figures = ("14.69 MB", "16.00", "6.908", "0.0811", "96.9%", "1234.5")
    shown = rendered(demo["comparison"]([(name, *figures) for name in names], PROTOCOL))
    lines = [line for line in shown.splitlines() if "14.69 MB" in line]
    assert len(names) == 5 and len(lines) == 5
    assert all(name in line and all(f in line for f in figures) for name, line in zip(names, lines, strict=True))
    assert all(word in shown for title in demo["TITLES"] for word in title.split()) and "…" not in shown


@pytest.mark.parametrize("name", ["sample-gptq-w4", "x" * WHOLE, "a-model-with-a-very-long-name-" * 4])
def test_names_of_models_are_never_cut(name: str) -> None:
    speed = Speed(name, {"c-avx512-vnni group": 56}, {"fused": 8}, 12345.6, 343.4, 29377792, 492150784, 1.5, 1.25)
    for found in (table({name: FIGURES}), speeds([speed])):
        assert name in "".join(first_column(rendered(found)))


def test_a_short_name_stays_in_one_line() -> None:
    assert "sample-gptq-w4-group-32" in first_column(rendered(table({"sample-gptq-w4-group-32": FIGURES})))
