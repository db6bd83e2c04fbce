"""embedmesh.toml: what is read from it, and how what is wrong in it is told."""

import os
from pathlib import Path

import pytest

from embedmesh.commands.options import ConfigOfCommand
from embedmesh.rules.errors import SetupError
from embedmesh.rules.money import parse_usd
from embedmesh.settings import GatewaySettings, NodeSettings
from embedmesh.settings_file import MASK, BadSettings, fields_of, is_secret, read_config, shown


def written(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "embedmesh.toml"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_a_key_is_for_every_program_that_has_it_and_one_in_a_table_for_that_program(tmp_path: Path) -> None:
    text = """
port = 8099
data-dir = "data"
ask_max = 0.015
cors_origin = ["https://app.example.com"]
hedge = true
[gateway]
host = "0.0.0.0"
[node]
port = 9000
gateway = "https://gw.example"
"""
    read = read_config(written(tmp_path, text))
    assert read.values["gateway"] == {
        "port": 8099,
        "data_dir": tmp_path / "data",  # relative to the file, wherever a program is started
        "ask_max": parse_usd("0.015"),
        "cors_origin": ("https://app.example.com",),
        "hedge": True,
        "host": "0.0.0.0",
    }
    assert read.values["node"] == {"port": 9000, "data_dir": tmp_path / "data", "gateway": "https://gw.example"}
    assert GatewaySettings(**read.values["gateway"]).port == 8099
    assert NodeSettings(**read.values["node"]).port == 9000


WRONG = [  # text, what its first line of complaint says behind the file's name
    ("port = 70000", "line 1: `port` must be a whole number from 0 to 65535, not 70000."),
    ("\nport = '8099'", 'line 2: `port` must be a whole number from 0 to 65535, not "8099".'),
    ("port = true", "line 1: `port` must be a whole number from 0 to 65535, not true."),
    ("in_flight_max = 0", "line 1: `in_flight_max` must be a whole number from 1 to 65536, not 0."),
    ("hedge = 1", "line 1: `hedge` must be true or false, not 1."),
    ("prot = 8099", "line 1: embedmesh has no setting `prot`. Did you mean `port`?"),
    ("[gateway]\ncors_orign = []", "line 2: [gateway] has no setting `cors_orign`. Did you mean `cors_origin`?"),
    ("[node]\n\ncors_origin = []", "line 3: [node] has no setting `cors_origin`. [gateway] has it."),
    ("[gatewy]\nport = 1", "line 1: embedmesh has no setting `gatewy`. Did you mean `gateway`?"),
    ('policy = "fastst"', 'must be one of "fastest", "cheapest", "weighted", not "fastst". Did you mean "fastest"?'),
    ('cors_origin = "https://a.example"', 'must be a list of texts, such as ["one", "two"], not "https://a.example".'),
    ("cors_origin = [1]", 'must be a list of texts, such as ["one", "two"].'),
    ("ask_max = 1e9", "`ask_max` must be an amount in USD, such as 0.015, at most $"),
    ("data_dir = 1", "`data_dir` must be a path, as text, not 1."),
    ('catalogue = "~nobody-here/m.toml"', '`catalogue` must be a path, as text, not "~nobody-here/m.toml".'),
    (r'catalogue = "m\u0000"', "`catalogue` must be a path, as text, not "),
    (r'store = "m\u0000"', "`store` must be text."),
    (r'cors_origin = ["m\u0000"]', "`cors_origin` must be a list of texts"),
    ("port = " + "9" * 5_000, "is not TOML"),
    ("port = 0x" + "f" * 5_000, "must be a whole number from 0 to 65535, not a larger one."),
    ("ask_max = 1e999999999", "`ask_max` must be an amount in USD"),
    ("ask_max = 1e" + "9" * 30, "is not TOML: a number is too large."),
    ("listen_fd = 3", "embedmesh has no setting `listen_fd`."),
    ("tls-cert = 'a'\ntls_cert = 'b'", "line 2: `tls_cert` is given twice."),
    ("port = \nhost = 1", "is not TOML: Invalid value (at line 1, column 8)."),
    ("[node]\napi_key = 12345678", "line 2: `api_key` must be text."),  # a secret is not repeated
]


@pytest.mark.parametrize(
    ("text", "says"), WRONG, ids=[text.split("=")[0].strip() + str(n) for n, (text, _) in enumerate(WRONG)]
)
def test_what_is_wrong_is_told_with_its_line_what_is_allowed_and_the_nearest_name(
    text: str, says: str, tmp_path: Path
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(BadSettings) as refused:
        read_config(file)
    assert refused.value.problems[0].startswith(str(file))
    assert says in refused.value.problems[0]
    assert "12345678" not in str(refused.value)


def test_all_that_is_wrong_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadSettings) as refused:
        read_config(written(tmp_path, "port = -1\nprot = 1\n[gateway]\nhedge = 3"))
    assert len(refused.value.problems) == 3
    assert str(refused.value).endswith("(2 more: `embedmesh config check`)")


def test_a_file_that_anybody_may_write_is_refused_and_a_secret_that_anybody_may_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match="chmod o-w"):
        read_config(written(tmp_path, "port = 1", 0o606))
    assert read_config(written(tmp_path, "store = 'postgresql://me@db/x'", 0o644)).warning == ""
    read = read_config(written(tmp_path, "store = 'postgresql://me:secret@db/x'", 0o644))
    assert "chmod o-r" in read.warning and "secret@" not in read.warning
    assert read_config(written(tmp_path, "store = 'postgresql://me:secret@db/x'", 0o640)).warning == ""


def test_a_file_that_was_found_in_the_data_directory_does_not_name_another(tmp_path: Path) -> None:
    file = written(tmp_path, 'data_dir = "/elsewhere"')
    with pytest.raises(BadSettings, match="line 1: `data_dir` cannot be set"):
        read_config(file, data_dir=tmp_path)
    assert read_config(file).values["gateway"] == {"data_dir": Path("/elsewhere")}


def test_a_file_that_is_gone_or_a_pipe_now_does_not_reset_everything(tmp_path: Path) -> None:
    """A pipe is not even opened: nobody may ever write to it."""
    file = written(tmp_path, "port = 1")
    config = ConfigOfCommand(None, tmp_path)
    config.read()
    file.unlink()
    for pipe in (False, True):
        if pipe:
            os.mkfifo(file)
        with pytest.raises(SetupError, match="are no file any more"):
            config.read()
        assert config.values("gateway") == {"port": 1}
    file.unlink()
    written(tmp_path, "port = 2")
    config.read()
    assert config.values("gateway") == {"port": 2}


def test_secrets_are_never_shown() -> None:
    gateway, node = fields_of(GatewaySettings), fields_of(NodeSettings)
    assert shown("emj_abc", node["join"]) == shown("em_abc", node["api_key"]) == MASK
    assert shown("postgresql://me:pa:ss@db/x", gateway["store"]) == f"postgresql://me:{MASK}@db/x"
    assert shown("postgresql://db/x?password=hidden&a=b", gateway["store"]) == f"postgresql://db/x?password={MASK}&a=b"
    secret_like = {
        name
        for fields in (gateway, node)
        for name, hint in fields.items()
        if any(word in name for word in ("key", "token", "secret", "password", "join", "store"))
        and "Path" not in str(hint)
    }
    assert {name for name in secret_like if is_secret((gateway | node)[name])} >= secret_like - {
        "key_defaults",
        "gateway_key",  # a public key's fingerprint
        "queue_tokens_max",
    }
