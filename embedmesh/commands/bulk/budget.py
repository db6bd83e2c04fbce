"""A job in the gateway's ledger: what `--budget` sets aside for `embedmesh embed`, and gives back at the end."""

from typing import Any

from embedmesh.bulk.manifest import Manifest
from embedmesh.commands.account_client import AccountClient
from embedmesh.commands.operator import ApiRefusal
from embedmesh.commands.output import WrongUsage
from embedmesh.rules.limits import JOB_S_MAX
from embedmesh.rules.money import format_usd

NO_JOBS = "has no jobs in a ledger, which --budget needs. Leave --budget out, or use an embedmesh gateway."
NOT_THERE = frozenset({"not_found", "method_not_allowed", "http_404", "http_405", "http_501"})


class Budget:
    """Money for one job. It is opened once, however often the job is run again."""

    def __init__(self, account: AccountClient, manifest: Manifest, name: str) -> None:
        self._account = account
        self._manifest = manifest
        self._name = name

    def open(self, nanousd: int, texts_total: int | None) -> str:
        """The id of the job to name in requests. Raises ApiRefusal where the balance lacks the money, WrongUsage."""
        known = self._known()
        charged = sum(job["charged_nanousd"] for job in known)
        if known and known[-1]["status"] == "open":
            last = known[-1]
            if self._manifest.ledger_jobs[-1]["budget_nanousd"] == nanousd:
                return str(last["id"])
            self._account.post("jobs", last["id"], "cancel")
        if charged >= nanousd:
            raise WrongUsage(f"The job has been charged {format_usd(charged)} already. Give a larger --budget.")
        left = nanousd - charged
        made = self._lost(left) or self._make(left, texts_total)
        self._manifest.charged_to(made["id"], nanousd)
        return str(made["id"])

    def close(self) -> int:
        """Give back what was not spent; what the job has cost in all, in nano-USD."""
        for job in self._manifest.ledger_jobs[-1:]:
            self._account.post("jobs", job["ledger_job"], "cancel")
        return sum(job["charged_nanousd"] for job in self._known())

    def _known(self) -> list[dict[str, Any]]:
        return [self._account.get("jobs", job["ledger_job"]) for job in self._manifest.ledger_jobs]

    def _lost(self, nanousd: int) -> dict[str, Any] | None:
        """The job that a run had made when it was killed, before it could note it."""
        known = {job["ledger_job"] for job in self._manifest.ledger_jobs}
        for job in self._account.rows("jobs", cursor="id"):
            if job.get("name") == self._name and job["status"] == "open" and job["id"] not in known:
                if job["budget_nanousd"] == nanousd:
                    return dict(job)
                self._account.post("jobs", job["id"], "cancel")
        return None

    def _make(self, nanousd: int, texts_total: int | None) -> dict[str, Any]:
        # Within a week the same command pays nothing twice.
        body: dict[str, Any] = {"budget_nanousd": nanousd, "expires_in_s": JOB_S_MAX, "name": self._name}
        if texts_total is not None:
            body["texts_total"] = texts_total
        made: dict[str, Any] = self._account.post("jobs", body=body)
        return made


def check_has_jobs(account: AccountClient, base_url: str) -> None:
    """Raises WrongUsage where the server keeps no jobs, SetupError where none answers."""
    try:
        account.get("jobs", limit=1)
    except ApiRefusal as refusal:
        if refusal.code in NOT_THERE:
            raise WrongUsage(f"{base_url} {NO_JOBS}") from None
        raise
