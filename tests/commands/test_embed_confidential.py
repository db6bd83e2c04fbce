"""`embedmesh embed --confidential`: the output is the same as without, and the gateway has read none of it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from embedmesh.commands.embed import embed as command
from tests.client.gateway import TEXT, Raw, Received, ScriptedGateway, ScriptedNode, embed, envelope
from tests.commands.edge import bootstrap

Run = Callable[..., Result]


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with ScriptedGateway().running() as running:
        yield running


@pytest.fixture
def run(gateway: ScriptedGateway, tmp_path: Path) -> Run:
    """`embedmesh embed ARGUMENTS --confidential`, with the gateway's first node pinned."""
    data_dir = bootstrap(tmp_path / "data", gateway.base_url)
    pins = tmp_path / "node.identity.pub"
    pins.write_text(gateway.node.pin)

    def run(*arguments: object) -> Result:
        given = (*arguments, "--confidential", "--node-identity", pins, "--data-dir", data_dir)
        return CliRunner().invoke(command, list(map(str, given)))

    return run


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"{TEXT} {number}\n" for number in range(20)))
    return file


def sealed_only(gateway: ScriptedGateway) -> bool:
    paths = set(gateway.paths) == {"/nodes/lock", "/confidential/embeddings"}
    return paths and all(TEXT.encode() not in one.raw for one in gateway.received)


def test_the_output_is_what_it_is_without(gateway: ScriptedGateway, run: Run, texts: Path, tmp_path: Path) -> None:
    sealed, plain = tmp_path / "sealed.jsonl", tmp_path / "plain.jsonl"
    result = run(texts, "-o", sealed, "--batch", 7, "--dimensions", 8, "--input-type", "query")
    assert result.exit_code == 0, result.output
    assert sealed_only(gateway)
    assert gateway.node.opened[0]["input_type"] == "query"
    again = CliRunner().invoke(
        command,
        [
            str(texts),
            "-o",
            str(plain),
            "--dimensions",
            "8",
            "--input-type",
            "query",
            "--data-dir",
            str(tmp_path / "data"),
        ],
    )
    assert again.exit_code == 0, again.output
    assert sealed.read_bytes() == plain.read_bytes()


def test_a_line_that_the_node_refuses_costs_the_others_nothing(
    gateway: ScriptedGateway, run: Run, texts: Path, tmp_path: Path
) -> None:
    """Which one it is is said to us alone."""
    node = gateway.node

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        bad = [at for at, text in enumerate(request["input"]) if text.endswith(" 3")]
        node.refuses = envelope("context_length_exceeded", "too long", f"input.{bad[0]}") if bad else None
        return embed(request)

    take = node.take

    def refusing(call: Any, **said: Any) -> Any:
        body, _ = node._open(call)
        answer(json.loads(body))
        return take(call, **said)

    node.take = refusing  # type: ignore[method-assign]
    out = tmp_path / "out.jsonl"
    result = run(texts, "-o", out)
    assert result.exit_code == 1, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["index"] for row in rows if row["embedding"] is None] == [3]
    assert rows[3]["error"]["code"] == "context_length_exceeded"
    assert sealed_only(gateway)


def test_a_node_that_is_not_pinned_gets_nothing(
    gateway: ScriptedGateway, run: Run, texts: Path, tmp_path: Path
) -> None:
    gateway.nodes = [ScriptedNode()]
    result = run(texts, "-o", tmp_path / "out.jsonl", "--batch", 20)
    assert result.exit_code == 2
    assert "Nothing was sent: the gateway offers the node" in result.stderr
    assert gateway.paths == ["/nodes/lock"] * 4


def test_a_wrong_reply_ends_the_run(gateway: ScriptedGateway, run: Run, texts: Path, tmp_path: Path) -> None:
    gateway.said = {"lock": 5}
    result = run(texts, "-o", tmp_path / "out.jsonl")
    assert result.exit_code == 3
    assert "another lock" in result.stderr


def test_a_reply_that_was_lost_is_asked_for_with_the_same_bytes(
    gateway: ScriptedGateway, run: Run, texts: Path, tmp_path: Path
) -> None:
    lost = [Raw(b"")] * 2

    def script(received: Received) -> Any:
        if received.path.endswith("confidential/embeddings") and lost:
            if received.raw not in gateway.replies:
                gateway.replies[received.raw] = gateway.sealed(received.body)
            return lost.pop()
        return None

    gateway.script = script
    assert run(texts, "-o", tmp_path / "out.jsonl").exit_code == 0
    assert len({one.raw for one in gateway.received}) == 2
    assert len(gateway.node.opened) == 1


def test_a_node_that_has_new_keys_is_asked_again(
    gateway: ScriptedGateway, run: Run, texts: Path, tmp_path: Path
) -> None:
    """It was restarted, and the gateway has not heard of it yet."""
    left: list[Any] = [
        (409, envelope("lock_expired"), {"x-should-retry": "false"}),
        (400, envelope("confidential_refused")),
    ]
    gateway.script = lambda one: left.pop() if left and one.path.endswith("confidential/embeddings") else None
    assert run(texts, "-o", tmp_path / "out.jsonl").exit_code == 0
    assert len(gateway.locks) == 3


def test_a_run_that_began_sealed_does_not_go_on_in_the_clear(
    gateway: ScriptedGateway, run: Run, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    gateway.said = {"lock": 5}
    run(texts, "-o", out)
    gateway.said = {}
    state = json.loads((tmp_path / "out.jsonl.state").read_text()) if (tmp_path / "out.jsonl.state").exists() else {}
    assert run(texts, "-o", out).exit_code == 0, state
    plain = CliRunner().invoke(command, [str(texts), "-o", str(out), "--data-dir", str(tmp_path / "data")])
    assert plain.exit_code == 2
    assert "another confidential" in plain.stderr
    assert sealed_only(gateway)


@pytest.mark.parametrize("arguments", [["--confidential"], ["--node-identity", "x"]])
def test_both_options_go_together(tmp_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(command, [*arguments, "--data-dir", str(tmp_path)], input="a\n")
    assert result.exit_code == 2
    assert "go together" in result.stderr


def test_a_wrong_pin_is_named(tmp_path: Path) -> None:
    (tmp_path / "pins").write_text("\nnode_1\n")
    result = CliRunner().invoke(
        command, ["--confidential", "--node-identity", str(tmp_path / "pins"), "--data-dir", str(tmp_path)], input="a\n"
    )
    assert result.exit_code == 2
    assert "line 2: a pin begins with" in result.stderr
