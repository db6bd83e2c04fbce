"""Whom a caller trusts with its texts: nodes by their identities, or somebody who vouches for the keys of nodes.

Pins come from the nodes and their operators themselves, never through the gateway that the request goes through: an
identity that the gateway hands out for the first time is worth as much as the gateway's word.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from embedmesh.client.errors import WrongPins
from embedmesh.confidential.attestation import SignedStatement, Verifier
from embedmesh.rules.base64s import decode64
from embedmesh.signing.identity import PUBLIC_KEY_BYTES, node_id

NODE_PIN, ATTESTATION_PIN = "embedmesh-node", "embedmesh-attestation"
KEY_FORM = "ed25519:"
PINS_BYTES_MAX = 1024 * 1024  # about nine thousand nodes
FORMS: Final = f"`{NODE_PIN} {KEY_FORM}BASE64 NODE_ID` or `{ATTESTATION_PIN} {KEY_FORM}BASE64`"


class Pins:
    """`nodes` are identities (Ed25519 public keys); `verifiers` accept a node's keys by evidence about them.

    A node is trusted if its identity is among the nodes, or if one of the verifiers accepts its keys.
    """

    def __init__(self, nodes: Iterable[bytes] = (), verifiers: Iterable[Verifier] = ()) -> None:
        """Raises WrongPins where nothing is pinned, or an identity is none."""
        self.nodes = frozenset(nodes)
        self.verifiers = tuple(verifiers)
        if any(len(key) != PUBLIC_KEY_BYTES for key in self.nodes):
            raise WrongPins(f"A node's identity is an Ed25519 public key of {PUBLIC_KEY_BYTES} bytes.")
        if not self.nodes and not self.verifiers:
            raise WrongPins(f"Nothing is pinned. Give lines of the form {FORMS}.")

    @classmethod
    def read(cls, path: str | Path) -> "Pins":
        """The pins in a file. Raises WrongPins, which names the line."""
        try:
            with Path(path).open("rb") as file:
                raw = file.read(PINS_BYTES_MAX + 1)
        except OSError as error:
            raise WrongPins(f"{path} cannot be read ({error.strerror}).") from None
        if len(raw) > PINS_BYTES_MAX:
            raise WrongPins(f"{path} has more than {PINS_BYTES_MAX:,} bytes: is it a file of pins?")
        return cls.parse(raw, str(path))

    @classmethod
    def parse(cls, raw: bytes, name: str = "pins") -> "Pins":
        """The pins in the lines of a file called `name`. Raises WrongPins.

        Empty lines and those that begin with `#` say nothing; every other line is a pin, or an error.
        """
        nodes: dict[bytes, int] = {}
        authorities: dict[bytes, int] = {}
        for number, line in enumerate(raw.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith(b"#"):
                continue
            try:
                kind, key = _pin(line.decode("ascii").split())
            except UnicodeDecodeError:
                raise WrongPins(f"{name}, line {number}: a pin is plain ASCII.") from None
            except ValueError as error:
                raise WrongPins(f"{name}, line {number}: {error}") from None
            known = nodes if kind == NODE_PIN else authorities
            if key in known:
                raise WrongPins(f"{name}, line {number}: the same key as in line {known[key]}. Remove one of them.")
            known[key] = number
        if not nodes and not authorities:
            raise WrongPins(f"{name} pins nothing. Give lines of the form {FORMS}.")
        return cls(nodes, [SignedStatement(key) for key in authorities])

    def in_words(self) -> str:
        """What is pinned, for a message: at most four node ids, and how many others."""
        ids = sorted(map(node_id, self.nodes))
        shown = ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
        vouchers = f"{len(self.verifiers)} that vouch for nodes" if self.verifiers else ""
        return " and ".join(filter(None, (shown, vouchers)))


def _pin(words: list[str]) -> tuple[str, bytes]:
    """The kind and the key of a line. Raises ValueError."""
    if words[0] not in (NODE_PIN, ATTESTATION_PIN):
        raise ValueError(f"a pin begins with {NODE_PIN} or {ATTESTATION_PIN}.")
    if len(words) != (3 if words[0] == NODE_PIN else 2):
        raise ValueError(f"a pin has the form {FORMS}.")
    if not words[1].startswith(KEY_FORM):
        raise ValueError(f"the key begins with {KEY_FORM}.")
    try:
        key = decode64(words[1].removeprefix(KEY_FORM), PUBLIC_KEY_BYTES)
    except ValueError:
        raise ValueError(f"the key is not {PUBLIC_KEY_BYTES} bytes in padded base64.") from None
    if words[0] == NODE_PIN and words[2] != node_id(key):
        raise ValueError(f"the node id is not that of the key, which is {node_id(key)}. Copy the whole line again.")
    return words[0], key
