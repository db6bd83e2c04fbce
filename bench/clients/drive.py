"""Clients of other APIs embed the texts of a file: `python drive.py JOB`, by the interpreter that has them.

It prints one JSON object: for each way the largest difference from the vectors in the file, or why it did not work.
"""

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

job = json.loads(Path(sys.argv[1]).read_text())
base, key, model, texts = job["base"], job["key"], job["model"], job["texts"]
BEARER = {"headers": {"Authorization": f"Bearer {key}"}}


def ollama_embed() -> Any:
    import ollama

    return ollama.Client(host=base, **BEARER).embed(model=model, input=texts).embeddings


def ollama_embeddings() -> Any:
    import ollama

    return [ollama.Client(host=base, **BEARER).embeddings(model=model, prompt=each).embedding for each in texts]


def ollama_list() -> Any:
    import ollama

    client = ollama.Client(host=base, **BEARER)
    (listed,) = client.list().models
    assert client.show(listed.model).capabilities == ["embedding"]
    return client.embed(model=listed.model, input=texts).embeddings


def cohere_v2() -> Any:
    import cohere

    kinds = ["float", "int8", "uint8", "ubinary", "binary", "base64"]
    reply = cohere.ClientV2(api_key=key, base_url=base).embed(
        model=model, texts=texts, input_type="search_document", embedding_types=kinds
    )
    found = reply.embeddings
    vectors = np.array(found.float_, "<f4")
    assert [base64.b64decode(each) for each in found.base64] == [row.tobytes() for row in vectors]
    assert (np.unpackbits(np.array(found.ubinary, np.uint8), axis=1) == (vectors > 0)).all()
    assert (np.array(found.int8) == np.rint(vectors * np.float32(127))).all()
    return vectors


def cohere_v1() -> Any:
    import cohere

    return (
        cohere.Client(api_key=key, base_url=base).embed(model=model, texts=texts, input_type="search_query").embeddings
    )


def voyage() -> Any:
    import voyageai

    client = voyageai.Client(api_key=key, base_url=f"{base}/v1")
    vectors = np.array(client.embed(texts, model=model, input_type="document").embeddings)
    bits = client.embed(texts, model=model, output_dtype="ubinary").embeddings
    assert (np.unpackbits(np.array(bits, np.uint8), axis=1) == (vectors > 0)).all()
    return vectors


def mistral() -> Any:
    from mistralai.client import Mistral

    reply = Mistral(api_key=key, server_url=base).embeddings.create(model=model, inputs=texts)
    return [each.embedding for each in reply.data]


def google() -> Any:
    from google import genai
    from google.genai import types

    client = genai.Client(api_key=key, http_options=types.HttpOptions(base_url=base))
    return [each.values for each in client.models.embed_content(model=model, contents=texts).embeddings]


def hugging_face() -> Any:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=base, api_key=key)
    return [client.feature_extraction(each)[0] for each in texts]


def hugging_face_by_path() -> Any:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=f"{base}/tei/{model}/embed", api_key=key)
    return [client.feature_extraction(each, normalize=True, truncate=True)[0] for each in texts]


def langchain_ollama() -> Any:
    from langchain_ollama import OllamaEmbeddings

    return OllamaEmbeddings(model=model, base_url=base, client_kwargs=BEARER).embed_documents(texts)


def langchain_cohere() -> Any:
    from langchain_cohere import CohereEmbeddings

    return CohereEmbeddings(model=model, cohere_api_key=key, base_url=base).embed_documents(texts)


def llama_index() -> Any:
    from llama_index.embeddings.ollama import OllamaEmbedding

    return OllamaEmbedding(model_name=model, base_url=base, client_kwargs=BEARER).get_text_embedding_batch(texts)


WAYS: list[Callable[[], Any]] = [
    ollama_embed,
    ollama_embeddings,
    ollama_list,
    cohere_v2,
    cohere_v1,
    voyage,
    mistral,
    google,
    hugging_face,
    hugging_face_by_path,
    langchain_ollama,
    langchain_cohere,
    llama_index,
]

if __name__ == "__main__":
    told: dict[str, Any] = {}
    for way in WAYS:
        try:
            told[way.__name__] = float(np.abs(np.array(way(), np.float64) - np.array(job["vectors"])).max())
        except Exception as error:  # noqa: BLE001 - what a client does then is what we want to know
            told[way.__name__] = f"{type(error).__name__}: {error}"[:200]
    print(json.dumps(told))
