"""Clients of other APIs before a gateway: `python drive.py JOB`, by the interpreter that has them.

It prints one JSON object: for each way the largest difference from the numbers in the file, or why it did not work.
"""

import asyncio
import base64
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

COHERES = "embed-english-v3.0"  # LlamaIndex knows Cohere's own names only: here the default model's alias
API_VERSION = "2024-10-21"
LITELLM = ("cohere", "jina_ai", "voyage", "infinity", "hosted_vllm", "huggingface", "azure_ai")
OLDER = "clients-older"  # the environment of what wants older versions of what others need


class At(NamedTuple):
    """Where a way asks, and what. `key` is its own."""

    base: str
    key: str
    model: str
    texts: list[str]
    reranker: str
    query: str
    documents: list[str]

    @property
    def bearer(self) -> dict[str, Any]:
        """For clients that take headers."""
        return {"headers": {"Authorization": f"Bearer {self.key}"}}

    @property
    def pairs(self) -> dict[str, Any]:
        """A rerank request as most clients take it."""
        return {"model": self.reranker, "query": self.query, "documents": self.documents}


class Way(NamedTuple):
    """A client's method, and the environment that has it.

    It makes `requests` requests, and embeds the texts, or reranks the documents, `passes` times.
    """

    ask: Callable[[At], Any]
    requests: int = 1
    passes: int = 1
    reranks: bool = False
    home: str = "clients"


def scores(results: Iterable[tuple[int, float]]) -> list[float]:
    """In the documents' order, of places and scores, best first."""
    found = list(results)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    return [score for _, score in sorted(found)]


# -- vectors -----------------------------------------------------------------------------------------------------------


def ollama_embed(at: At) -> Any:
    import ollama

    return ollama.Client(host=at.base, **at.bearer).embed(model=at.model, input=at.texts).embeddings


def ollama_embeddings(at: At) -> Any:
    import ollama

    client = ollama.Client(host=at.base, **at.bearer)
    return [client.embeddings(model=at.model, prompt=each).embedding for each in at.texts]


def ollama_list(at: At) -> Any:
    import ollama

    client = ollama.Client(host=at.base, **at.bearer)
    listed = next(each for each in client.list().models if "embedding" in client.show(each.model).capabilities)
    return client.embed(model=listed.model, input=at.texts).embeddings


def cohere_v2(at: At) -> Any:
    import cohere

    kinds = ["float", "int8", "uint8", "ubinary", "binary", "base64"]
    reply = cohere.ClientV2(api_key=at.key, base_url=at.base).embed(
        model=at.model, texts=at.texts, input_type="search_document", embedding_types=kinds
    )
    found = reply.embeddings
    vectors = np.array(found.float_, "<f4")
    assert [base64.b64decode(each) for each in found.base64] == [row.tobytes() for row in vectors]
    assert (np.unpackbits(np.array(found.ubinary, np.uint8), axis=1) == (vectors > 0)).all()
    assert (np.array(found.int8) == np.rint(vectors * np.float32(127))).all()
    return vectors


def cohere_v1(at: At) -> Any:
    import cohere

    client = cohere.Client(api_key=at.key, base_url=at.base)
    return client.embed(model=at.model, texts=at.texts, input_type="search_query").embeddings


def voyage(at: At) -> Any:
    import voyageai

    client = voyageai.Client(api_key=at.key, base_url=f"{at.base}/v1")
    vectors = np.array(client.embed(at.texts, model=at.model, input_type="document").embeddings)
    bits = client.embed(at.texts, model=at.model, output_dtype="ubinary").embeddings
    assert (np.unpackbits(np.array(bits, np.uint8), axis=1) == (vectors > 0)).all()
    return vectors


def mistral(at: At) -> Any:
    from mistralai.client import Mistral

    reply = Mistral(api_key=at.key, server_url=at.base).embeddings.create(model=at.model, inputs=at.texts)
    return [each.embedding for each in reply.data]


def google(at: At) -> Any:
    from google import genai
    from google.genai import types

    client = genai.Client(api_key=at.key, http_options=types.HttpOptions(base_url=at.base))
    return [each.values for each in client.models.embed_content(model=at.model, contents=at.texts).embeddings]


def hugging_face(at: At) -> Any:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=at.base, api_key=at.key)
    return [client.feature_extraction(each)[0] for each in at.texts]


def hugging_face_by_path(at: At) -> Any:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=f"{at.base}/tei/{at.model}/embed", api_key=at.key)
    return [client.feature_extraction(each, normalize=True, truncate=True)[0] for each in at.texts]


def azure(at: At) -> Any:
    from openai import AzureOpenAI

    client = AzureOpenAI(azure_endpoint=at.base, api_key=at.key, api_version=API_VERSION)
    return [each.embedding for each in client.embeddings.create(model=at.model, input=at.texts).data]


def azure_async(at: At) -> Any:
    from openai import AsyncAzureOpenAI

    async def ask() -> Any:
        async with AsyncAzureOpenAI(
            azure_endpoint=at.base, api_key=at.key, api_version=API_VERSION, azure_deployment=at.model
        ) as client:
            return [each.embedding for each in (await client.embeddings.create(model=at.model, input=at.texts)).data]

    return asyncio.run(ask())


def langchain_ollama(at: At) -> Any:
    from langchain_ollama import OllamaEmbeddings

    return OllamaEmbeddings(model=at.model, base_url=at.base, client_kwargs=at.bearer).embed_documents(at.texts)


def langchain_cohere(at: At) -> Any:
    from langchain_cohere import CohereEmbeddings

    return CohereEmbeddings(model=at.model, cohere_api_key=at.key, base_url=at.base).embed_documents(at.texts)


def langchain_azure(at: At) -> Any:
    from langchain_openai import AzureOpenAIEmbeddings

    return AzureOpenAIEmbeddings(
        model=at.model,
        azure_endpoint=at.base,
        api_key=at.key,
        api_version=API_VERSION,
        check_embedding_ctx_length=False,
    ).embed_documents(at.texts)


def langchain_mistral(at: At) -> Any:
    from langchain_mistralai import MistralAIEmbeddings

    return MistralAIEmbeddings(model=at.model, api_key=at.key, endpoint=f"{at.base}/v1/").embed_documents(at.texts)


def langchain_google(at: At) -> Any:
    from langchain_google_genai import GoogleGenerativeAIEmbeddings

    return GoogleGenerativeAIEmbeddings(model=at.model, google_api_key=at.key, base_url=at.base).embed_documents(
        at.texts
    )


def llama_index_ollama(at: At) -> Any:
    from llama_index.embeddings.ollama import OllamaEmbedding

    return OllamaEmbedding(model_name=at.model, base_url=at.base, client_kwargs=at.bearer).get_text_embedding_batch(
        at.texts
    )


def llama_index_cohere(at: At) -> Any:
    from llama_index.embeddings.cohere import CohereEmbedding

    found = CohereEmbedding(model_name=COHERES, api_key=at.key, base_url=at.base, input_type="search_document")
    return found.get_text_embedding_batch(at.texts)


def llama_index_tei(at: At) -> Any:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    found = TextEmbeddingsInference(model_name=at.model, base_url=f"{at.base}/tei/{at.model}", auth_token=at.key)
    return found.get_text_embedding_batch(at.texts)


def haystack_jina(at: At) -> Any:
    from haystack.utils import Secret
    from haystack_integrations.components.embedders.jina import JinaTextEmbedder

    found = JinaTextEmbedder(model=at.model, api_key=Secret.from_token(at.key), base_url=f"{at.base}/v1/embeddings")
    return [found.run(each)["embedding"] for each in at.texts]


# -- scores ------------------------------------------------------------------------------------------------------------


def cohere_v1_rerank(at: At) -> Any:
    import cohere

    reply = cohere.Client(api_key=at.key, base_url=at.base).rerank(**at.pairs, return_documents=True)
    assert [each.document.text for each in reply.results] == [at.documents[each.index] for each in reply.results]
    return scores((each.index, each.relevance_score) for each in reply.results)


def cohere_v2_rerank(at: At) -> Any:
    import cohere

    reply = cohere.ClientV2(api_key=at.key, base_url=at.base).rerank(**at.pairs)
    assert reply.meta.billed_units is not None
    return scores((each.index, each.relevance_score) for each in reply.results)


def cohere_v2_rerank_async(at: At) -> Any:
    import cohere

    async def ask() -> Any:
        async with cohere.AsyncClientV2(api_key=at.key, base_url=at.base) as client:
            return (await client.rerank(**at.pairs)).results

    return scores((each.index, each.relevance_score) for each in asyncio.run(ask()))


def voyage_rerank(at: At) -> Any:
    import voyageai

    reply = voyageai.Client(api_key=at.key, base_url=f"{at.base}/v1").rerank(**at.pairs)
    assert [each.document for each in reply.results] == [at.documents[each.index] for each in reply.results]
    assert reply.total_tokens > 0
    return scores((each.index, each.relevance_score) for each in reply.results)


def voyage_rerank_async(at: At) -> Any:
    import voyageai

    client = voyageai.AsyncClient(api_key=at.key, base_url=f"{at.base}/v1")
    reply = asyncio.run(client.rerank(**at.pairs))
    return scores((each.index, each.relevance_score) for each in reply.results)


def litellm_rerank(provider: str) -> Callable[[At], Any]:
    """By litellm's name of a provider.

    Without `top_n` what it sends to Voyage tells nobody that it reads `data`; and of Infinity, which answers at vLLM's
    path, it reads documents in another form than of vLLM.
    """
    own: dict[str, dict[str, Any]] = {"voyage": {"top_n": 100}, "infinity": {"return_documents": False}}
    more = own.get(provider, {})

    def ask(at: At) -> Any:
        import litellm

        asked = at.pairs | more | {"model": f"{provider}/{at.reranker}"}
        reply = litellm.rerank(**asked, api_base=at.base, api_key=at.key)
        return scores((each["index"], each["relevance_score"]) for each in reply.results)

    return ask


def langchain_cohere_rerank(at: At) -> Any:
    from langchain_cohere import CohereRerank

    found = CohereRerank(model=at.reranker, cohere_api_key=at.key, base_url=at.base, top_n=None)
    return scores((each["index"], each["relevance_score"]) for each in found.rerank(at.documents, at.query))


def by_document(at: At, found: Iterable[tuple[str, float]]) -> list[float]:
    """Scores, by what documents say: for clients that do not tell places."""
    return scores((at.documents.index(text), score) for text, score in found)


def langchain_documents(at: At, found: Any) -> list[float]:
    """By a LangChain compressor."""
    from langchain_core.documents import Document

    ranked = found.compress_documents([Document(page_content=each) for each in at.documents], at.query)
    return by_document(at, [(each.page_content, each.metadata["relevance_score"]) for each in ranked])


def langchain_voyage_rerank(at: At) -> Any:
    from langchain_voyageai import VoyageAIRerank

    return langchain_documents(at, VoyageAIRerank(model=at.reranker, api_key=at.key, base_url=f"{at.base}/v1"))


def llama_index_nodes(at: At, found: Any) -> list[float]:
    """By a LlamaIndex postprocessor."""
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    nodes = [NodeWithScore(node=TextNode(text=each), score=0.0) for each in at.documents]
    ranked = found.postprocess_nodes(nodes, query_bundle=QueryBundle(at.query))
    return by_document(at, [(each.node.get_content(), each.score) for each in ranked])


def llama_index_cohere_rerank(at: At) -> Any:
    from llama_index.postprocessor.cohere_rerank import CohereRerank

    many = len(at.documents)
    return llama_index_nodes(at, CohereRerank(model=at.reranker, api_key=at.key, base_url=at.base, top_n=many))


def llama_index_jina_rerank(at: At) -> Any:
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    many = len(at.documents)
    found = JinaRerank(model=at.reranker, api_key=at.key, base_url=f"{at.base}/v1", top_n=many)
    return llama_index_nodes(at, found)


def llama_index_tei_rerank(at: At) -> Any:
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    found = TextEmbeddingInference(
        model_name=at.reranker,
        base_url=f"{at.base}/tei/{at.reranker}",
        auth_token=f"Bearer {at.key}",
        top_n=len(at.documents),
    )
    return llama_index_nodes(at, found)


def infinity_client_rerank(at: At) -> Any:
    from infinity_client import AuthenticatedClient
    from infinity_client.api.default import rerank
    from infinity_client.models import RerankInput

    client = AuthenticatedClient(base_url=at.base, token=at.key)
    reply = rerank.sync(client=client, body=RerankInput(**at.pairs))
    return scores((each.index, each.relevance_score) for each in reply.results)


def haystack_ranked(at: At, found: Any) -> list[float]:
    """By a Haystack ranker."""
    from haystack import Document

    ranked = found.run(query=at.query, documents=[Document(content=each) for each in at.documents])["documents"]
    return by_document(at, [(each.content, each.score) for each in ranked])


def haystack_tei_rerank(at: At, raw: bool = False) -> Any:
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

    key, many = Secret.from_token(at.key), len(at.documents)
    found = HuggingFaceTEIRanker(url=f"{at.base}/tei/{at.reranker}", token=key, top_k=many, raw_scores=raw)
    return haystack_ranked(at, found)


def haystack_tei_raw(at: At) -> Any:
    return 1 / (1 + np.exp(-np.array(haystack_tei_rerank(at, raw=True))))


def haystack_jina_rerank(at: At) -> Any:
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.jina import JinaRanker

    found = JinaRanker(model=at.reranker, api_key=Secret.from_token(at.key), base_url=f"{at.base}/v1/rerank")
    return haystack_ranked(at, found)


def haystack_cohere_rerank(at: At) -> Any:
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.cohere import CohereRanker

    key = Secret.from_token(at.key)
    found = CohereRanker(model=at.reranker, api_key=key, api_base_url=at.base, top_k=len(at.documents))
    return haystack_ranked(at, found)


def ways_of(*asks: Callable[[At], Any], reranks: bool = False, home: str = "clients") -> dict[str, Way]:
    """Each makes one request, and has its function's name."""
    return {ask.__name__: Way(ask, reranks=reranks, home=home) for ask in asks}


WAYS: dict[str, Way] = (
    ways_of(
        ollama_embed,
        ollama_list,
        cohere_v2,
        cohere_v1,
        mistral,
        google,
        azure,
        azure_async,
        langchain_ollama,
        langchain_cohere,
        langchain_azure,
        langchain_mistral,
        langchain_google,
        llama_index_ollama,
        llama_index_cohere,
        llama_index_tei,
    )
    | {
        ask.__name__: Way(ask, requests=3)
        for ask in (ollama_embeddings, hugging_face, hugging_face_by_path, haystack_jina)
    }
    | {"voyage": Way(voyage, requests=2, passes=2)}
    | ways_of(
        cohere_v1_rerank,
        cohere_v2_rerank,
        cohere_v2_rerank_async,
        voyage_rerank,
        voyage_rerank_async,
        langchain_cohere_rerank,
        langchain_voyage_rerank,
        llama_index_cohere_rerank,
        llama_index_jina_rerank,
        llama_index_tei_rerank,
        haystack_tei_rerank,
        haystack_tei_raw,
        haystack_jina_rerank,
        haystack_cohere_rerank,
        reranks=True,
    )
    | ways_of(infinity_client_rerank, reranks=True, home=OLDER)
    | {f"litellm_{provider}": Way(litellm_rerank(provider), reranks=True) for provider in LITELLM}
)


def main(file: str) -> None:
    """Try each."""
    job = json.loads(Path(file).read_text())
    keys, right = job.pop("keys"), job.pop("right")
    told: dict[str, Any] = {}
    for name, way in WAYS.items():
        if name not in keys:
            continue
        try:
            found = np.array(way.ask(At(key=keys[name], **job)), np.float64)
            told[name] = float(np.abs(found - np.array(right["scores" if way.reranks else "vectors"])).max())
        except Exception as error:  # noqa: BLE001 - what a client does then is what we want to know
            told[name] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
