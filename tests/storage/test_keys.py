"""Which bearer keys are good: stored as keyed hashes only, remembered for a while, forgotten once they change."""

import asyncio
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.rules.errors import InvalidValue, NotFound
from embedmesh.rules.ports import Caller
from embedmesh.storage.secrets.tokens import PREFIXES, checksum, hash_token, make_token, stamped, well_formed
from embedmesh.storage.store import Store
from tests.storage.shop import SECRET, Shop

GOOD = "em_" + "0123456789abcdefABCDEFghijklMNOP"
GOOD += checksum(GOOD)


async def test_a_key_finds_its_caller_until_it_is_revoked(shop: Shop, store: Store) -> None:
    """A key is good from the moment it is made until the moment it is revoked, in another process or not."""
    key, token = shop.books.keys.create("a", ["embeddings", "keys"], name="laptop")
    assert await store.keys.find(token) == Caller("a", key.key_id, frozenset({"embeddings", "keys"}))
    assert shop.books.keys.revoke(key.key_id)
    await store.changes.look()
    assert await store.keys.find(token) is None
    assert not shop.books.keys.revoke(key.key_id)
    assert [known.revoked_ms for known in shop.books.keys.list("a")] == [shop.clock.now_ms]


async def test_a_key_expires(shop: Shop, store: Store) -> None:
    """A key with an end is good before it and not from then on."""
    _, token = shop.books.keys.create("a", ["embeddings"], expires_ms=shop.clock.now_ms + 10)
    shop.clock.now_ms += 9
    assert await store.keys.find(token) is not None
    shop.clock.now_ms += 1
    assert await store.keys.find(token) is None


async def test_a_well_formed_key_of_nobody_is_not_found(store: Store) -> None:
    """Whoever knows how keys are made still has none."""
    assert await store.keys.find(make_token("em", SECRET)) is None
    assert await store.keys.find(make_token("em_admin", SECRET)) is None


@pytest.mark.parametrize(
    "token",
    [
        "",
        "em_",
        "_" + GOOD[3:],
        GOOD[:-1],
        GOOD + "0",
        GOOD[3:],
        "sk_" + GOOD[3:],
        "em_admin_" + GOOD[3:],
        GOOD.swapcase(),
        GOOD[:5] + ("a" if GOOD[5] != "a" else "b") + GOOD[6:],
        GOOD[:5] + "_" + GOOD[6:],
        GOOD[:5] + "é" + GOOD[6:],
        GOOD[:5] + "\x00" + GOOD[6:],
        GOOD + "\n",
        "em_" + "٣" * 38,
        "x" * 1_000_000,
        "\ud800" * 41,
    ],
)
def test_junk_dies_without_a_query(token: str) -> None:
    """What is not a key of ours is known as such from its text alone."""
    assert well_formed(GOOD)
    assert not well_formed(token)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_key_that_was_made_is_well_formed(prefix: str) -> None:
    assert well_formed(make_token(prefix, SECRET))


@given(st.integers(0, 31), st.sampled_from(string.ascii_letters + string.digits))
def test_a_stamp_cannot_be_made_without_the_secret(at: int, other: str) -> None:
    """Nor can what it is on be changed, whatever checksum is put on that; keys of before have none."""
    token = make_token("em", SECRET)
    assert stamped(token, SECRET)
    assert not stamped(token, bytes(32))
    assert not stamped(GOOD, SECRET)
    start = token[:-6]
    changed = start[: 3 + at] + other + start[4 + at :]
    assert stamped(changed + checksum(changed), SECRET) == (changed == start)


@pytest.mark.parametrize(
    "start", ["sk_" + GOOD[3:35], GOOD[:34], GOOD[:35] + "0", GOOD[:34] + "-", "_" + GOOD[3:35], GOOD[3:35]]
)
def test_a_right_checksum_alone_makes_no_key(start: str) -> None:
    """Another prefix, another length, or a character that no key has."""
    assert not well_formed(start + checksum(start))


def test_the_stored_form_of_a_key_is_the_same_in_every_release() -> None:
    """Else all keys of all stores would be good for nothing; without the secret it cannot be told."""
    assert hash_token(GOOD, SECRET).hex() == "3fdb5a071f930a2c5c6c913df60b694e5e72b36e0c0d2637e4f7cf7f3968d4f9"
    assert hash_token(GOOD, bytes(32)).hex() == "3eb542f8c45eebd3a017b4fc0a6c4cbb5a075dcacfd931f38b6f09a5df1f2a8b"


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=60))
def test_the_checksum_is_six_letters_or_digits(text: str) -> None:
    """Whatever is checked, the checksum has its six characters and depends on the text."""
    assert len(checksum(text)) == 6
    assert checksum(text).isalnum()
    assert checksum(text) != checksum(text + "x")


async def test_no_key_is_ever_on_disk(shop: Shop, store: Store) -> None:
    """Neither a key nor its random part is in any file of the store."""
    _, token = shop.books.keys.create("a", ["embeddings"])
    _, admin = shop.books.keys.create("a", ["admin"])
    assert admin.startswith("em_admin_")
    assert await store.keys.find(token)
    if shop.place != shop.path:
        return  # its files are the server's
    on_disk = b"".join(file.read_bytes() for file in shop.path.parent.iterdir())
    assert b"embeddings" in on_disk  # the rows are there
    for secret in (token, admin):
        assert secret.rpartition("_")[2][:12].encode() not in on_disk


@pytest.mark.parametrize(
    ("account", "scopes", "name", "failure"),
    [
        ("nobody", ["embeddings"], "", NotFound),
        ("revenue", ["embeddings"], "", InvalidValue),
        ("a\0", ["embeddings"], "", InvalidValue),
        ("a", ["embeddings"], "\0", InvalidValue),
        ("a", [], "", InvalidValue),
        ("a", ["everything"], "", InvalidValue),
        ("a", ["embeddings"], "n" * 129, InvalidValue),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(
    shop: Shop, account: str, scopes: list[str], name: str, failure: type[Exception]
) -> None:
    """A key belongs to an account and may do something that exists."""
    with pytest.raises(failure):
        shop.books.keys.create(account, scopes, name=name)
    assert shop.books.keys.list() == []


def test_a_key_made_by_another_process_is_found(shop: Shop, tmp_path: Path) -> None:
    """The command line can make a key while a gateway runs."""
    script = (
        "import sys; from pathlib import Path; from tests.storage.shop import *\n"
        "books = Books.open(sys.argv[1], clock=HandClock(), secret=secret)\n"
        "print(books.keys.create('a', ['embeddings'])[1])"
    )

    async def look() -> None:
        store = await shop.open()
        made = subprocess.run(
            [sys.executable, "-c", script, str(shop.place)], capture_output=True, text=True, check=True
        )
        assert await store.keys.find(made.stdout.strip()) is not None
        await store.close()

    asyncio.run(look())
