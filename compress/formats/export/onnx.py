"""A whole Llama as one ONNX graph whose quantized layers are onnxruntime's MatMulNBits (domain com.microsoft).

    B            uint8 [out, groups, group * bits / 8]      codes, the first in the low bits
    scales       float32 [out, groups]                      exactly our scales
    zero_points  uint8 [out, ceil(groups * bits / 8)]       left out for 4 bits symmetric, whose default 8 is ours

Groups must be a power of two of at least 16; other layers become float32 matrices, and the export lists them. The graph maps
`input_ids` int64 `[batch, length]` to `logits`; it has no cache of keys and values. `hidden.N` names the output of block N.
Weights lie in `model.onnx.data`, written one at a time.
"""

import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ....errors import UsageError
from ....kernels.packing.bitstream import pack_rows
from ....kernels.tensor import CompressedTensor
from ....recipes.scheme import QuantArgs, WeightArgs
from ..checkpoint import Checkpoint
from .gptq import zeros_of

FILE, DATA = "model.onnx", "model.onnx.data"
TABLE = "model.embed_tokens"
OPSET = 18
BITS = (2, 4, 8)


def supports(args: WeightArgs, width: int) -> bool:
    """Whether MatMulNBits can hold a weight of `width` columns."""
    if not isinstance(args, QuantArgs) or args.bits not in BITS or args.kind != "grid":
        return False
    group = args.columns_per_scale(width)
    return group >= 16 and group & (group - 1) == 0


def pack(tensor: CompressedTensor) -> dict[str, Tensor]:
    """The initializers of one layer: `B`, `scales` and, if they are needed, `zero_points`."""
    bits, groups = tensor.args.bits, tensor.scale.shape[1]
    parts = {"B": _bytes(tensor.codes, bits).unflatten(1, (groups, -1)), "scales": tensor.scale.float()}
    if bits != 4 or tensor.zero is not None:
        parts["zero_points"] = _bytes(zeros_of(tensor), bits)
    return parts


def _bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[out, n]` as bytes `[out, ceil(n * bits / 8)]`, the first in the low bits."""
    return pack_rows(codes, bits).view(torch.uint8)[:, : math.ceil(codes.shape[1] * bits / 8)].contiguous()


def write(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Write `folder/model.onnx` and its data. Returns what is not as asked. Raises `UsageError` for other models."""
    onnx = _library()
    config = checkpoint.model.config
    if config.model_type != "llama" or config.rope_parameters.get("rope_type", "default") != "default":
        raise UsageError(
            f"{checkpoint.source.path}: ONNX export does not know models of type {config.model_type} with these rotary "
            "embeddings",
            "it writes llama with default ones",
        )
    with (folder / DATA).open("wb") as data:
        graph = Llama(onnx, checkpoint, data).build()
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="lmpress")
    (folder / FILE).write_bytes(model.SerializeToString())
    dense = [n for n, args in checkpoint.layers.items() if not supports(args, checkpoint.shape(n)[1])]
    notes = ["whole sequences only: the graph has no cache of keys and values"]
    if dense:
        notes.append(f"no MatMulNBits has this grid: float32 matrices ({len(dense)} layers, such as {dense[0]})")
    return notes


def _library() -> Any:
    try:
        import onnx
        import onnx.helper
    except ModuleNotFoundError as error:
        raise UsageError("writing ONNX needs the package onnx", "pip install 'lmpress[onnx]'") from error
    return onnx


class Llama:
    """Builds the graph: nodes in order, and initializers whose values go to the data file at once."""

    def __init__(self, onnx: Any, checkpoint: Checkpoint, data: BinaryIO) -> None:
        self._onnx, self._checkpoint, self._data = onnx, checkpoint, data
        self._config: Any = checkpoint.model.config
        self._stored = checkpoint.others
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}

    def build(self) -> Any:
        """The graph."""
        config, helper, proto = self._config, self._onnx.helper, self._onnx.TensorProto
        self._constants()
        hidden = self._add("Gather", self._parameter(f"{TABLE}.weight"), "input_ids", name=TABLE)
        for index in range(config.num_hidden_layers):
            hidden = self._block(f"model.layers.{index}", hidden, f"hidden.{index}")
        self._head(self._norm("model.norm", hidden))
        ids = helper.make_tensor_value_info("input_ids", proto.INT64, ["batch", "length"])
        logits = helper.make_tensor_value_info("logits", proto.FLOAT, ["batch", "length", config.vocab_size])
        return helper.make_graph(self._nodes, "llama", [ids], [logits], list(self._initializers.values()))

    def _constants(self) -> None:
        """What all blocks share: the rotary tables and the causal mask, cut to the length of the input."""
        config = self._config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        frequency = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequency).repeat(1, 2)
        heads = torch.arange(config.num_key_value_heads).repeat_interleave(
            config.num_attention_heads // config.num_key_value_heads
        )
        for name, value in {
            "eps": torch.tensor(config.rms_norm_eps),
            "root": torch.tensor(math.sqrt(size)),
            "last": torch.tensor([-1]),
            "zero": torch.tensor([0]),
            "one": torch.tensor([1]),
            "half": torch.tensor([size // 2]),
            "end": torch.tensor([size]),
            "offset": torch.tensor(1),
            "lowest": torch.tensor(torch.finfo(torch.float32).min),
            "split": torch.tensor([0, 0, -1, size]),
            "join": torch.tensor([0, 0, -1]),
            "shared": heads,
            "angles.cos": angles.cos(),
            "angles.sin": angles.sin(),
        }.items():
            self._constant(name, value)
        length = self._add("Slice", self._add("Shape", "input_ids"), "one", self._constant("two", torch.tensor([2])))
        square = self._add("Concat", length, length, axis=0)
        self._mask = self._add("Trilu", self._add("Expand", "lowest", square), "offset", upper=1)
        self._cos, self._sin = (self._add("Slice", f"angles.{f}", "zero", length, "zero") for f in ("cos", "sin"))

    def _block(self, name: str, hidden: str, output: str) -> str:
        attended = self._attention(f"{name}.self_attn", self._norm(f"{name}.input_layernorm", hidden))
        middle = self._add("Add", hidden, attended)
        inner = self._norm(f"{name}.post_attention_layernorm", middle)
        gate = self._linear(f"{name}.mlp.gate_proj", inner)
        active = self._add("Mul", gate, self._add("Sigmoid", gate))
        product = self._add("Mul", active, self._linear(f"{name}.mlp.up_proj", inner))
        return self._add("Add", middle, self._linear(f"{name}.mlp.down_proj", product), output=output)

    def _attention(self, name: str, x: str) -> str:
        query, key, value = (self._heads(f"{name}.{part}_proj", x) for part in "qkv")
        query, key = self._rotate(query), self._add("Gather", self._rotate(key), "shared", axis=1)
        scores = self._add("MatMul", query, self._add("Transpose", key, perm=[0, 1, 3, 2]))
        scores = self._add("Add", self._add("Div", scores, "root"), self._mask)
        mixed = self._add("MatMul", self._add("Softmax", scores, axis=-1), self._add("Gather", value, "shared", axis=1))
        joined = self._add("Reshape", self._add("Transpose", mixed, perm=[0, 2, 1, 3]), "join")
        return self._linear(f"{name}.o_proj", joined)

    def _heads(self, name: str, x: str) -> str:
        return self._add("Transpose", self._add("Reshape", self._linear(name, x), "split"), perm=[0, 2, 1, 3])

    def _rotate(self, x: str) -> str:
        first = self._add("Slice", x, "zero", "half", "last")
        second = self._add("Slice", x, "half", "end", "last")
        turned = self._add("Concat", self._add("Neg", second), first, axis=-1)
        return self._add("Add", self._add("Mul", x, self._cos), self._add("Mul", turned, self._sin))

    def _norm(self, name: str, x: str) -> str:
        mean = self._add("ReduceMean", self._add("Mul", x, x), "last", keepdims=1)
        scaled = self._add("Div", x, self._add("Sqrt", self._add("Add", mean, "eps")))
        return self._add("Mul", scaled, self._parameter(f"{name}.weight"))

    def _head(self, x: str) -> None:
        if "lm_head" in self._checkpoint.layers:
            self._linear("lm_head", x, output="logits")
            return
        tied = TABLE if self._config.tie_word_embeddings else "lm_head"
        weight = self._add("Transpose", self._parameter(f"{tied}.weight"), perm=[1, 0])
        self._add("MatMul", x, weight, output="logits")

    def _linear(self, name: str, x: str, output: str | None = None) -> str:
        """`x W^T + bias`. The product's node carries the layer's name."""
        bias = f"{name}.bias"
        biased = bias in self._stored
        product = self._product(name, x, None if biased else output)
        return self._add("Add", product, self._parameter(bias), output=output) if biased else product

    def _product(self, name: str, x: str, output: str | None) -> str:
        rows, columns = self._checkpoint.shape(name)
        args = self._checkpoint.layers.get(name)
        if args is None or not supports(args, columns):
            weight = self._read(f"{name}.weight") if args is None else self._checkpoint.layer(name).dequantize()
            return self._add("MatMul", x, self._constant(f"{name}.weight", weight.T), output=output, name=name)
        tensor = self._checkpoint.layer(name)
        assert isinstance(tensor, CompressedTensor)
        parts = [self._constant(f"{name}.{part}", value) for part, value in pack(tensor).items()]
        grid = {"bits": tensor.args.bits, "block_size": tensor.args.columns_per_scale(columns)}
        return self._add(
            "MatMulNBits", x, *parts, K=columns, N=rows, **grid, output=output, name=name, domain="com.microsoft"
        )

    def _add(
        self, kind: str, *inputs: str, output: str | None = None, name: str = "", domain: str = "", **attributes: object
    ) -> str:
        result = output or f"{kind.lower()}.{len(self._nodes)}"
        node = self._onnx.helper.make_node(kind, list(inputs), [result], name=name, domain=domain, **attributes)
        self._nodes.append(node)
        return result

    def _parameter(self, name: str) -> str:
        """A tensor of the checkpoint, in float32."""
        if name not in self._initializers:
            layer = name.removesuffix(".weight")
            packed = layer in self._checkpoint.layers
            value = self._checkpoint.layer(layer).dequantize() if packed else self._read(name)
            self._constant(name, value)
        return name

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.source.read(self._stored[name], check=True).float()

    def _constant(self, name: str, value: Tensor) -> str:
        """An initializer; its values go to the data file, small ones stay in the graph (shapes must be seen there)."""
        values = value.contiguous().numpy()
        tensor = self._onnx.numpy_helper.from_array(values[:0] if values.nbytes >= 1024 else values, name)
        if values.nbytes >= 1024:
            tensor.ClearField("raw_data")
            tensor.dims[:] = list(values.shape)
            tensor.data_location = self._onnx.TensorProto.EXTERNAL
            where = {"location": DATA, "offset": str(self._data.tell()), "length": str(values.nbytes)}
            for key, text in where.items():
                tensor.external_data.add(key=key, value=text)
            self._data.write(values.data)
            self._data.write(b"\0" * (-values.nbytes % 64))
        self._initializers[name] = tensor
        return name
