"""Files of pins: strict, with the line in every error."""

import base64
from pathlib import Path

import pytest

from embedmesh.client import EmbedmeshError, Pins, WrongPins
from embedmesh.signing.identity import Identity, node_id

ONE, TWO = (Identity(seed * 32).public_key for seed in (b"1", b"2"))


def text(key: bytes) -> str:
    return base64.b64encode(key).decode()


def pin(key: bytes) -> str:
    return f"embedmesh-node ed25519:{text(key)} {node_id(key)}"


def operator(key: bytes) -> str:
    return f"embedmesh-attestation ed25519:{text(key)}"


def test_a_file_may_pin_several_nodes_and_operators(tmp_path: Path) -> None:
    file = tmp_path / "pins"
    file.write_text(f"# nodes of the lab\n\n{pin(ONE)}\r\n  {pin(TWO)}  \n\t# ätzend\n{operator(ONE)}\n", "utf-8")
    pins = Pins.read(file)
    assert pins.nodes == {ONE, TWO}
    assert len(pins.verifiers) == 1
    assert node_id(ONE) in pins.in_words()
    assert "1 that vouch" in pins.in_words()


WRONG = {
    "empty": ("# nothing\n", "pins nothing"),
    "unknown kind": ("ssh-ed25519 AAAA me", "line 1: a pin begins with"),
    "no id": (f"\nembedmesh-node ed25519:{text(ONE)}", "line 2: a pin has the form"),
    "a comment behind": (f"{pin(ONE)} # mine", "line 1: a pin has the form"),
    "an id behind an operator": (f"{operator(ONE)} x", "line 1: a pin has the form"),
    "another kind of key": (f"embedmesh-node rsa:{text(ONE)} {node_id(ONE)}", "line 1: the key begins with ed25519:"),
    "another node's id": (f"embedmesh-node ed25519:{text(ONE)} {node_id(TWO)}", f"which is {node_id(ONE)}"),
    "cut": (f"embedmesh-node ed25519:{text(ONE)[:-2]} {node_id(ONE)}", "not 32 bytes in padded base64"),
    "too short": (f"embedmesh-node ed25519:{text(ONE[:31])} {node_id(ONE)}", "not 32 bytes"),
    "urlsafe": (f"embedmesh-node ed25519:{'_' * 43}= {node_id(ONE)}", "not 32 bytes"),
    "no ASCII": (f"{pin(ONE)}\nembedmesh-node ä".encode().decode(), "line 2: a pin is plain ASCII"),
    "twice": (f"{pin(ONE)}\n\n{pin(ONE)}\n", "line 3: the same key as in line 1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_line_is_named(tmp_path: Path, wrong: str) -> None:
    file = tmp_path / "pins"
    file.write_text(WRONG[wrong][0], "utf-8")
    with pytest.raises(WrongPins, match="pins") as caught:
        Pins.read(file)
    assert WRONG[wrong][1] in str(caught.value)
    assert isinstance(caught.value, EmbedmeshError)


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(WrongPins, match="No such file"):
        Pins.read(tmp_path / "none")
    (tmp_path / "big").write_bytes(b"#" * (1024 * 1024 + 1))
    with pytest.raises(WrongPins, match="more than"):
        Pins.read(tmp_path / "big")


def test_pins_of_nothing_are_none() -> None:
    with pytest.raises(WrongPins, match="Nothing is pinned"):
        Pins()
    with pytest.raises(WrongPins, match="32 bytes"):
        Pins([b"short"])
    assert Pins([ONE]).nodes == {ONE}
