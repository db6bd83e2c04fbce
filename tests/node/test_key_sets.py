"""Keys for confidential requests: new ones in time, old ones forgotten in time, and no request embedded twice."""

import pytest

from embedmesh.confidential.attestation import KeyAttester, SignedStatement
from embedmesh.confidential.documents import read_keys
from embedmesh.node.key_sets import PRESSED_OVERLAP_S, REPLAYS_OF_SET_MAX, SCHEMES, SETS_KEPT_MAX, KeySets
from embedmesh.rules.confidential import HPKE_SCHEME, SDK_SCHEME
from embedmesh.rules.limits import CONFIDENTIAL_KEY_S, CONFIDENTIAL_OVERLAP_S
from embedmesh.signing.identity import Identity

NODE = Identity(bytes(range(32)))
MODELS = {"tests/tiny": "ab" * 32}


class TwoClocks:
    """Two clocks: a jump moves only the one that others agree with."""

    def __init__(self) -> None:
        self.now, self.jumped = 5_000.0, 1_700_000_000.0

    def monotonic(self) -> float:
        return self.now

    def unix_ms(self) -> int:
        return int((self.now + self.jumped) * 1000)


class World:
    """The keys of one node, and its clock."""

    def __init__(self) -> None:
        self.clock = TwoClocks()
        self.keys = KeySets(NODE, self.clock)

    def public(self) -> bytes:
        """The newest key of one scheme."""
        return read_keys(self.keys.signed(MODELS)).keys[SDK_SCHEME]

    def takes(self, public: bytes) -> bool:
        return self.keys.find(SDK_SCHEME, public) is not None

    def fill(self, public: bytes, requests: int) -> None:
        """Have that many requests embedded under a key, other ones each time."""
        held = self.keys.find(SDK_SCHEME, public)
        assert held is not None
        before = self.embedded = getattr(self, "embedded", 0) + requests
        for number in range(before, before + requests):
            held.of.remember(number.to_bytes(32, "big"))


def test_the_document_says_what_is_kept() -> None:
    """For its models, signed by the node; its times hold a minute of clocks that differ, and the overlap."""
    world = World()
    signed = world.keys.signed(MODELS)
    document = read_keys(signed)
    now_ms = world.clock.unix_ms()
    assert (document.models, document.public_key) == (MODELS, NODE.public_key)
    assert document.keys.keys() == set(SCHEMES)
    assert document.not_before_ms == now_ms - 60_000
    assert document.not_after_ms == now_ms + (CONFIDENTIAL_KEY_S + CONFIDENTIAL_OVERLAP_S) * 1000
    assert signed.evidence == ()
    assert world.keys.signed(dict(MODELS)) is signed


def test_other_models_have_another_document_for_the_same_keys() -> None:
    world = World()
    first, other = read_keys(world.keys.signed(MODELS)), read_keys(world.keys.signed(MODELS | {"b": "cd" * 32}))
    assert first.models != other.models
    assert (first.keys, first.not_after_ms) == (other.keys, other.not_after_ms)


def test_a_key_is_of_its_scheme_alone() -> None:
    world = World()
    keys = read_keys(world.keys.signed(MODELS)).keys
    assert keys[SDK_SCHEME] != keys[HPKE_SCHEME]
    assert world.keys.find(SDK_SCHEME, keys[HPKE_SCHEME]) is None
    assert world.keys.find(HPKE_SCHEME, keys[SDK_SCHEME]) is None
    held = world.keys.find(HPKE_SCHEME, keys[HPKE_SCHEME])
    assert held is not None and held.key.public == keys[HPKE_SCHEME]


def test_new_keys_every_day_and_the_old_ones_through_the_overlap() -> None:
    world = World()
    first = world.public()
    world.clock.now += CONFIDENTIAL_KEY_S - 1
    assert world.public() == first
    world.clock.now += 1
    second = world.public()
    assert second != first
    assert world.takes(first) and world.takes(second)
    world.clock.now += CONFIDENTIAL_OVERLAP_S - 1
    assert world.takes(first)
    world.clock.now += 1
    assert not world.takes(first)
    assert world.takes(second)


def test_a_node_that_is_not_asked_anything_forgets_them_too() -> None:
    """By a look now and then; a node that slept for days has none of the old ones."""
    world = World()
    first = world.public()
    world.clock.now += 10 * CONFIDENTIAL_KEY_S
    world.keys.look()
    assert not world.takes(first)


@pytest.mark.parametrize("jump_s", [-61.0, 2.0 * CONFIDENTIAL_KEY_S])
def test_where_the_clock_of_the_document_jumps_there_are_new_keys(jump_s: float) -> None:
    """Out of the old ones' time: nobody would take their document, or the machine slept."""
    world = World()
    first = world.public()
    world.clock.jumped += jump_s
    second = world.public()
    assert second != first
    assert not world.takes(first)


def test_a_small_step_of_that_clock_changes_nothing() -> None:
    world = World()
    first = world.public()
    world.clock.jumped -= 59
    assert world.public() == first


def test_a_request_is_seen_until_it_is_forgotten() -> None:
    world = World()
    held = world.keys.find(SDK_SCHEME, world.public())
    assert held is not None
    assert not held.of.has_seen(b"one")
    held.of.remember(b"one")
    assert held.of.has_seen(b"one") and not held.of.has_seen(b"two")
    held.of.forget(b"one")
    assert not held.of.has_seen(b"one")


def test_half_full_there_are_new_keys_and_full_the_old_ones_take_no_more() -> None:
    world = World()
    first = world.public()
    world.fill(first, REPLAYS_OF_SET_MAX // 2)
    second = world.public()
    assert second != first
    world.fill(first, REPLAYS_OF_SET_MAX // 2)
    held = world.keys.find(SDK_SCHEME, first)
    assert held is not None and held.of.has_seen(b"never sent")
    assert world.public() == second


def test_there_are_never_more_than_a_few_sets() -> None:
    """However many requests come, the sets are bounded; the oldest goes early, but never before its locks are over."""
    world = World()
    publics = [world.public()]
    for _ in range(2 * SETS_KEPT_MAX):
        world.fill(publics[-1], REPLAYS_OF_SET_MAX // 2)
        publics.append(world.public())
    assert len(set(publics)) == SETS_KEPT_MAX
    assert all(map(world.takes, publics))
    world.clock.now += PRESSED_OVERLAP_S
    after = world.public()
    assert after not in publics
    assert [world.takes(one) for one in (publics[0], publics[1], after)] == [False, True, True]


def test_evidence_is_made_for_each_document() -> None:
    clock, operator = TwoClocks(), Identity(bytes(32))
    keys = KeySets(NODE, clock, KeyAttester(operator))
    first = keys.signed(MODELS)
    clock.now += CONFIDENTIAL_KEY_S
    second = keys.signed(MODELS)
    assert first != second
    for signed in (first, second):
        SignedStatement(operator.public_key).verify(signed, read_keys(signed))
