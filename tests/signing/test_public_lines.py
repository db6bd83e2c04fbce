"""What a node's operator copies to clients: a public key in one line, beside the private one."""

from pathlib import Path

from embedmesh.signing.identity import Identity
from embedmesh.signing.public_lines import attestation_line, node_line, write_beside

KEY = Identity(bytes(range(32))).public_key


def test_a_line_names_its_kind_the_key_and_the_node() -> None:
    base64 = "ed25519:A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg="
    assert node_line(KEY) == f"embedmesh-node {base64} node_56475aa75463474c0285df5dbf2bcab7"
    assert attestation_line(KEY) == f"embedmesh-attestation {base64}"


def test_everybody_may_read_it_and_it_follows_the_key(tmp_path: Path) -> None:
    """Beside the private file, with nothing left over; written again only where it says something else."""
    private, public = tmp_path / "node.identity", tmp_path / "node.identity.pub"
    write_beside(private, node_line(KEY))
    first = public.stat()
    assert first.st_mode & 0o777 == 0o644
    assert public.read_text() == node_line(KEY) + "\n"
    write_beside(private, node_line(KEY))
    assert public.stat().st_ino == first.st_ino
    write_beside(private, node_line(Identity(bytes(32)).public_key))
    assert public.read_text() == node_line(Identity(bytes(32)).public_key) + "\n"
    assert list(tmp_path.iterdir()) == [public]
