"""A kind of weight is one record: a new one takes one file, and no other code distinguishes kinds."""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lmpress
from lmpress.compress.formats.checkpoint import Checkpoint
from lmpress.errors import UsageError
from lmpress.eval.dispatch_report import served
from lmpress.eval.inspect import inspect
from lmpress.kernels.modules.low_rank import LowRankLinear
from lmpress.recipes.schema import Recipe, build
from lmpress.recipes.scheme import QuantArgs, kinds

ROOT, FILE = Path(__file__).parents[2], Path(__file__).with_name("ternary.py")
WEIGHTS = {"bits": 2, "strategy": "channel", "group_size": None, "formula": "ternary"}
# Files that may distinguish kinds: the registry, their own files and formats, and the methods that make or train one kind.
OWN = (
    "recipes/scheme/kinds.py",
    "kernels/tensor/",
    "compress/formats/",
    *(f"compress/methods/quantize/{method}.py" for method in ("nf4", "llm_int8")),
    *(f"compress/methods/prune/{name}.py" for name in ("layers", "classifier")),
    *(f"compress/methods/reconstruct/{name}.py" for name in ("loop", "lorc")),
)


@pytest.fixture(scope="module")
def module() -> ModuleType:
    """The file of the new kind, which is not registered yet."""
    spec = importlib.util.spec_from_file_location("ternary", FILE)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["ternary"] = found  # dataclasses look their annotations up there
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def ternary(module: ModuleType) -> Iterator[ModuleType]:
    """The new kind while it is registered."""
    module.add()
    yield module
    kinds.unregister("ternary")


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """A Python in which the kind is registered, as a plug-in would be in every process."""
    script = tmp_path / "python"
    lines = (
        f"#!{sys.executable}",
        "import sys",
        f"sys.path.insert(0, {str(FILE.parent)!r})",
        "import ternary",
        "ternary.add()",
        "program = sys.argv[3]",
        "del sys.argv[1:4]",
        "exec(program)",
    )
    script.write_text("\n".join(lines))
    script.chmod(0o755)
    return script


def recipe(*after: dict[str, Any]) -> Recipe:
    calibration = {"data": "python-stdlib", "samples": 2, "seq_len": 16}
    return build({"passes": [{"method": "rtn", "scheme": {"weights": WEIGHTS}}, *after], "calibration": calibration})


def test_a_new_kind_takes_one_file(ternary: ModuleType, interpreter: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = lmpress.run(tiny, out, recipe())
    stored = Checkpoint.open(out)
    assert {args.kind for args in stored.layers.values()} == {"ternary"} and len(stored.layers) == 14
    assert {figures["bits"] for figures in report.layers} == {2}

    model = lmpress.load(out)
    for name in stored.layers:
        weight = stored.layer(name).dequantize()
        assert len(weight.unique()) > 3 >= max(len(row.unique()) for row in weight)
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
        layer = model.get_submodule(name)
        assert torch.allclose(layer(x), x @ weight.T, atol=1e-5)
        assert "ternary" in repr(layer) and torch.equal(layer.compressed.dequantize(), weight)
    assert torch.equal(model.half().float().get_submodule(name).compressed.dequantize(), weight)

    assert {linear.stored for linear in inspect(out).linears} == {"ternary, one scale per row"}
    assert {(each.stored.partition(",")[0], each.inputs) for each in served(out)} == {("ternary", "float")}
    card = (out / "README.md").read_text()
    assert "tags: [quantized, ternary, lmpress]" in card and "Ternary weights load in lmpress only." in card
    found = lmpress.verify(out, runtime=["lmpress"], python=interpreter)
    assert found.ok and found.findings[0].steps is not None and found.findings[0].steps < 1e-3


def test_what_works_on_any_kind_works_on_a_new_one(ternary: ModuleType, tiny: Path, tmp_path: Path) -> None:
    lmpress.run(tiny, tmp_path / "out", recipe({"method": "lorc", "rank": 2}))
    stored, model = Checkpoint.open(tmp_path / "out"), lmpress.load(tmp_path / "out")
    for name in stored.layers:
        layer, tensor = model.get_submodule(name), stored.layer(name)
        assert isinstance(layer, LowRankLinear) and tensor.args.kind == "low_rank"
        x = torch.randn(3, tensor.shape[1], generator=torch.Generator().manual_seed(0))
        assert torch.allclose(layer(x), x @ tensor.dequantize().T, atol=1e-5)


def test_runtimes_that_cannot_read_a_new_kind_are_refused(ternary: ModuleType, tiny: Path, tmp_path: Path) -> None:
    lmpress.run(tiny, tmp_path / "out", recipe(), target=["lmpress"])
    with pytest.raises(UsageError, match="cannot hold ternary weights"):
        lmpress.run(tiny, tmp_path / "other", recipe(), target=["vllm"])
    with pytest.raises(UsageError, match="gptq does not store ternary weights"):
        lmpress.export(tmp_path / "out", tmp_path / "gptq", format="gptq")
    assert not (tmp_path / "other").exists() and not (tmp_path / "gptq").exists()


def test_without_its_file_the_arguments_are_refused(module: ModuleType) -> None:
    with pytest.raises(UsageError, match="unknown formula 'ternary'; use one of: gptq, "):
        QuantArgs(2, strategy="channel", group_size=None, formula="ternary")
    module.add()
    kinds.unregister("ternary")
    with pytest.raises(UsageError, match="unknown formula 'ternary'"):
        build({"passes": [{"method": "rtn", "scheme": {"weights": WEIGHTS}}]})


@pytest.mark.parametrize("entry", [f.name for f in fields(kinds.Kind) if f.name not in kinds.OPTIONAL])
def test_a_record_with_a_gap_is_refused(module: ModuleType, entry: str) -> None:
    with pytest.raises(UsageError, match=f"the kind 'gap' has no {entry}"):
        kinds.register("gap", kinds.Words({"gap": (True,)}), replace(module.KIND, **{entry: None}))
    assert "gap" not in kinds.KINDS


@pytest.mark.parametrize("part", ["shape", "to", "dequantize"])
def test_a_tensor_class_with_a_gap_is_refused(module: ModuleType, part: str) -> None:
    parts = {name: None for name in ("shape", "to", "dequantize") if name != part}
    with pytest.raises(UsageError, match=rf"the kind 'gap' has no tensor\.{part}"):
        kinds.register("gap", kinds.Words({"gap": (True,)}), replace(module.KIND, tensor=type("Gap", (), parts)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nf4", kinds.Words({"new": (True,)})),
        ("new", kinds.Words({"ggml": (True,)})),
        ("new", kinds.Words({"new": (True,)}, {"nested": "float32"})),
    ],
    ids=["name", "formula", "scale_dtype"],
)
def test_what_belongs_to_another_kind_is_refused(module: ModuleType, name: str, words: kinds.Words) -> None:
    with pytest.raises(UsageError, match=r"already|belongs to another kind"):
        kinds.register(name, words, module.KIND)


@pytest.mark.parametrize("name", kinds.KINDS)
def test_every_line_has_a_record_without_a_gap(name: str) -> None:
    record = kinds.record(name)
    assert not [
        f.name for f in fields(record) if f.name not in kinds.OPTIONAL and getattr(record, f.name) in (None, "")
    ]
    assert all(hasattr(record.tensor, part) for part in kinds.OF_TENSORS)


def _told_apart(path: Path) -> Iterator[str]:
    """The lines in which a file compares `.kind` with the name of a kind, or tests for a kind's tensor class."""
    classes = {kind.tensor.__name__ for kind in kinds.all_kinds()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            words = {n.value for side in sides for n in ast.walk(side) if isinstance(n, ast.Constant)}
            found = any(isinstance(s, ast.Attribute) and s.attr == "kind" for s in sides) and words & kinds.KINDS.keys()
        else:
            asked = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
            found = asked and classes & {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        if found:
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def test_no_other_code_distinguishes_kinds() -> None:
    floors = ("recipes", "kernels", "calibrate", "compress", "eval")
    files = [path for floor in floors for path in (ROOT / floor).rglob("*.py")]
    assert [place for path in files for place in _told_apart(path) if not place.startswith(OWN)] == []
    assert any(True for path in files for _ in _told_apart(path)), "the search finds nothing at all"
