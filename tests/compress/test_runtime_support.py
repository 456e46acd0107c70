"""Targets refuse before any work, name the layers, and propose a setting; a proposed setting is accepted."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lmpress
from lmpress.cli import app
from lmpress.compress.plan import LayerPlan
from lmpress.compress.runtime_support import TARGETS, check
from lmpress.errors import UsageError
from lmpress.recipes.scheme import QuantArgs, inputs_per, signed_weights


def block(args: dict[str, QuantArgs | None] | QuantArgs, hidden: int = 128, inner: int = 256) -> list[LayerPlan]:
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    shapes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    each = args if isinstance(args, dict) else dict.fromkeys(shapes, args)
    return [LayerPlan(f"m.0.{name}", 0, "Linear", shape, each.get(name), 0) for name, shape in shapes.items()]


NF4 = QuantArgs(strategy="flat", group_size=64, formula="nf4", scale_dtype="nested")


@pytest.mark.parametrize("target", TARGETS)
def test_four_bits_symmetric_in_groups_of_32_serve_wherever_grids_do(target: str) -> None:
    check(block(NF4 if target == "bitsandbytes" else QuantArgs(group_size=32)), [target])


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        ("transformers", QuantArgs(bits=3), r"m.0.q_proj and 6 more as pack-quantized: 3 bits; use --bits 4"),
        ("transformers", QuantArgs(symmetric=False), r"asymmetric weights; leave --asymmetric out"),
        ("llamacpp", QuantArgs(group_size=16), r"as gguf: groups of 16; use --group-size 32"),
        ("gptqmodel", QuantArgs(strategy="channel", group_size=None), r"groups of 128; use --group-size 128"),
        ("onnxruntime", QuantArgs(bits=3, group_size=32), r"as onnx: 3 bits; use --bits 4"),
    ],
)
def test_the_layers_and_the_remedy_are_named(target: str, args: QuantArgs, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(block(args), [target])


@pytest.mark.parametrize(
    ("targets", "args", "remedy"),
    [
        (["vllm", "llamacpp"], QuantArgs(bits=3, symmetric=False, group_size=16), "use --bits 4 --group-size 32"),
        (["bitsandbytes"], QuantArgs(group_size=32), "use --method nf4"),
        (["bitsandbytes"], QuantArgs(bits=7, group_size=32), "use --bits 8 --group-size -1"),
        (["transformers", "mlx"], NF4, "use --method gptq --group-size 64"),
        (["sglang", "gptqmodel"], QuantArgs(bits=5), "use --bits 4"),
        (["sglang", "onnxruntime"], QuantArgs(bits=2, symmetric=False, group_size=8), "use --bits 4 --group-size 32"),
    ],
)
def test_the_proposal_serves_every_target_at_once(targets: list[str], args: QuantArgs, remedy: str) -> None:
    with pytest.raises(UsageError) as refused:
        check(block(args), targets)
    assert remedy in str(refused.value)
    bits = re.search(r"--bits (\d)", remedy)
    group = re.search(r"--group-size (-?\d+)", remedy)
    size = int(group[1]) if group else args.group_size
    followed = QuantArgs(
        bits=int(bits[1]) if bits else args.bits,
        symmetric=args.symmetric or "leave --asymmetric out" in str(refused.value),
        strategy="channel" if size == -1 else "group",
        group_size=None if size == -1 else size,
    )
    check(block(NF4 if "nf4" in remedy else followed), targets)


def test_quantized_inputs_need_a_runtime_that_rounds_them() -> None:
    layers = block(signed_weights("channel"))
    token, static = inputs_per("token", dynamic=True), inputs_per("tensor", dynamic=False)
    for inputs in (token, static):
        check(layers, ["lmpress", "transformers", "vllm", "sglang"], inputs)
        with pytest.raises(UsageError, match=r"gptqmodel cannot serve m.0.q_proj and 6 more .*inputs quantized per"):
            check(layers, ["gptqmodel"], inputs)
    with pytest.raises(UsageError, match="inputs quantized per dynamic tensor"):
        check(layers, ["transformers"], inputs_per("tensor", dynamic=True))


def test_asymmetric_weights_are_served_in_the_format_that_reads_them() -> None:
    """vLLM reads asymmetric weights only as AWQ, which has 4 bits: 8 bits are refused in every format."""
    check(block(QuantArgs(symmetric=False)), ["vllm"])
    with pytest.raises(UsageError, match="vllm cannot serve"):
        check(block(QuantArgs(bits=8, symmetric=False)), ["vllm"])


def test_projections_that_are_joined_share_a_scheme() -> None:
    mixed = dict.fromkeys(("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), QuantArgs(group_size=32))
    with pytest.raises(UsageError, match=r"m.0.v_proj .*differs from m.0.q_proj"):
        check(block(mixed), ["vllm"])
    check(block(mixed), ["transformers", "llamacpp"])
    check(block(mixed | {"v_proj": QuantArgs(group_size=32), "o_proj": QuantArgs(bits=8)}), ["vllm"])


def test_layers_whose_width_no_block_divides_must_stay_dense() -> None:
    args = {"down_proj": QuantArgs(strategy="channel", group_size=None)}
    with pytest.raises(UsageError, match=r"groups of 172; use --keep 'm.0.down_proj'"):
        check(block(args, hidden=64, inner=172), ["llamacpp"])


def test_unknown_targets_are_refused_with_similar_names() -> None:
    with pytest.raises(UsageError, match=r"unknown target 'llama.cpp'; did you mean llamacpp"):
        check([], ["llama.cpp"])


def test_quantize_refuses_before_any_work(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="llamacpp cannot serve"):
        lmpress.quantize(tiny, tmp_path / "out", method="rtn", target=["llamacpp"])
    command = ["quantize", str(tiny), "--method", "rtn", "--bits", "3", "--target", "transformers,vllm"]
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out")])
    assert done.exit_code == 2 and "transformers cannot serve" in done.output and "hint: use " in done.output
    assert not (tmp_path / "out").exists()
