"""The choice of a kernel: by data, after a self-test, visible, and never an error for want of a compiler."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmpress.errors import UsageError
from lmpress.kernels import dispatch, selftest
from lmpress.kernels.cpu import library
from lmpress.kernels.kernel import Capabilities, Kernel, KernelSpec, Product, Unavailable
from lmpress.kernels.reference import REFERENCE, ReferenceProduct
from lmpress.kernels.torch_int4 import INT4
from lmpress.kernels.weight import Weight

NEED = KernelSpec(bits=4, group=32)


class Halved(ReferenceProduct):
    """Wrong by a factor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


class Saturating(ReferenceProduct):
    """Right for ordinary inputs only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-100, 100))


class Forgetful(ReferenceProduct):
    """Right, but cannot give its codes back."""

    def codes(self) -> torch.Tensor:
        return super().codes() ^ 1


def unavailable(weight, need) -> Product:
    raise Unavailable("the moon is not full")


def named(name: str, prepare) -> Kernel:
    return Kernel(name, REFERENCE.serves, prepare)


@pytest.mark.parametrize("product", [Halved, Saturating, Forgetful])
def test_a_kernel_that_fails_its_self_test_is_passed_over_and_named(product, caplog: pytest.LogCaptureFixture) -> None:
    broken = named(product.__name__, product)
    with caplog.at_level(logging.WARNING):
        choice = dispatch.choose(NEED, kernels=(broken, REFERENCE))
    assert choice.kernel is REFERENCE
    assert [name for name, _ in choice.passed_over] == [product.__name__]
    assert "self-test failed" in str(choice)
    assert "torch-dequantize serves instead" in caplog.text


class Misplaced(ReferenceProduct):
    """Takes the bilevel scales of a tile of rows from the tile before it."""

    def __init__(self, weight: Weight, need: KernelSpec) -> None:
        assert weight.levels is not None
        scale, _ = replace(weight.levels, grids=weight.levels.grids.roll(1, 0)).two(weight.shape[0])
        super().__init__(replace(weight, scale=scale.values(torch.float32)), need)


@pytest.mark.parametrize("part", ["levels", "columns", "residual"])
def test_every_part_of_a_weight_is_tested(part) -> None:
    need = KernelSpec(8, 64, part != "levels", activations="token", parts=(part,))
    right = Kernel("right", REFERENCE.serves, ReferenceProduct)
    wrong = {
        "levels": replace(right, prepare=Misplaced),
        "columns": replace(right, mixes=True),  # it claims to multiply them, and does not
        "residual": replace(right, added=lambda residual, y, x: y),
    }
    assert selftest.failure(right, need) is None
    assert "error" in (selftest.failure(wrong[part], need) or "")


def test_a_forced_kernel_must_pass_too() -> None:
    broken = named("forced and wrong", Halved)
    with pytest.raises(UsageError, match="self-test failed"):
        dispatch.choose(NEED, "forced and wrong", (broken, REFERENCE))
    with pytest.raises(UsageError, match=r"no kernel is called 'nonsense'; there are .*torch-dequantize"):
        dispatch.choose(NEED, "nonsense")


def test_the_reason_why_no_faster_kernel_serves_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    missing = named("missing", unavailable)
    with caplog.at_level(logging.WARNING):
        for bits in (2, 3, 4):
            dispatch.choose(replace(NEED, bits=bits), kernels=(missing, REFERENCE))
    assert caplog.text.count("the moon is not full; torch-dequantize serves instead") == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 3}, "bits 3"),
        ({"group": 64}, "group 64"),
        ({"symmetric": False}, "symmetric False"),
        ({"codebook": True}, "codebook bits 4"),
        ({"activations": "token"}, "activations token"),
        ({"device": "cuda"}, "device cuda"),
        ({"dtype": torch.bfloat16}, "dtype torch.bfloat16"),
    ],
)
def test_what_a_kernel_serves_is_data(change: dict, reason: str) -> None:
    serves = Capabilities(
        bits=frozenset({4}),
        activations=frozenset({"float"}),
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float32}),
        groups=frozenset({32}),
        symmetric=frozenset({True}),
    )
    assert serves.refusal(NEED) is None
    assert serves.refusal(replace(NEED, **change)) == f"{reason} not served"


@pytest.mark.parametrize("need", [
    NEED,
    KernelSpec(4, 128, symmetric=False, activations="group"),
    KernelSpec(3, 16, symmetric=False),
    KernelSpec(2, 64, activations="group", dtype=torch.bfloat16),
    KernelSpec(8, 4096, activations="token", steps=127.5),
    KernelSpec(4, 64, codebook=True, dtype=torch.float16),
    KernelSpec(5, 43),
    KernelSpec(8, 200, activations="token", parts=("columns",)),
    KernelSpec(8, 200, activations="token", dtype=torch.bfloat16, parts=("columns",)),
    KernelSpec(3, 16, symmetric=False, parts=("levels", "residual")),
    KernelSpec(4, 32, symmetric=False, activations="group", dtype=torch.float16, parts=("levels", "residual")),
], ids=str)  # fmt: skip
def test_something_serves_every_need_and_all_that_run_here_agree_with_float64(need: KernelSpec) -> None:
    refusals = {kernel.name: dispatch.refusal(kernel, need) for kernel in dispatch.KERNELS}
    assert refusals["torch-dequantize"] is None
    assert not [name for name, refused in refusals.items() if refused and "self-test" in refused.reason]


def forget_what_was_found() -> None:
    for function in (library._load, library.instruction_sets, dispatch.refusal):
        function.cache_clear()


def test_a_build_that_fails_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fails(source: Path) -> None:
        tried.append(source)
        raise Unavailable("broken compiler")

    monkeypatch.setattr(library, "load", fails)
    forget_what_was_found()
    try:
        for bits in (2, 3, 4):
            assert dispatch.choose(replace(NEED, bits=bits)).kernel is REFERENCE
        assert tried == [library.SOURCE]
    finally:
        monkeypatch.undo()
        forget_what_was_found()


def test_without_a_compiler_the_next_kernel_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog) -> None:
    """int8 activations allowed: torch's int4 product; exact: dequantizing. One warning, no error."""
    monkeypatch.setenv("PATH", str(tmp_path))
    forget_what_was_found()
    try:
        with caplog.at_level(logging.WARNING):
            quick = dispatch.choose(KernelSpec(4, 128, activations="group"))
            exact = dispatch.choose(KernelSpec(4, 128))
        assert (quick.kernel.name, exact.kernel.name) == ("torch-int4-bf16", "torch-dequantize")
        assert "no C compiler found: install gcc or clang" in caplog.text
    finally:
        monkeypatch.undo()
        forget_what_was_found()


@pytest.mark.parametrize("width", [64, 172])
def test_without_a_compiler_rows_need_not_be_whole_groups(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (37, width), generator=generator, dtype=torch.uint8)
    weight = Weight(codes, torch.rand(37, -(-width // 32), generator=generator) + 0.1, None, 4, 32)
    x, need = torch.randn(3, width, generator=generator), KernelSpec.of(weight, "group")
    product = INT4.prepare(weight, need)
    assert selftest.relative_error(product(x), weight, x, need) < INT4.tolerance
    assert torch.equal(product.codes(), codes)


def test_the_self_test_sees_saturation_at_the_ends_only() -> None:
    """Ordinary inputs would not have shown the error."""
    weight, x = selftest.extremes(NEED)
    wrong = Saturating(weight, NEED)
    assert selftest.relative_error(wrong(x[5:]), weight, x[5:], NEED) < 1e-5
    assert selftest.relative_error(wrong(x), weight, x, NEED) > 1e-2
