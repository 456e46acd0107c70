"""MatMulNBits initializers against their description, and whole graphs in onnxruntime if it is installed."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lmpress
from lmpress.compress.formats.export import onnx
from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.errors import UsageError
from lmpress.recipes.scheme import QuantArgs


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", onnx.BITS)
def test_initializers_follow_the_description_of_the_operator(bits: int, symmetric: bool) -> None:
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(bits))
    tensor = round_to_nearest(weight, QuantArgs(bits=bits, symmetric=symmetric, group_size=32))
    parts = onnx.pack(tensor)
    assert parts["B"].shape == (4, 3, 32 * bits // 8) and parts["scales"].shape == (4, 3)
    assert ("zero_points" in parts) == (bits != 4 or not symmetric)

    def code(data: list[int], k: int) -> int:
        return data[k * bits // 8] >> (k * bits % 8) & (2**bits - 1)

    for row in range(4):
        zeros = parts["zero_points"][row].tolist() if "zero_points" in parts else [0x88] * 3
        served = [
            (code(parts["B"][row, g].tolist(), k) - code(zeros, g)) * float(parts["scales"][row, g])
            for g in range(3)
            for k in range(32)
        ]
        assert torch.equal(torch.tensor(served), tensor.dequantize()[row])


@pytest.mark.parametrize(
    ("args", "width", "held"),
    [
        (QuantArgs(group_size=32), 96, True),
        (QuantArgs(group_size=8), 96, False),
        (QuantArgs(group_size=48), 96, False),
        (QuantArgs(strategy="channel", group_size=None), 128, True),
        (QuantArgs(strategy="channel", group_size=None), 96, False),
        (QuantArgs(bits=3, group_size=32), 96, False),
    ],
)
def test_only_grids_that_the_operator_can_hold_are_packed(args: QuantArgs, width: int, held: bool) -> None:
    assert onnx.supports(args, width) is held


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_onnxruntime_computes_the_same(tmp_path: Path, tied: bool) -> None:
    """Biases, shared key heads, a layer without a MatMulNBits: weights equal, logits to rounding."""
    pytest.importorskip("onnxruntime")
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "model")
    lmpress.quantize(tmp_path / "model", tmp_path / "q", method="rtn", symmetric=False, group_size=64)
    report = lmpress.export(tmp_path / "q", tmp_path / "onnx", format="onnx")
    assert report.notes[0] == "whole sequences only: the graph has no cache of keys and values"
    assert "2 layers, such as model.layers.0.mlp.down_proj" in report.notes[1]
    (finding,) = lmpress.verify(tmp_path / "onnx", against=tmp_path / "q", runtime=["onnxruntime"]).findings
    assert finding.ok and finding.steps < 1e-4 and finding.outputs.logits < 1e-4 and finding.block is None, finding


def test_other_models_are_refused(tmp_path: Path, assets: Path) -> None:
    pytest.importorskip("onnx")
    with pytest.raises(UsageError, match="does not know models of type gpt2"):
        lmpress.export(assets / "models" / "babygpt-shakespeare-gpt2", tmp_path / "onnx", format="onnx")
    assert not any(tmp_path.iterdir())
