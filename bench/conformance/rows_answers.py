"""Rows about what a node says: another model's vectors, another width, broken ones; the second node is well."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from bench.conformance.bed import RIGHT, Bed, fresh
from bench.conformance.caller import Broken, NotClaimed, check_envelope, check_refused, vectors_in
from bench.conformance.node import NAMES
from bench.conformance.row import Row
from bench.rig.http import MODEL

CUT, TOO_WIDE = 128, 4_096  # `dimensions`
JOINED = 24  # requests after a node with other weights has joined
TURNED, CALM = 300, 60  # requests after a node's weights have changed, and without a wrong answer after which it is out


def judged(found: Counter[str], *, all_served: bool = False) -> str:
    """Raises Broken for a wrong answer, a hang, or nothing served at all; with `all_served`, for each that failed."""
    total, most = found.total(), found.most_common()
    wrong = {words: n for words, n in most if words != RIGHT and not _is_refusal(words)}
    if wrong:
        raise Broken(f"{sum(wrong.values())} of {total}: {next(iter(wrong))}")
    failed = total - found[RIGHT]
    if failed == total or (failed and all_served):
        raise Broken(f"{failed} of {total} failed: {next(words for words, _ in most if words != RIGHT)}")
    return f"{failed} of {total} refused" if failed else ""


def _is_refusal(words: str) -> bool:
    return words[:1] in ("4", "5") or words in ("hung up", "a body that was cut")


def wrong_answer(
    fault: str, encoding: str = "base64", *, both: bool = False, all_served: bool = False
) -> Callable[[Bed], str]:
    """A node in a fault: its answers are put right, or refused, or another node's come; with `both`, all put right."""

    def attempt(bed: Bed) -> str:
        if both:
            with bed.both(fault):
                return judged(bed.several(encoding), all_served=True)
        with bed.first.being(fault):
            return judged(bed.several_until_met(encoding), all_served=all_served)

    return attempt


def joins_with_other_weights(bed: Bed) -> str:
    """It is there from the first request on, or joins now, where nodes can."""
    with bed.first.being("other-model"):
        if bed.rejoin is not None:
            bed.rejoin()
        return judged(bed.several(count=JOINED))


def turns_to_other_weights(bed: Bed) -> str:
    """Such a node cannot be found before it has answered: it must be found soon."""
    wrong = asked = calm = 0
    with bed.first.being("other-model"):
        while asked < TURNED and calm < CALM:
            found = bed.several()
            asked, now = asked + found.total(), found.total() - found[RIGHT]
            wrong, calm = wrong + now, 0 if now else calm + found.total()
    if calm < CALM:
        raise Broken(f"{wrong} of {asked} wrong, and so on")
    if not bed.first.met:
        raise Broken("the node was never asked")
    return f"out after {wrong} wrong answers"


def unknown_model(bed: Bed) -> str:
    """Nodes that answer any name, as some servers do, must not make up for a name that nobody serves."""
    with bed.both("any-model"):
        answer = bed.target.ask({"model": "text-embedding-of-nobody", "input": fresh()})
    check_refused(answer, 400, 404)
    check_envelope(answer)
    return ""


def own_name(bed: Bed) -> str:
    """The name that the caller used, whatever the node calls it."""
    with bed.both("other-name"):
        said = bed.check_embeds([fresh()]).json().get("model")
    if said != MODEL:
        raise Broken(f"“{said}”")
    return ""


def dimensions_cut(bed: Bed) -> str:
    """The nodes pass over `dimensions`."""
    text = fresh()
    answer = bed.target.embed([text], dimensions=CUT)
    if answer.status != 200:
        check_refused(answer, 400)
        return "refused"
    found, wanted = vectors_in(answer), bed.truth.vectors([text])[:, :CUT]
    if found.shape != wanted.shape:
        raise Broken(f"200, {found.shape[-1]} components")
    if not np.allclose(found, wanted / np.linalg.norm(wanted), atol=1e-6):
        raise Broken("200, not of unit length")
    return ""


def dimensions_too_wide(bed: Bed) -> str:
    """More than the model has."""
    answer = bed.target.embed([fresh()], dimensions=TOO_WIDE)
    if answer.status == 200:
        raise Broken(f"200, {vectors_in(answer).shape[-1]} components")
    check_refused(answer, 400)
    return ""


def width_is_told(bed: Bed) -> str:
    """Before anything is embedded: the list of models has a member for it, and it is right."""
    bed.need_list()
    entries = bed.target.ask(method="GET", path="/v1/models").json().get("data") or [{}]
    named = [each for each in entries if {each.get("id"), *each.get("aliases", ())} & set(NAMES)]
    widths = [value for each in named for name, value in each.items() if name in WIDTH_MEMBERS and value is not None]
    if named and not widths:
        raise NotClaimed
    wanted = bed.truth.vectors([fresh()]).shape[1]
    if widths != [wanted]:
        raise Broken(f"{widths or 'no model'}")
    return ""


WIDTH_MEMBERS = ("width", "dimensions", "dimension", "embedding_length", "output_vector_size")


def usage(fault: str) -> Callable[[Bed], str]:
    """The tokens that were embedded, whatever the nodes say."""

    def attempt(bed: Bed) -> str:
        texts = [fresh(), fresh(), fresh()]
        with bed.both(fault):
            said = bed.check_embeds(texts).json().get("usage")
        tokens = bed.truth.tokens(bed.truth.ids(texts))
        found = said.get("prompt_tokens") if isinstance(said, dict) else None
        if found != tokens:
            raise Broken("none" if said is None else f"{found} instead of {tokens}")
        return ""

    return attempt


MODELS = "Whose vectors they are"
WHOLE = "Whether they are whole"

ROWS = (
    Row(MODELS, "A node joins with another model's weights under the same name", joins_with_other_weights),
    Row(MODELS, "A node's weights change while it serves: out within 300 requests", turns_to_other_weights),
    Row(MODELS, "A node answers with another model's width (256 instead of 384)", wrong_answer("other-width")),
    Row(MODELS, "An unknown model is refused, also where the nodes answer any name", unknown_model),
    Row(MODELS, "The reply names the model that was asked for", own_name),
    Row(MODELS, "`dimensions: 128` gives 128, of unit length, or is refused; the nodes pass over it", dimensions_cut),
    Row(MODELS, "`dimensions: 4096` is refused", dimensions_too_wide),
    Row(MODELS, "The nodes' vectors are three times as long: unit length", wrong_answer("long", both=True)),
    Row(MODELS, "`/v1/models` tells the width, and it is right", width_is_told),
    Row(WHOLE, "One vector too few", wrong_answer("too-few")),
    Row(WHOLE, "One vector too many", wrong_answer("too-many")),
    Row(WHOLE, "Each vector with index 0", wrong_answer("same-index")),
    Row(WHOLE, "Vectors in reverse order, with their right index: put in order", wrong_answer("shuffled", both=True)),
    Row(WHOLE, "NaN in a vector, in base64", wrong_answer("nan")),
    Row(WHOLE, "Infinity in a vector, as JSON", wrong_answer("inf", "float")),
    Row(WHOLE, "`null` in a vector", wrong_answer("null", "float")),
    Row(WHOLE, "A vector of zeros", wrong_answer("zero")),
    Row(WHOLE, "Base64 was asked, the nodes send floats: base64", wrong_answer("floats", both=True)),
    Row(WHOLE, "Floats were asked, the nodes send base64: floats", wrong_answer("base64", "float", both=True)),
    Row(WHOLE, "Base64 of big-endian floats", wrong_answer("big-endian")),
    Row(WHOLE, "Base64 that ends too early", wrong_answer("cut-base64")),
    Row(WHOLE, "JSON that ends in the middle", wrong_answer("cut-json")),
    Row(WHOLE, "An error object with status 200", wrong_answer("error-in-200")),
    Row(WHOLE, "A web page with status 200", wrong_answer("html")),
    Row(WHOLE, "A body of 64 MB", wrong_answer("oversize")),
    Row(WHOLE, "The nodes leave `usage` out: the tokens that were embedded", usage("no-usage")),
    Row(WHOLE, "The nodes say a billion tokens: the tokens that were embedded", usage("absurd-usage")),
)
