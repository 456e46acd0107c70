"""The layout of `pack-quantized`: round trips, exact specs, and the compressed-tensors library's own reading of it."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import dequantize

from lmpress.calibrate.model.safetensors_io import NAMES, TensorSpec
from lmpress.compress.formats import pack_quantized as packed
from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.kernels.tensor import CompressedTensor
from lmpress.recipes.scheme import QuantArgs, Strategy

ROWS, COLUMNS = 19, 172  # odd sizes: streams along both axes end inside a word
STRATEGIES: list[tuple[Strategy, int | None]] = [("group", 43), ("group", 4), ("channel", None), ("tensor", None)]


def quantized(args: QuantArgs) -> CompressedTensor:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(args.bits)) + 0.3
    return round_to_nearest(weight, args)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("strategy", "size"), STRATEGIES)
@pytest.mark.parametrize("scale", ["float16", "float32"])
def test_round_trip_and_spec(bits: int, symmetric: bool, strategy: Strategy, size: int | None, scale: str) -> None:
    args = QuantArgs(bits, symmetric, strategy, size, scale_dtype=scale)
    tensor = quantized(args)
    tensors = packed.pack("layer", tensor)
    assert {n: TensorSpec.of(t) for n, t in tensors.items()} == packed.spec("layer", args, ROWS, COLUMNS)
    back = packed.unpack("layer", tensors, args)
    assert torch.equal(back.codes, tensor.codes) and torch.equal(back.scale, tensor.scale)
    assert (back.zero is None) == (tensor.zero is None) == symmetric
    assert back.zero is None or torch.equal(back.zero, tensor.zero)
    assert torch.equal(back.dequantize(), tensor.dequantize())
    assert back.codes.unique().numel() > 2


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("strategy", "size"), STRATEGIES[:3])
def test_the_library_unpacks_and_dequantizes_to_our_weight(
    bits: int, symmetric: bool, strategy: Strategy, size: int | None
) -> None:
    args = QuantArgs(bits, symmetric, strategy, size, scale_dtype="float32")
    tensor = quantized(args)
    tensors = packed.pack("layer", tensor)
    shape = torch.Size(tensors["layer.weight_shape"].tolist())
    codes = unpack_from_int32(tensors["layer.weight_packed"], bits, shape)
    assert torch.equal(codes.int() + 2 ** (bits - 1), tensor.codes.int())
    zero = None
    if not symmetric:
        groups = torch.Size((ROWS, tensor.scale.shape[1]))
        zero = unpack_from_int32(tensors["layer.weight_zero_point"], bits, groups, packed_dim=0)
        assert tensor.zero is not None and torch.equal(zero.int() + 2 ** (bits - 1), tensor.zero.int())
    theirs = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size)
    weight = dequantize(codes, tensors["layer.weight_scale"], zero, theirs)
    assert torch.equal(weight, tensor.dequantize())


def test_signed_codes_of_the_library_span_our_unsigned_ones() -> None:
    """Their signed codes and our unsigned ones are the same numbers: no code falls outside their range."""
    for bits in (2, 4, 8):
        codes = torch.arange(2**bits, dtype=torch.uint8).repeat(2, 1)
        tensor = CompressedTensor(codes, torch.ones(2, 1), None, QuantArgs(bits, True, "channel", None))
        theirs = unpack_from_int32(packed.pack("x", tensor)["x.weight_packed"], bits, torch.Size(tensor.shape))
        assert theirs[0].tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


def stored(layers: Iterable[str], scales: torch.dtype = torch.float16) -> dict[str, TensorSpec]:
    """The headers of packed layers that are needed to read the config."""
    packed_ones = {f"{name}.weight_packed": TensorSpec("I32", (1, 1)) for name in layers}
    return packed_ones | {f"{name}.weight_scale": TensorSpec(NAMES[scales], (1, 1)) for name in layers}


def test_mixed_arguments_form_groups_that_the_library_accepts_and_we_read_back() -> None:
    wide = QuantArgs(4, True, "group", 32)
    every = {
        "a.q": wide,
        "a.k": wide,
        "a.down": replace(wide, group_size=43),
        "b.q": QuantArgs(8, True, "channel", None),
    }
    config = packed.quantization_config(every, ["lm_head"])
    checked = QuantizationConfig.model_validate(config)
    assert {tuple(group.targets): group.weights.group_size for group in checked.config_groups.values()} == {
        ("a.q", "a.k"): 32,
        ("a.down",): 43,
        ("b.q",): None,
    }
    assert packed.read_config(config, stored(every)) == every


def test_one_kind_of_arguments_targets_every_linear() -> None:
    args = QuantArgs(3, False, "group", 64, scale_dtype="bfloat16")
    config = packed.quantization_config({"a": args, "b": args}, ["z", "lm_head"])
    assert config["ignore"] == ["lm_head", "z"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    assert packed.read_config(config, stored(["b"], torch.bfloat16)) == {"b": args}


def test_a_scale_of_the_whole_tensor_is_stored_once_per_row() -> None:
    tensor = quantized(QuantArgs(4, True, "tensor", None))
    tensors = packed.pack("x", tensor)
    assert tensors["x.weight_scale"].shape == (ROWS, 1) and tensors["x.weight_scale"].unique().numel() == 1
    config = packed.quantization_config({"x": tensor.args}, [])
    read = packed.read_config(config, stored(["x"]))["x"]
    assert read.strategy == "channel"
    assert torch.equal(packed.unpack("x", tensors, read).dequantize(), tensor.dequantize())


def test_grids_that_the_format_cannot_hold_are_refused_with_the_reason() -> None:
    assert "real ones" in (packed.supports(QuantArgs(symmetric=False, formula="spqr")) or "")
    assert "token" in (packed.supports(QuantArgs(strategy="token", group_size=None)) or "")
    assert packed.supports(QuantArgs()) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "int-quantized"},
        {"config_groups": {}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}}},
        {"config_groups": {"group_0": {"targets": ["re:y.*"], "weights": {"num_bits": 4, "type": "int"}}}},
    ],
    ids=["format", "no-groups", "float", "pattern"],
)
def test_other_quantizations_are_not_read(changes: dict[str, object]) -> None:
    config = packed.quantization_config({"x": QuantArgs()}, []) | changes
    for group in config["config_groups"].values():
        group.pop("format", None)  # the one of the whole config counts then
    with pytest.raises(ValueError, match=r"quant|pack"):
        packed.read_config(config, stored(["x"]))


def test_configs_of_other_tools_are_not_taken_for_ours() -> None:
    config = packed.quantization_config({"x": QuantArgs()}, [])
    assert packed.wrote(config)
    assert not packed.wrote(config | {"quant_method": "gptq"})


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("input_activations", {"num_bits": 8}),
        ("output_activations", {"num_bits": 8}),
        ("format", "int-quantized"),
        ("weights", {"num_bits": 4, "type": "int", "actorder": "group"}),
    ],
    ids=["inputs", "outputs", "format", "actorder"],
)
def test_groups_with_more_than_packed_weights_are_not_read(part: str, value: object) -> None:
    config = packed.quantization_config({"x": QuantArgs()}, [])
    config["config_groups"]["group_0"][part] = value
    with pytest.raises(ValueError, match="no group of its layers is pack-quantized"):
        packed.read_config(config, stored(["x"]))
