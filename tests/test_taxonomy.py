"""The taxonomy: its page has every cell, and every cell is taken or refused with the reason that the page gives."""

from pathlib import Path

import pytest

from lmpress.errors import UsageError
from lmpress.recipes.scheme import CACHED, INPUTS, STRATEGIES, WEIGHTS, CacheScheme, QuantArgs, Role, Scheme

DOCS = Path(__file__).parents[1] / "docs"


def test_every_cell_of_the_taxonomy_has_a_row() -> None:
    written = (DOCS / "taxonomy.md").read_text(encoding="utf-8")
    rows = [line for line in written.splitlines() if line.startswith(("| tensor", "| channel", "| group", "| token"))]
    assert all(line.count("|") == 8 for line in rows) and len({tuple(r.split("|")[1:3]) for r in rows}) == 8


@pytest.mark.parametrize("role", [WEIGHTS, INPUTS, CACHED], ids=lambda role: role.name)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_every_cell_is_taken_or_refused_with_its_reason(role: Role, strategy: str, dynamic: bool) -> None:
    group = 32 if strategy == "group" else None
    formula = "signed" if role is INPUTS or role is CACHED else "gptq"
    args = QuantArgs(8, True, strategy, group, formula=formula, dynamic=dynamic)  # type: ignore[arg-type]
    cache = (lambda a: CacheScheme(values=a)) if dynamic else (lambda a: CacheScheme(keys=a))
    make = {WEIGHTS.name: Scheme, INPUTS.name: lambda a: Scheme(inputs=a), CACHED.name: cache}
    reason = role.reason(strategy, dynamic)  # type: ignore[arg-type]
    if reason is None:
        make[role.name](args)
    else:
        with pytest.raises(UsageError) as refused:
            make[role.name](args)
        assert reason in str(refused.value)
