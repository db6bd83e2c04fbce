"""The ONNX form of a BERT folder: `python export.py FOLDER FILE`, under sentence-transformers' Python."""

import sys
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
OPSET = 17  # the first with LayerNormalization


class Exported(torch.nn.Module):  # type: ignore[misc]
    """The model as FastEmbed calls it: three tensors in, token states or, of one that reranks, logits out."""

    def __init__(self, model: Any, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, ids: Any, mask: Any, types: Any) -> Any:
        return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types)[self.output]


def main(folder: str, file: str) -> None:
    """Write the file."""
    named = AutoConfig.from_pretrained(folder).architectures[0]
    reranks = named.endswith("ForSequenceClassification")
    kind, output = (AutoModelForSequenceClassification, "logits") if reranks else (AutoModel, "last_hidden_state")
    model = kind.from_pretrained(folder, attn_implementation="eager").eval()  # what ONNX Runtime knows to fuse
    example = torch.ones(2, 7, dtype=torch.long)
    free = {0: "rows", 1: "length"}
    torch.onnx.export(
        Exported(model, output),
        (example, example, torch.zeros_like(example)),
        file,
        input_names=INPUTS,
        output_names=[output],
        dynamic_axes=dict.fromkeys(INPUTS, free) | {output: {0: "rows"} if reranks else free},
        opset_version=OPSET,
        dynamo=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
