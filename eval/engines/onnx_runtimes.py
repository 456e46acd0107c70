"""The outputs and weights of an ONNX export in onnxruntime, and in OpenVINO.

The weight that a runtime computes with is the output of a graph of the layer's node alone, whose input is the identity.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compress.formats.export.onnx import FILE
from ...compress.formats.export.openvino import FILE as IR

Inputs = dict[str, Tensor]
Session = Callable[[Inputs], dict[str, Tensor]]  # input tensors by name -> the outputs that it was opened for


def onnxruntime_outputs(
    checkpoint: Path, ids: Tensor, layers: list[str], keep: Callable[[str, Tensor], None]
) -> Inputs:
    """`logits` and `hidden.N` of `ids` in onnxruntime; `keep` is called with the name and the weight of every layer."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(checkpoint))

    def open_session(model: Any, outputs: list[str]) -> Session:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

        def run(inputs: Inputs) -> dict[str, Tensor]:
            found = session.run(outputs, {name: values.numpy() for name, values in inputs.items()})
            return {name: torch.from_numpy(values) for name, values in zip(outputs, found, strict=True)}

        return run

    return _outputs(checkpoint, ids, layers, keep, open_session)


def openvino_outputs(checkpoint: Path, ids: Tensor, layers: list[str], keep: Callable[[str, Tensor], None]) -> Inputs:
    """The same in OpenVINO, in float32, from its own IR or by its ONNX front end."""
    import openvino  # pyright: ignore[reportMissingImports]  (installed in a separate environment)
    from openvino import opset13  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    graph = core.read_model(checkpoint / IR if (checkpoint / IR).exists() else checkpoint / FILE)
    nodes = {node.get_friendly_name(): node for node in graph.get_ordered_ops()}

    def outputs(model: Any, inputs: dict[str, Any], names: list[str]) -> Inputs:
        found = core.compile_model(model, "CPU", exact)(inputs)
        return {name: torch.from_numpy(found[name].copy()) for name in names}

    for name in layers:  # a graph of the layer alone; its input is the identity, or for a table all row numbers
        node = nodes["logits" if name == "lm_head" else name]  # the node of an output has the output's name
        table = node.get_type_name() == "Gather"
        weight = node.input_value(0 if table else 1)
        width = weight.get_shape()[0] if table or not node.get_attributes()["transpose_b"] else weight.get_shape()[1]
        if table:
            given = opset13.parameter([width], openvino.Type.i64)
            product = opset13.gather(weight, given, opset13.constant(0))
        else:
            given = opset13.parameter([width, width], openvino.Type.f32)
            product = opset13.matmul(given, weight, False, node.get_attributes()["transpose_b"])
        product.output(0).set_names({"served"})
        given.output(0).set_names({"given"})
        fed = torch.arange(width) if table else torch.eye(width)
        served = outputs(openvino.Model([product], [given]), {"given": fed.numpy()}, ["served"])["served"]
        keep(name, served if table else served.T.contiguous())
    hidden = [name for node in nodes.values() for each in node.outputs() for name in each.names]
    hidden = sorted(name for name in hidden if name.startswith("hidden."))
    graph.add_outputs(hidden)
    return outputs(graph, {"input_ids": ids.numpy()}, ["logits", *hidden])


def _outputs(
    checkpoint: Path,
    ids: Tensor,
    layers: list[str],
    keep: Callable[[str, Tensor], None],
    open_session: Callable[[Any, list[str]], Session],
) -> Inputs:
    import onnx

    model = onnx.load(checkpoint / FILE, load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    floats = onnx.TensorProto.FLOAT
    for name in layers:  # a graph of the one node; its input is the identity, or for a table all row numbers
        node = nodes[name]
        used = [stored[part] for part in node.input if part in stored]
        entry, table = next(part for part in node.input if part not in stored), node.op_type == "Gather"
        width = next((a.i for a in node.attribute if a.name == "K"), used[0].dims[0])
        kind, shape = (onnx.TensorProto.INT64, [width]) if table else (floats, ["rows", width])
        given = onnx.helper.make_tensor_value_info(entry, kind, shape)
        result = onnx.helper.make_tensor_value_info(node.output[0], floats, None)
        alone = onnx.helper.make_graph([node], name, [given], [result], used)
        one = onnx.helper.make_model(alone, opset_imports=model.opset_import, ir_version=model.ir_version)
        fed = torch.arange(width) if table else torch.eye(width)
        served = open_session(one, [node.output[0]])({entry: fed})[node.output[0]]
        keep(name, served if table else served.T.contiguous())
    hidden = [output for node in model.graph.node for output in node.output if output.startswith("hidden.")]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, floats, None) for name in hidden)
    return open_session(model, ["logits", *hidden])({"input_ids": ids})
