"""Sparse storage: round trips, and sizes that the plan predicts before a weight is read."""

import pytest
import torch

from lmpress.calibrate.model.safetensors_io import TensorSpec
from lmpress.compress.formats.kinds import pruned as sparse
from lmpress.compress.methods.prune.masks import smallest
from lmpress.errors import CompressError, UsageError
from lmpress.kernels.modules.linear import PrunedLinear
from lmpress.kernels.tensor import PrunedTensor
from lmpress.recipes.scheme import PruneArgs


def pruned(args: PruneArgs, rows: int, columns: int) -> PrunedTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    resolved = args.for_layer(columns, torch.float32, "layer")
    return PrunedTensor.of(weight, smallest(weight.abs(), resolved), resolved)


CASES = [
    (PruneArgs(0.5, storage="bitmask"), 6, 16),
    (PruneArgs(0.73, storage="bitmask", scope="row"), 5, 13),
    (PruneArgs(0.5, storage="bitmask", scope="block", dtype="bfloat16"), 4, 301),
    (PruneArgs(0.0, storage="bitmask"), 1, 1),
    (PruneArgs(pattern="4:8", storage="bitmask"), 3, 20),
    (PruneArgs(pattern="2:4", storage="2:4"), 6, 16),
    (PruneArgs(pattern="2:4", storage="2:4", dtype="float32"), 3, 20),
    (PruneArgs(pattern="2:4", storage="2:4"), 3, 22),
    (PruneArgs(0.5), 3, 8),
]


@pytest.mark.parametrize(("args", "rows", "columns"), CASES)
def test_round_trip_and_exact_size(args: PruneArgs, rows: int, columns: int) -> None:
    tensor = pruned(args, rows, columns)
    packed = sparse.pack("x", tensor)
    assert {name: TensorSpec.of(t) for name, t in packed.items()} == sparse.spec("x", tensor.args, rows, columns)
    back = sparse.unpack("x", packed, tensor.args)
    assert torch.equal(back.values, tensor.values)
    assert torch.equal(back.kept, tensor.kept)


def test_the_bits_follow_the_layout() -> None:
    kept = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    args = PruneArgs(0.6, storage="bitmask", dtype="float16")
    packed = sparse.pack("x", PrunedTensor.of(torch.arange(1.0, 11).unsqueeze(0), ~kept, args))
    assert packed["x.weight_bitmask"].tolist() == [[0b00001001, 0b00000011]]
    assert packed["x.weight_values"].tolist() == [1, 4, 9, 10]
    kept = torch.tensor([[0, 1, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    args = PruneArgs(pattern="2:4", storage="2:4", dtype="float16")
    packed = sparse.pack("x", PrunedTensor.of(torch.arange(1.0, 9).unsqueeze(0), ~kept, args))
    assert packed["x.weight_places"].tolist() == [[0b0100_1101]]
    assert packed["x.weight_values"].tolist() == [[2, 4, 5, 6]]


def test_a_kept_zero_is_stored() -> None:
    args = PruneArgs(pattern="2:4", storage="2:4").for_layer(4, torch.float16, "layer")
    kept = torch.tensor([[True, False, False, True]])
    tensor = PrunedTensor.of(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), ~kept, args)
    assert torch.equal(sparse.unpack("x", sparse.pack("x", tensor), args).kept, kept)


def test_a_damaged_bitmask_is_refused() -> None:
    tensor = pruned(PruneArgs(0.5, storage="bitmask"), 4, 8)
    packed = sparse.pack("x", tensor)
    packed["x.weight_bitmask"][0, 0] ^= 1
    with pytest.raises(CompressError, match="marks"):
        sparse.unpack("x", packed, tensor.args)


def test_the_config_names_every_pruned_layer_and_no_dense_one() -> None:
    mask, dense = PruneArgs(0.5, storage="bitmask", dtype="float16"), PruneArgs(0.5)
    config = sparse.quantization_config({"a": mask, "b": mask, "c": dense}, ["head"])
    assert config is not None and sparse.wrote(config)
    assert sparse.read_config(config, {}) == {"a": mask, "b": mask}
    assert sparse.quantization_config({"c": dense}, []) is None


def test_the_module_serves_what_is_stored() -> None:
    tensor = pruned(PruneArgs(0.5, storage="bitmask"), 6, 16)
    bias = torch.nn.Parameter(torch.arange(6.0))
    module = PrunedLinear(tensor, bias)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(module(x), x @ tensor.values.float().T + bias)
    assert torch.equal(module.compressed.values, tensor.values) and torch.equal(module.compressed.kept, tensor.kept)


@pytest.mark.parametrize(
    "values", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"pattern": "4:4"}, {"pattern": "half"}, {"storage": "2:4"}]
)
def test_contradictions_are_refused(values: dict) -> None:
    with pytest.raises(UsageError):
        PruneArgs(**values)


def test_a_group_without_the_dtype_of_its_values_is_refused() -> None:
    group = {"targets": ["x"], "weights": {"pattern": "2:4", "storage": "2:4"}}
    with pytest.raises(ValueError, match="the group of x has no dtype"):
        sparse.read_config({"config_groups": [group]}, {})
