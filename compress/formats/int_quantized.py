"""compressed-tensors' layouts of layers whose inputs are quantized too: `int-quantized` (W8A8) and, for other weights,
`pack-quantized` (see `pack_quantized.py`).

P.weight            int8 [out, in]                   codes - 128: w = scale * code                      (int-quantized only)
P.weight_scale      [out, 1] in the scale's dtype    a scale of the whole matrix is repeated            (int-quantized only)
P.input_scale       [1] in the scale's dtype         static scales of inputs only
P.input_zero_point  int8 [1]                         zero - 2**(bits-1); static, asymmetric inputs only

Dynamic input scales are found by whoever serves the checkpoint: lmpress divides the largest magnitude by 127,
compressed-tensors by 127.5.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...calibrate.model.safetensors_io import NAMES, TensorSpec
from ...kernels.tensor import CompressedTensor
from ...recipes.scheme import QuantArgs
from . import pack_quantized
from .registry import Format

NAME = "int-quantized"
MIXED = "mixed-precision"  # what compressed-tensors calls a checkpoint whose groups have different formats
OFFSET = 128  # of the unsigned codes in memory


def holds_int8(args: QuantArgs) -> bool:
    """Whether weights of `args` are stored as int8, not packed."""
    return args.kind == "grid" and args.bits == 8 and args.strategy in ("channel", "tensor") and args.symmetric


@dataclass(frozen=True)
class IntQuantized:
    """The format for layers whose inputs are quantized by `inputs`."""

    inputs: QuantArgs

    def supports(self, args: QuantArgs) -> str | None:
        """Why the format cannot hold a weight compressed by `args`, or None if it can."""
        if args.kind != "grid":
            return f"{NAME} holds codes with plain scales only, not {args.kind} weights"
        return None if holds_int8(args) else pack_quantized.supports(args)

    def spec(self, name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
        """The tensors that `pack` will give for a `rows` x `columns` weight."""
        if holds_int8(args):
            tensors = {
                f"{name}.weight": TensorSpec("I8", (rows, columns)),
                f"{name}.weight_scale": TensorSpec(NAMES[args.torch_scale_dtype], (rows, 1)),
            }
        else:
            tensors = pack_quantized.spec(name, args, rows, columns)
        if not self.inputs.dynamic:
            tensors[f"{name}.input_scale"] = TensorSpec(NAMES[self.inputs.torch_scale_dtype], (1,))
            if not self.inputs.symmetric:
                tensors[f"{name}.input_zero_point"] = TensorSpec("I8", (1,))
        return tensors

    def pack(self, name: str, tensor: CompressedTensor) -> dict[str, Tensor]:
        """The tensors of one quantized weight and, if it is static, the grid of its inputs."""
        if holds_int8(tensor.args):
            packed = {
                f"{name}.weight": (tensor.codes.to(torch.int16) - OFFSET).to(torch.int8),
                f"{name}.weight_scale": tensor.scale,
            }
        else:
            packed = pack_quantized.pack(name, tensor)
        if tensor.input_grid is not None:
            scale, zero = tensor.input_grid
            packed[f"{name}.input_scale"] = scale
            if not self.inputs.symmetric:
                packed[f"{name}.input_zero_point"] = (zero - self._middle).to(torch.int8)
        return packed

    def unpack(self, name: str, tensors: Mapping[str, Tensor], args: QuantArgs) -> CompressedTensor:
        """The inverse of `pack`."""
        if holds_int8(args):
            codes = (tensors[f"{name}.weight"].to(torch.int16) + OFFSET).to(torch.uint8)
            weight = CompressedTensor(codes, tensors[f"{name}.weight_scale"], None, args)
        else:
            weight = pack_quantized.unpack(name, tensors, args)
        grid = None
        if not self.inputs.dynamic:
            scale = tensors[f"{name}.input_scale"]
            zero = torch.zeros(1) if self.inputs.symmetric else tensors[f"{name}.input_zero_point"].float()
            grid = scale, zero + self._middle
        return replace(weight, inputs=self.inputs, input_grid=grid)

    def quantization_config(self, compressed: Mapping[str, QuantArgs], ignored: Iterable[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        config: dict[str, Any] = pack_quantized.quantization_config(compressed, ignored)
        for group, args in zip(config["config_groups"].values(), dict.fromkeys(compressed.values()), strict=True):
            group["format"] = NAME if holds_int8(args) else pack_quantized.NAME
            group["input_activations"] = {
                "num_bits": self.inputs.bits,
                "type": "int",
                "symmetric": self.inputs.symmetric,
                "strategy": self.inputs.strategy,
                "group_size": None,
                "dynamic": self.inputs.dynamic,
            }
        formats = {group["format"] for group in config["config_groups"].values()}
        return config | {"format": formats.pop() if len(formats) == 1 else MIXED}

    @property
    def _middle(self) -> int:
        return 2 ** (self.inputs.bits - 1)


def of_inputs(plain: Format, inputs: QuantArgs | None) -> Format:
    """The format of weights that `plain` stores if inputs stay as they are; with quantized inputs one that refuses them."""
    return plain if inputs is None else IntQuantized(inputs)


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's `quantization_config` has layers with quantized inputs."""
    if config.get("quant_method") != "compressed-tensors":
        return False
    inputs = any(group.get("input_activations") for group in config.get("config_groups", {}).values())
    return config.get("format") == NAME or (inputs and config.get("format") in (pack_quantized.NAME, MIXED))


def of_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> IntQuantized:
    """The format as a checkpoint describes it. Raises `ValueError` as `read_inputs` does."""
    return IntQuantized(read_inputs(config, stored))


def read_inputs(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> QuantArgs:
    """How the layers' inputs are quantized. Raises `ValueError` for kinds that lmpress does not serve."""
    kinds = [group["input_activations"] for group in config["config_groups"].values()]
    if not kinds[0] or any(kind != kinds[0] for kind in kinds):
        raise ValueError("its layers' inputs are not all quantized alike")
    if kinds[0]["type"] != "int":
        raise ValueError("only integer inputs are served")
    static = next((spec.torch_dtype for name, spec in stored.items() if name.endswith(".input_scale")), torch.float16)
    return QuantArgs(
        bits=kinds[0]["num_bits"],
        symmetric=kinds[0]["symmetric"],
        strategy=kinds[0]["strategy"],
        group_size=None,
        formula="signed" if kinds[0]["symmetric"] else "gptq",
        scale_dtype=str(static).removeprefix("torch."),
        dynamic=bool(kinds[0]["dynamic"]),
    )


def read_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, QuantArgs]:
    """The weight arguments of every int8 or packed layer among the `stored` tensors. Raises `ValueError` as `read_inputs`."""
    groups = config["config_groups"].values()
    found = {}
    for name in [
        n.removesuffix(".weight") for n, spec in stored.items() if n.endswith(".weight") and spec.dtype == "I8"
    ]:
        weights = pack_quantized.weights_of(name, groups)
        if weights is None or weights["type"] != "int" or not weights["symmetric"]:
            raise ValueError(f"{name} is in none of the groups of symmetric integers")
        scale = stored.get(f"{name}.weight_scale")
        found[name] = QuantArgs(
            bits=weights["num_bits"],
            strategy=weights["strategy"],
            group_size=None,
            formula="signed",
            scale_dtype=str(torch.float16 if scale is None else scale.torch_dtype).removeprefix("torch."),
        )
    if any(name.endswith(".weight_packed") for name in stored):
        weights_alone = {key: group | {"input_activations": None} for key, group in config["config_groups"].items()}
        found |= pack_quantized.read_config({**config, "config_groups": weights_alone}, stored)
    return found
