"""Operators sign in at a real OpenID provider; the commands work with its tokens, and the audit has their names."""

import importlib.util
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.story.endpoint import Endpoint, run
from tests.story.npm import HERE, MODULES, why_no_packages

ROLES = ("--oidc-role-claim", "realm_access.roles", "--oidc-role", "operators=admin", "--oidc-role", "viewers=read")


@pytest.fixture(scope="module", autouse=True)
def needed() -> None:
    if importlib.util.find_spec("joserfc") is None:
        pytest.skip("joserfc is not installed: pip install 'embedmesh[oidc]'")
    if (why := why_no_packages()) is not None:
        pytest.skip(why)
    if not (MODULES / "oidc-provider").exists():
        pytest.skip("oidc-provider is not in tests/story/node/package-lock.json")


@contextmanager
def provider() -> Iterator[str]:
    """Its issuer's URL."""
    process = subprocess.Popen(["node", "oidc_provider.mjs"], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["issuer"]
    finally:
        process.kill()
        process.communicate()


def signed_in(issuer: str, client: str) -> str:
    """The access token that the provider gives this client, as docs/how-to/oidc.md has it."""
    found = httpx.get(f"{issuer}/.well-known/openid-configuration").json()
    form = {"grant_type": "client_credentials", "client_id": client, "client_secret": f"secret of {client}"}
    reply = httpx.post(found["token_endpoint"], data=form)
    assert reply.status_code == 200, reply.text
    token = reply.json()["access_token"]
    assert token.count(".") == 2
    return str(token)


def test_the_commands_work_for_who_has_signed_in(tmp_path: Path) -> None:
    """Each within its role; a token for another service is none; and an admin key needs no provider."""
    with provider() as issuer:
        terms = ("--oidc-issuer", issuer, "--oidc-audience", "embedmesh", *ROLES)
        endpoint = Endpoint(tmp_path / "data", *terms)
        try:
            endpoint.wait_ready()
            base = ("--gateway", endpoint.base_url, "--data-dir", tmp_path / "elsewhere")
            tokens = {
                client: signed_in(issuer, client) for client in ("deployer", "dashboard", "stranger", "elsewhere")
            }

            def operate(client: str, *words: str) -> tuple[int, str]:
                done = run(*words, *base, EMBEDMESH_ADMIN_KEY=tokens[client])
                return done.returncode, (done.stdout + done.stderr).decode()

            assert operate("deployer", "accounts", "create", "team")[0] == 0
            code, audit = operate("dashboard", "audit", "--actor", f"oidc:{issuer}#deployer", "--json")
            assert code == 0
            assert [(row["act"], row["object"], row["origin"]) for row in json.loads(audit)] == [
                ("account.create", "team", "127.0.0.1")
            ]
            code, text = operate("dashboard", "accounts", "create", "more")
            assert code == 1 and "lacks the scope" in text
            code, text = operate("stranger", "accounts", "list")
            assert code == 1 and "lacks the scope" in text
            code, text = operate("elsewhere", "accounts", "list")
            assert code == 1 and "does not accept this key" in text
        except BaseException:
            endpoint.kill_all()
            raise
    try:  # the provider is away: its keys are known, and an admin key never needed it
        assert operate("deployer", "accounts", "list")[0] == 0
        done = run("accounts", "list", "--data-dir", endpoint.data_dir)
        assert done.returncode == 0, done.stderr
        endpoint.check_ledger()
        assert endpoint.stop() == 0
    finally:
        endpoint.kill_all()
