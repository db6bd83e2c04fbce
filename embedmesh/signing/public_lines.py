"""Public keys as lines that people copy: from a node's data directory to the clients that are to trust it.

Who gets a line by a way of their own needs no gateway's word on which node they speak to.
"""

from base64 import b64encode
from contextlib import suppress
from pathlib import Path

from embedmesh.files import write_draft
from embedmesh.signing.identity import node_id

PUBLIC_MODE = 0o644
PUBLIC_SUFFIX = ".pub"


def node_line(public_key: bytes) -> str:
    """Of a node's identity: `embedmesh-node ed25519:BASE64 node_...`."""
    return f"embedmesh-node {_in_base64(public_key)} {node_id(public_key)}"


def attestation_line(public_key: bytes) -> str:
    """Of an operator's attestation key: `embedmesh-attestation ed25519:BASE64`."""
    return f"embedmesh-attestation {_in_base64(public_key)}"


def write_beside(private: Path, line: str) -> None:
    """Write the line to a file beside that of the private key, for everybody to read. Raises OSError."""
    path = private.with_name(private.name + PUBLIC_SUFFIX)
    content = line.encode("ascii") + b"\n"
    with suppress(FileNotFoundError):
        if path.read_bytes() == content:
            return
    draft = write_draft(path, content)
    draft.chmod(PUBLIC_MODE)
    draft.replace(path)


def _in_base64(public_key: bytes) -> str:
    return f"ed25519:{b64encode(public_key).decode('ascii')}"
