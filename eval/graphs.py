"""What the runtimes of ONNX graphs make of an export: onnxruntime, and OpenVINO's ONNX front end.

A layer's served weight comes from a graph of its one node, which is fed with the identity.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compress.formats.export.onnx import DATA, FILE

Inputs = dict[str, Tensor]
Session = Callable[[Inputs], dict[str, Tensor]]  # tensors by name to the outputs that it was opened for


def onnxruntime_outputs(
    checkpoint: Path, ids: Tensor, layers: list[str], keep: Callable[[str, Tensor], None]
) -> Inputs:
    """`logits` and the `hidden.N` as onnxruntime computes them; `keep` takes the served weight of every layer."""
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
    """The same as OpenVINO computes them in float32."""
    import openvino  # pyright: ignore[reportMissingImports]  (verified in an environment of its own)

    core = openvino.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}

    def open_session(model: Any, outputs: list[str]) -> Session:
        compiled = core.compile_model(core.read_model(_inlined(model, checkpoint).SerializeToString()), "CPU", exact)

        def run(inputs: Inputs) -> dict[str, Tensor]:
            found = compiled({name: values.numpy() for name, values in inputs.items()})
            return {name: torch.from_numpy(found[name].copy()) for name in outputs}

        return run

    return _outputs(checkpoint, ids, layers, keep, open_session)


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
    for name in layers:  # a graph of the one node, fed with the identity, or of a table with all its rows' numbers
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


def _inlined(model: Any, checkpoint: Path) -> Any:
    """The model with the values of the data file in it: OpenVINO finds none beside a graph that is no file."""
    from onnx.external_data_helper import load_external_data_for_model

    if (checkpoint / DATA).exists():
        load_external_data_for_model(model, str(checkpoint))
    return model
