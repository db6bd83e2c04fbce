"""Token states or scores from an .onnx file, by OpenVINO's own reader: for architectures without a builder here."""

import openvino as ov
from openvino import opset13 as op
from openvino.frontend import FrontEndManager

from embedmesh.engine.folder import Folder
from embedmesh.engine.layout import find_onnx
from embedmesh.rules.errors import SetupError

ONNX_STATES = ("last_hidden_state", "token_embeddings")  # what exporters call the output we want
ONNX_LOGITS = "logits"
ONNX_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def build(folder: Folder, ids: ov.Output, mask: ov.Output, types: ov.Output | None = None) -> ov.Output:
    """Token states [rows, length, hidden], or logits [rows, 1] of a reranker whose head the file has.

    Raises SetupError for a file that OpenVINO or we do not understand.
    """
    file = find_onnx(folder.transformer)
    if file is None:
        raise SetupError(f"Model folder {folder.path.name} has no model.onnx.")
    try:
        reader = FrontEndManager().load_by_framework("onnx")  # by name: else every reader there is tries the file
        model = reader.convert(reader.load(str(file)))
    except Exception as error:  # noqa: BLE001 - the reader has many classes for them
        line = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
        raise SetupError(f"OpenVINO cannot read {file.name}: {line.strip()[:200]}") from None
    _connect_inputs(model, file.name, {"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
    if folder.reranks and not folder.dense:
        return op.convert(_find_logits(model, file.name), "f32").output(0)
    states = _find_states(model, file.name)
    width = states.get_partial_shape()[2]
    hidden = folder.dense[0].inputs if folder.dense else folder.width
    if width.is_static and width.get_length() != hidden:
        raise SetupError(f"{file.name} gives {width.get_length()} components a token, and config.json says {hidden}.")
    return op.convert(states, "f32").output(0)


def _connect_inputs(model: ov.Model, file: str, ours: dict[str, ov.Output | None]) -> None:
    """Replace the file's inputs by ours, in the types that it needs. Without token types, all are 0."""
    named = {_name(port): port for port in model.inputs}
    if unknown := set(named) - set(ONNX_INPUTS):
        raise SetupError(f"{file} has the input {sorted(unknown)[0]!r}, which this version does not know.")
    if missing := set(ONNX_INPUTS[:2]) - set(named):
        raise SetupError(f"{file} has no input {sorted(missing)[0]!r}.")
    for name, port in named.items():
        shape = port.get_partial_shape()
        if shape.rank.is_dynamic or len(shape) != 2 or any(size.is_static for size in shape):
            raise SetupError(f"{file} takes {name} in the shape {shape} only; export it with dynamic rows and length.")
        source = ours[name]
        if source is None:
            source = op.broadcast(op.constant(0), op.shape_of(ours["input_ids"])).output(0)
        given = op.convert(source, port.get_element_type().get_type_name()).output(0)
        for target in port.get_node().output(0).get_target_inputs():
            target.replace_source_output(given)


def _find_states(model: ov.Model, file: str) -> ov.Output:
    """What flows into the output of token states: the one of a known name, else the first of three axes."""
    outputs = sorted(model.outputs, key=lambda port: not port.get_names() & set(ONNX_STATES))
    for port in outputs:
        shape = port.get_partial_shape()
        if shape.rank.is_static and len(shape) == 3:
            return port.get_node().input_value(0)
    raise SetupError(f"{file} has no output of token states ({' or '.join(ONNX_STATES)}).")


def _find_logits(model: ov.Model, file: str) -> ov.Output:
    """What flows into the output of one number a row."""
    for port in model.outputs:
        if ONNX_LOGITS in port.get_names():
            shape = port.get_partial_shape()
            if shape.rank.is_static and len(shape) == 2 and shape[1].is_static and shape[1].get_length() == 1:
                return port.get_node().input_value(0)
            raise SetupError(f"{file} gives {ONNX_LOGITS} in the shape {shape}; a reranker's is [rows, 1].")
    raise SetupError(f"{file} has no output {ONNX_LOGITS!r}: export it for sequence classification.")


def _name(port: ov.Output) -> str:
    return str(port.get_any_name()) if port.get_names() else ""
