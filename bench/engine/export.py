"""The ONNX form of a BERT folder: `python export.py FOLDER FILE`, under sentence-transformers' Python."""

import sys
from typing import Any

import torch
from transformers import AutoModel

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
OPSET = 17  # the first with LayerNormalization


class States(torch.nn.Module):  # type: ignore[misc]
    """The model as FastEmbed calls it: three tensors in, token states out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Any, mask: Any, types: Any) -> Any:
        return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state


def main(folder: str, file: str) -> None:
    """Write the file."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()  # what ONNX Runtime knows to fuse
    example = torch.ones(2, 7, dtype=torch.long)
    free = {0: "rows", 1: "length"}
    torch.onnx.export(
        States(model),
        (example, example, torch.zeros_like(example)),
        file,
        input_names=INPUTS,
        output_names=["last_hidden_state"],
        dynamic_axes=dict.fromkeys([*INPUTS, "last_hidden_state"], free),
        opset_version=OPSET,
        dynamo=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
