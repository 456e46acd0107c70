"""The page of the taxonomy says what the code does: written again, it is the same."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lmpress.errors import UsageError
from lmpress.recipes.scheme import CACHED, INPUTS, STRATEGIES, WEIGHTS, CacheScheme, QuantArgs, Role, Scheme

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("taxonomy", DOCS / "taxonomy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(writer: ModuleType) -> None:
    written = (DOCS / "taxonomy.md").read_text(encoding="utf-8")
    assert written == writer.page(), "run: python docs/taxonomy.py"
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
