"""Verdicts: the worst of what the layers, the run's own measurement and an evaluation say."""

from pathlib import Path

import pytest

import lmpress
from lmpress.compress.report.verdict import Verdict, of_evaluation, of_figures


@pytest.mark.parametrize(
    ("kl", "agreement", "word"),
    [
        (0.0, 1.0, "HEALTHY"),
        (0.3, 0.7, "HEALTHY"),
        (0.31, 0.9, "SUSPECT"),
        (0.1, 0.69, "SUSPECT"),
        (1.0, 0.9, "BROKEN"),
        (0.1, 0.4, "BROKEN"),
        (float("nan"), 0.9, "BROKEN"),
        (0.1, float("nan"), "BROKEN"),
    ],
)
def test_the_bounds(kl: float, agreement: float, word: str) -> None:
    assert of_figures(kl, agreement).word == word


def test_an_evaluation_makes_a_verdict_worse_or_replaces_a_missing_one() -> None:
    ruined, sound = {"kl": 5.0, "top1_agreement": 0.04}, {"kl": 0.01, "top1_agreement": 0.98}
    assert of_evaluation(Verdict("HEALTHY"), ruined).word == "BROKEN"
    assert of_evaluation(Verdict("UNMEASURED"), sound).word == "HEALTHY"
    assert of_evaluation(Verdict("SUSPECT", "a layer"), sound) == Verdict("SUSPECT", "a layer")
    assert of_evaluation(Verdict("HEALTHY"), {}).word == "HEALTHY"


def test_a_ruined_model_is_broken_and_a_faithful_one_healthy(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefghhgfedcbaacegbdfh" * 60)
    words = {
        sparsity: lmpress.prune(
            tiny, tmp_path / str(sparsity), method="magnitude", sparsity=sparsity, calib=str(text), seq_len=16
        ).verdict.word
        for sparsity in (0.01, 0.99)
    }
    assert words == {0.01: "HEALTHY", 0.99: "BROKEN"}
