"""The catalogue is read strictly: what is wrong is refused with the name of file and member, what is right is found."""

import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.catalogue import Catalogue, load_catalogue, parse_catalogue
from embedmesh.engine.folder import digest, read_folder
from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import CATALOGUE_BYTES_MAX
from embedmesh.rules.models import Model
from tests.data import model_folder

ENTRY = f"""
[[models]]
id = "org/m"
aliases = ["m", "qwen:0.6b"]
folder = "f"
width = 8
max_tokens = 16
price = 5
digest = "{"0" * 64}"
"""
SECOND = ENTRY.replace("org/m", "org/n").replace('["m", "qwen:0.6b"]', "[]")
REFERENCE = Path(__file__).parent.parent / "docs" / "reference" / "catalogue.md"


def load(text: str) -> tuple[Model, ...]:
    return parse_catalogue(text, name="models.toml", base=Path("/base")).models


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "object missing required field `models`"),
        ("[[", "models.toml is not TOML"),
        ("a = " + "[" * 100_000, "models.toml is not TOML: it is nested too deep"),
        ("models = []", "models: expected `array` of length >= 1"),
        ("models = 3", "models: expected `array`, got `int`"),
        (ENTRY + "colour = 1", "models[0]: object contains unknown field `colour`"),
        (ENTRY + "[other]", "object contains unknown field `other`"),
        (ENTRY + "[defaults]\nwidth = 1", "defaults: object contains unknown field `width`"),
        (ENTRY.replace("width = 8", ""), "models[0].width is missing: how many components a vector has"),
        (ENTRY.replace("width = 8", "width = 0"), "models[0].width is missing"),
        (ENTRY.replace("width = 8", "width = 65537"), "models[0].width: expected `int` <= 65536"),
        (ENTRY.replace("width = 8", "width = true"), "models[0].width: expected `int`, got `bool`"),
        (ENTRY.replace("width = 8", "width = 8.0"), "models[0].width: expected `int`, got `float`"),
        (ENTRY.replace("tokens = 16", "tokens = 0"), "models[0].max_tokens: expected `int` >= 1"),
        (ENTRY.replace("price = 5", "price = -1"), "models[0].price: expected `int` >= 0"),
        (ENTRY.replace("price = 5", "price = 0.01"), "models[0].price: expected `int | null`, got `float`"),
        (ENTRY.replace("price = 5", f"price = {10**18}"), "models[0].price: expected `int` <= "),
        (ENTRY.replace("price = 5", ""), "models[0].price is missing, and [defaults] has no price either"),
        (ENTRY.replace("0" * 64, "abc"), "models[0].digest: expected `str` matching regex"),
        (ENTRY.replace('"f"', '""'), "models[0].folder: expected `str` of length >= 1"),
        (ENTRY.replace('"org/m"', '"a b"'), "models[0].id: a name has 1 to 200 of the characters"),
        (ENTRY.replace("width = 8", "width = " + "9" * 5_000), "models.toml is not TOML: "),
        (ENTRY.replace("width = 8", "width = 0x" + "f" * 5_000), "models[0].width: "),
        (ENTRY.replace('"f"', '"~nobody-here/f"'), "models[0].folder begins with the home of nobody"),
        (ENTRY.replace('"f"', r'"f\u0000"'), "models[0].folder has a NUL character"),
        (ENTRY.replace('"org/m"', '""'), "models[0].id: a name has 1 to 200 of the characters"),
        (ENTRY.replace('"org/m"', '"m:fast"'), "models[0].id: a name must not end in a tier"),
        (ENTRY.replace('["m",', '["x:int8",'), "models[0].aliases[0]: a name must not end in a tier"),
        (ENTRY + 'tier = "slow"', "models[0].tier: invalid enum value 'slow'"),
        (ENTRY + 'token_ids = "o200k"', "models[0].token_ids: invalid enum value 'o200k'"),
        (ENTRY + '[models.prompts]\nsearch = "x"', "models[0].prompts: invalid enum value 'search'"),
        (ENTRY + ENTRY, "models[1].id is org/m, as models[0].id is"),
        (ENTRY + SECOND.replace("[]", '["m"]'), "models[1].aliases[0] is m, as models[0].aliases[0] is"),
        (ENTRY + SECOND.replace("[]", '["org/m"]'), "models[1].aliases[0] is org/m, as models[0].id is"),
        (ENTRY.replace('["m",', '["org/m",'), "models[0].aliases[0] is org/m, as models[0].id is"),
        (ENTRY.replace('["m",', '["qwen:0.6b",'), "models[0].aliases[1] is qwen:0.6b, as models[0].aliases[0] is"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    """One line with the file's name and the member's place."""
    with pytest.raises(SetupError) as refused:
        load(text)
    assert "models.toml" in str(refused.value)
    assert says in str(refused.value)


def test_what_a_full_entry_means() -> None:
    """Every member arrives; the folder is relative to the file; the default price is for those without one."""
    more = '[models.prompts]\nquery = "Q: "\n[defaults]\nprice = 7\n'
    first, second, fast = load(ENTRY + SECOND.replace("price = 5", 'token_ids = "native"\ntier = "int8"') + more)
    assert first == Model(
        id="org/m",
        folder="/base/f",
        width=8,
        max_tokens=16,
        price=5,
        digest="0" * 64,
        aliases=("m", "qwen:0.6b"),
    )
    assert (second.price, second.token_ids, second.tier, second.prompts) == (7, "native", "int8", {"query": "Q: "})
    assert fast == msgspec.structs.replace(first, id="org/m:fast", aliases=("m:fast", "qwen:0.6b:fast"), tier="fast")


CHAT = """
[[models]]
id = "org/chat"
modalities = ["chat", "completions"]
max_tokens = 100
price = 5
"""
PAINTER = """
[[models]]
id = "org/painter"
modalities = ["images"]
max_tokens = 100
price = 0
image_prices = { "16x16" = 9, "8x8" = 3 }
"""


RERANKER = """
[[models]]
id = "org/reranker"
modalities = ["rerank"]
max_tokens = 512
price = 5
"""


def test_what_an_entry_that_reranks_means() -> None:
    """A pair has one number, and is paid by tokens or by searches."""
    (ours,) = load(RERANKER)
    assert (ours.reranks, ours.encodes, ours.embeds, ours.foreign, ours.width) == (True, True, False, True, 1)
    assert (ours.scores, ours.price, ours.search_price) == ("sigmoid", 5, None)
    (ours,) = load(RERANKER.replace("price = 5", 'search_price = 2_000_000\nscores = "raw"'))
    assert (ours.scores, ours.price, ours.search_price) == ("raw", 0, 2_000_000)


def test_what_an_entry_that_generates_means() -> None:
    """Answers cost what input does, and are as long as the context allows, unless it says otherwise."""
    (chat,) = load(CHAT)
    assert (chat.foreign, chat.embeds, chat.width, chat.digest) == (True, False, 0, "")
    assert (chat.output_price, chat.cached_price, chat.output_max, chat.template_tokens) == (5, None, 100, 16)
    (chat,) = load(CHAT + "output_price = 7\ncached_price = 1\noutput_max = 30\ntemplate_tokens = 4\nimage_tokens = 2")
    assert (chat.output_price, chat.cached_price, chat.output_max, chat.template_tokens) == (7, 1, 30, 4)
    (painter,) = load(PAINTER)
    assert list(painter.image_prices.items()) == [("16x16", 9), ("8x8", 3)]


@pytest.mark.parametrize(
    "text, says",
    [
        (CHAT + "width = 4", "models[0].width: only a model that makes vectors has it"),
        (
            CHAT + 'folder = "f"\ndigest = "' + "0" * 64 + '"',
            "models[0].folder: only a model that makes vectors or reranks has it",
        ),
        (CHAT + '[models.prompts]\nquery = "q"', "models[0].prompts: only a model that makes vectors has it"),
        (ENTRY + "search_price = 1", "models[0].search_price: only a model that reranks has it"),
        (RERANKER + "search_price = 1", "models[0] has price and search_price"),
        (RERANKER + "width = 4", "models[0].width: only a model that makes vectors has it"),
        (RERANKER + "output_max = 4", "models[0].output_max: only a model that generates has it"),
        (RERANKER.replace('["rerank"]', '["rerank", "chat"]'), "models[0].modalities: a model makes vectors, reranks"),
        (ENTRY + "output_price = 1", "models[0].output_price: only a model that generates has it"),
        (ENTRY + "pass_unknown = true", "models[0].pass_unknown: only a model that generates has it"),
        (CHAT + "output_max = 101", "models[0].output_max is more than max_tokens"),
        (CHAT.replace('"chat",', '"embeddings",'), "models[0].modalities: a model makes vectors, reranks or generates"),
        (CHAT.replace('"chat",', '"completions",'), "models[0].modalities names one twice"),
        (CHAT.replace('["chat", "completions"]', "[]"), "models[0].modalities: expected `array` of length >= 1"),
        (CHAT.replace('"chat",', '"audio",'), "models[0].modalities[0]: invalid enum value 'audio'"),
        (PAINTER.replace("image_prices", "# image_prices"), "models[0].image_prices is missing"),
        (PAINTER.replace("8x8", "8"), "models[0].image_prices: expected `str` matching regex"),
        (ENTRY.replace("tokens = 16", "tokens = 300001"), "models[0].max_tokens: expected `int` <= 300000"),
    ],
)
def test_what_is_refused_of_models_that_generate(text: str, says: str) -> None:
    with pytest.raises(SetupError) as refused:
        load(text)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "name, found",
    [
        ("org/m", "org/m"),
        ("m", "org/m"),
        ("m:exact", "org/m"),
        ("org/m:exact", "org/m"),
        ("qwen:0.6b", "org/m"),
        ("qwen:0.6b:exact", "org/m"),
        ("m:fast", "org/m:fast"),
        ("org/m:fast", "org/m:fast"),
        ("qwen:0.6b:fast", "org/m:fast"),
        ("m:int8", None),
        ("org/n", "org/n"),
        ("org/n:fast", None),
        ("m:exact:exact", None),
        ("m:", None),
        (":exact", None),
        ("", None),
        ("M", None),
        ("qwen", None),
        ("org/n:int8", "org/n"),
        ("org/n:exact", None),
    ],
)
def test_finding(name: str, found: str | None) -> None:
    """By id, by alias, and either with a tier: the entry's, or fast for an exact one; nothing else."""
    text = ENTRY + SECOND + 'tier = "int8"'
    model = parse_catalogue(text, name="models.toml", base=Path("/base")).find(name)
    assert (model.id if model else None) == found


def named(catalogue: Catalogue, name: str) -> Model:
    model = catalogue.find(name)
    assert model is not None
    return model


def test_tiers_of_one_model() -> None:
    """Entries of one id share their names; a name alone means the first, whatever comes later."""
    int8 = ENTRY.replace('"f"', '"f8"') + 'tier = "int8"\n'
    catalogue = parse_catalogue(ENTRY + int8, name="models.toml", base=Path("/base"))
    assert [model.id for model in catalogue.written] == ["org/m", "org/m:int8"]
    assert [model.id for model in catalogue.models] == ["org/m", "org/m:int8", "org/m:fast"]
    assert {
        name: named(catalogue, name).tier for name in ("m", "m:int8", "org/m:int8", "qwen:0.6b:fast", "m:exact")
    } == {
        "m": "exact",
        "m:int8": "int8",
        "org/m:int8": "int8",
        "qwen:0.6b:fast": "fast",
        "m:exact": "exact",
    }
    reversed_ = parse_catalogue(int8 + ENTRY, name="models.toml", base=Path("/base"))
    assert (named(reversed_, "m").tier, named(reversed_, "org/m:exact").id) == ("int8", "org/m:exact")
    with pytest.raises(SetupError, match="Every name may occur once in a tier"):
        parse_catalogue(ENTRY + int8 + int8, name="models.toml", base=Path("/base"))


def test_an_entry_of_its_own_for_the_fast_tier() -> None:
    """It takes the place of the one that would be there without."""
    text = ENTRY + ENTRY.replace("price = 5", 'price = 3\ntier = "fast"')
    catalogue = parse_catalogue(text, name="models.toml", base=Path("/base"))
    assert [(model.id, model.price) for model in catalogue.models] == [("org/m", 5), ("org/m:fast", 3)]


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=50))
def test_any_text_is_refused_in_words(text: str) -> None:
    """What is no catalogue is a SetupError, whatever it is."""
    with pytest.raises(SetupError):
        load(text)


def test_the_built_in_catalogue() -> None:
    """It has the default model, under both names, in the folder where set-up puts it."""
    catalogue = load_catalogue(None, assets=Path("/assets"))
    [model] = catalogue.written
    assert model is catalogue.find("all-MiniLM-L6-v2") is catalogue.find("sentence-transformers/all-MiniLM-L6-v2")
    assert (model.folder, model.width, model.max_tokens) == ("/assets/all-MiniLM-L6-v2", 384, 256)
    assert (model.price, model.token_ids, model.tier) == (10_000_000, "cl100k", "exact")


@pytest.mark.model
def test_the_built_in_catalogue_tells_the_truth() -> None:
    """Digest and width are those of the files that set-up fetches."""
    folder = model_folder()
    [model] = load_catalogue(None, assets=folder.parent).written
    assert digest(folder) == model.digest
    assert read_folder(folder).max_tokens == model.max_tokens


def test_an_operators_file(tmp_path: Path) -> None:
    """It replaces the built-in one; folders are relative to it; what cannot be read is named."""
    file = tmp_path / "models.toml"
    file.write_text(ENTRY)
    [model] = load_catalogue(file, assets=Path("/assets")).written
    assert model.folder == str(tmp_path / "f")
    file.write_bytes(b"\xff")
    with pytest.raises(SetupError, match="is not UTF-8"):
        load_catalogue(file, assets=Path("/assets"))
    file.write_bytes(b"#" * (CATALOGUE_BYTES_MAX + 1))
    with pytest.raises(SetupError, match="is larger than"):
        load_catalogue(file, assets=Path("/assets"))
    with pytest.raises(SetupError, match="cannot be read"):
        load_catalogue(tmp_path / "absent.toml", assets=Path("/assets"))


def test_the_reference_names_every_member_and_its_example_loads() -> None:
    """docs/reference/catalogue.md is what the code does."""
    page = REFERENCE.read_text()
    example = page.split("```toml\n")[1].split("```")[0]
    models = load(example)
    assert {member for entry in tomllib.loads(example)["models"] for member in entry} <= set(Model.__struct_fields__)
    assert [model.id for model in models] == [
        "sentence-transformers/all-MiniLM-L6-v2",
        "my-org/search-model",
        "sentence-transformers/all-MiniLM-L6-v2:fast",
        "my-org/search-model:fast",
    ]
    for member in Model.__struct_fields__:
        assert f"| `{member}` |" in page


def test_an_instruction_with_a_new_line_stands_before_queries_only() -> None:
    """As docs/how-to/large-models.md has it; a document has no entry, and so nothing before it."""
    page = (REFERENCE.parent.parent / "how-to/large-models.md").read_text()
    model = load(page.split("```toml\n")[1].split("```")[0])[0]
    assert model.prompts.keys() == {"query"}
    assert model.prompts["query"].startswith("Instruct: Given a web search query, ")
    assert model.prompts["query"].endswith("\nQuery: ")
