"""A gateway's own metrics for Prometheus. Numbers and words of closed lists only: never a text, a key or an id.

A new metric is a line in one of the tables, and a value in the readings: of `gateway.build`, or of an API.
"""

import asyncio
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from types import TracebackType
from typing import NoReturn

import prometheus_client
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from embedmesh.gateway.api.worker_metrics import Collected, InTurns, WorkerMetrics, in_turns
from embedmesh.http.failures import TABLE
from embedmesh.rules.errors import Failure, InternalError
from embedmesh.rules.metrics import MetricReadings, MetricWords, words_and_labels

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NO_ROUTE = "none"  # of requests that reached none: no such path, no such method, or a head that says two things

# Each route, model and code is one of a closed list: ours, or the operator's catalogue. Models serve two routes or
# three, so that 100 models have at most 100 x 3 x 4 histograms, of 18 series, and 100 x 3 x 35 counters.
OUTCOMES_OF_CODES = {"ok": "ok", "broken_off": "left", "dropped": "left"} | {
    failure.code: "failed" if status >= 500 else "refused" for failure, (status, _) in TABLE.items()
}
"""What the code of a request's end means: `failed` is ours to mend; any other code is, too."""

INTERNAL_ERRORS = "Bugs of ours. Stays at 0."
ADMIN_REFUSED = "Requests of the admin API refused for their key, its scopes, or their certificate."
GATEWAY_HISTOGRAMS: dict[str, MetricWords] = {
    "request_seconds": (
        "Seconds from a request's head to its end. `outcome`: ok, left (by the caller), refused (4xx), failed (5xx).",
        "route",
        "model",
        "outcome",
    ),
}
GATEWAY_COUNTERS: dict[str, MetricWords] = {
    "requests": (
        "Requests that ended: `ok`, `broken_off`, `dropped`, or the code of the failure. `route` is `none` where "
        "none was reached, `model` is empty where it was not known or there is none.",
        "route",
        "model",
        "code",
    ),
    "internal_errors": INTERNAL_ERRORS,
    "admin_refused": ADMIN_REFUSED,
    "tokens": ("Tokens charged, but for lines of batches.", "model"),
    "charged_nanousd": ("Nano-USD charged, but for lines of batches.", "model"),
    "batches_ended": ("Batches that this gateway has brought to their end, by their last state.", "state"),
    "batch_lines": ("Lines of batches that are answered and settled, `completed` or `failed`.", "model", "result"),
    "batch_tokens": ("Tokens of lines of batches, read and made.", "model"),
    "batch_charged_nanousd": ("Nano-USD charged for lines of batches.", "model"),
    "ledger_checks": ("Checks of the ledger through the API, by result: `right` or `broken`.", "result"),
    "store_holds": "Holds written: money set aside for a request.",
    "store_holds_refused": "Holds refused: the account had too little, or the key had no room.",
    "store_captured": "Holds captured: the reply was delivered and charged.",
    "store_captured_under_tabs": "Of those captured, the ones whose money was taken from a tab.",
    "store_captured_at_notes": "Holds of streams whose gateway died or fell silent, captured at what was last noted.",
    "store_holds_extended": "Holds of streams extended, each time with a note of what was delivered.",
    "store_released": "Holds released: no reply was delivered, nothing was charged.",
    "store_expired": "Holds of requests, without a note, released because their deadline had passed.",
    "store_recovered": "Holds found open at a start of their gateway, without a note, and released.",
    "store_locks_opened": "Locks opened: money set aside for one confidential request to one node.",
    "store_locks_used": "Locks that a request has used.",
    "store_locks_expired": "Locks that no request had used before their deadline: their money went back.",
    "store_tabs_opened": "Tabs opened: money set aside for several requests of one key.",
    "store_tabs_recalled": "Tabs closed early, because a request needed what they had left.",
    "store_tabs_closed": "Tabs closed: what was not spent went back.",
    "store_tabs_expired": "Tabs ended because their deadline had passed.",
    "store_tabs_recovered": "Tabs found open at a start of their gateway, and ended.",
    "store_units_finished": "Units of batches finished: results and charges of some lines, in one step.",
    "store_late_captures": "Replies delivered after their hold had ended, so not charged. Stays at 0 on a good clock.",
    "store_broken_writes": "Writes that the store's own rules refused: bugs of ours. Stays at 0.",
    "store_commits": "Transactions committed.",
    "store_writes": "Writes committed; over commits this is the mean batch.",
    "store_failed_batches": "Transactions that failed and were written again.",
    "traces_sent": "Traces that the collector has taken.",
    "traces_dropped": "Traces that were made in vain: the collector was away, slow, or refused them.",
    "traces_over_rate": "Requests that were not traced, as too many were within a second.",
    "cache_hits": "Inputs answered from an account's cache of vectors.",
    "cache_misses": "Inputs looked for in an account's cache of vectors and not found.",
    "settings_reloads": "Times the settings were read again and applied.",
    "settings_reloads_refused": "Times they were read again and nothing was changed: something was wrong.",
    "log_lines_dropped": "Log lines that were not written: what reads standard error is too slow, or has gone.",
}
GATEWAY_GAUGES: dict[str, MetricWords] = {
    "batches_under_way": "Batches that this gateway works on.",
    "certificate_expires_timestamp_seconds": "When the certificate of the port expires. Only with TLS.",
    "files_free_bytes": "Bytes that files may take yet on their disk, at the last look, a minute ago at most. "
    "Not where it is too small for any.",
    "files_unavailable": "1 while the place of files cannot be used, at the last look, a minute ago at most.",
    "ledger_checked_timestamp_seconds": ("When the ledger was last checked through the API, by result.", "result"),
    "store_unavailable": "1 while the store does not take writes.",
    "in_flight": "Requests for embeddings, chat, completions and images being handled now.",
    "reply_bytes": "Bytes of replies that are being made or sent.",
    "store_largest_batch": "Writes in the largest transaction since the start.",
    "nodes_ready": "Nodes that take work now.",
    "tokens_outstanding": "Tokens sent to nodes and not answered yet.",
    "tokens_waiting": "Tokens of requests that wait for a node.",
    "cache_bytes": "Bytes of vectors in the caches of all accounts.",
    "settings_need_restart": "Settings that have changed in the file and stay as they were until a restart.",
}


WRITE_EVERY_S = 2.0  # another worker's numbers may be that old
WRITE_SHARE = 0.02  # of the time, at most, in which they are written: with many series they are older


class Metrics:
    """One registry for each process. `readings` gives values of the tables' metrics at each scrape.

    Counts of every request are plain numbers: the library's own counters cost four times as much. Pages are made in a
    thread, one at a time, which reads what the event loop counts meanwhile: series of one page may be a request apart.
    """

    def __init__(self, readings: Callable[[], MetricReadings], workers: WorkerMetrics | None = None) -> None:
        """With `workers`, a page is the sum over all gateway processes that share a port."""
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # or each counter and histogram has a gauge beside it
        self.registry = CollectorRegistry()
        self._workers = workers
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metrics")
        self._next_page: asyncio.Future[bytes] | None = None  # of all who ask until it is begun
        self._making = asyncio.Lock()
        self._read = readings
        self._readings: MetricReadings = {}  # taken on the event loop
        self._routes: defaultdict[str, RouteCounts] = defaultdict(RouteCounts)
        self.registry.register(Collected(self._collect))
        self.internal_errors = prometheus_client.Counter(
            "embedmesh_internal_errors", INTERNAL_ERRORS, registry=self.registry
        )
        self.admin_refused = prometheus_client.Counter("embedmesh_admin_refused", ADMIN_REFUSED, registry=self.registry)
        self.registry.register(Collected(lambda: families(self._readings, GATEWAY_COUNTERS, GATEWAY_GAUGES)))
        ProcessCollector(registry=self.registry)

    def route(self, path: str) -> "RouteCounts":
        """The counts of a route, by its path as `ROUTES` have it."""
        return self._routes[path]

    def requests(self) -> Counter[str]:
        """Code -> requests that ended with it."""
        found: Counter[str] = Counter()
        for counts in self._routes.values():
            for (code, _), times in counts.times.items():
                found[code] += sum(times.counts)
        return found

    async def page(self) -> bytes:
        """As `text`; the event loop waits for a few series at most. All who ask meanwhile share the next page."""
        if self._next_page is None:
            self._next_page = asyncio.ensure_future(self._made_page())
        return await asyncio.shield(self._next_page)

    async def _made_page(self) -> bytes:
        async with self._making:
            self._next_page = None
            self._readings = self._read()
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._text)

    async def keep(self, workers: WorkerMetrics) -> NoReturn:
        """Keep this worker's file up to date; cancel it."""
        while True:
            async with self._making:
                self._readings, began = self._read(), time.monotonic()
                await asyncio.get_running_loop().run_in_executor(self._thread, workers.write, self.registry)
            await asyncio.sleep(max(WRITE_EVERY_S, (time.monotonic() - began) / WRITE_SHARE))

    def text(self) -> bytes:
        """All metrics in the exposition format."""
        self._readings = self._read()
        return self._text()

    def _text(self) -> bytes:
        found = self.registry if self._workers is None else self._workers.summed(self.registry)
        return generate_latest(Collected(lambda: _interruptible(found.collect())))

    def _collect(self) -> Iterator[Metric]:
        requests: dict[tuple[str, ...], float] = {}
        tokens: Counter[tuple[str, ...]] = Counter()
        nanousd: Counter[tuple[str, ...]] = Counter()
        outcomes: defaultdict[tuple[str, ...], _Times] = defaultdict(_Times)
        for route, counts in list(self._routes.items()):
            for (code, model), times in in_turns(list(counts.times.items())):
                requests[route, model, code] = sum(times.counts)
                if times.nanousd or times.tokens:
                    tokens[model,] += times.tokens
                    nanousd[model,] += times.nanousd
                if route != NO_ROUTE:
                    outcomes[route, model, OUTCOMES_OF_CODES.get(code, "failed")].add(times)
        charged = {"tokens": tokens, "charged_nanousd": nanousd}
        yield from families({"requests": requests, **charged}, GATEWAY_COUNTERS, GATEWAY_GAUGES)
        bounds = [*map(str, map(float, BUCKETS_S)), "+Inf"]
        for name, said in GATEWAY_HISTOGRAMS.items():
            words, names = words_and_labels(said)
            family = HistogramMetricFamily(f"embedmesh_{name}", words, labels=names)
            for labels, times in in_turns(outcomes.items(), len(bounds)):
                family.add_metric(labels, list(zip(bounds, accumulate(times.counts), strict=True)), times.seconds)
            yield family


class RouteCounts:
    """How the requests of one route end."""

    __slots__ = ("times",)

    def __init__(self) -> None:
        self.times: dict[tuple[str, str], _Times] = {}  # by code and model

    def ended(self, code: str, model: str, seconds: float, tokens: int = 0, nanousd: int = 0) -> None:
        """Count a request, ended `seconds` after its head: `ok`, `broken_off`, `dropped`, or the code of its failure.

        `model` is empty if the request ended before its model was known. `tokens` and `nanousd` were charged.
        """
        try:
            times = self.times[code, model]
        except KeyError:
            times = self.times[code, model] = _Times()
        times.counts[bisect_left(BUCKETS_S, seconds)] += 1
        times.seconds += seconds
        times.tokens += tokens
        times.nanousd += nanousd


class CountedRequest:
    """One request that the flow does not count, as a context manager. Set `code` where nothing is raised."""

    def __init__(self, counts: RouteCounts) -> None:
        self._counts = counts
        self._began = time.monotonic()
        self.code = "ok"

    def __enter__(self) -> "CountedRequest":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        code = self.code if error is None else code_of(error)
        self._counts.ended(code, "", time.monotonic() - self._began)


def code_of(error: BaseException) -> str:
    """The code of a request that ended with this: `dropped` where its caller went."""
    if isinstance(error, Failure):
        return error.code
    went = isinstance(error, ConnectionError) or not isinstance(error, Exception)
    return "dropped" if went else InternalError.code


def families(
    readings: MetricReadings, counters: Mapping[str, MetricWords], gauges: Mapping[str, MetricWords]
) -> Iterator[Metric]:
    """The readings as Prometheus' client has them. A name that no table has is a KeyError."""
    for name, value in readings.items():
        words, labels = words_and_labels(counters[name] if name in counters else gauges[name])
        family: CounterMetricFamily | GaugeMetricFamily
        if name in counters:
            family = CounterMetricFamily(f"embedmesh_{name}", words, labels=labels)
        else:
            family = GaugeMetricFamily(f"embedmesh_{name}", words, labels=labels)
        for values, each in in_turns(value.items()) if isinstance(value, Mapping) else [((), value)]:
            family.add_metric(values, each)
        yield family


def _interruptible(metrics: Iterable[Metric]) -> Iterator[Metric]:
    for metric in metrics:
        metric.samples = InTurns(metric.samples)
        yield metric


class _Times:
    """Requests of one end by bucket, and the sums of their seconds, tokens and nano-USD."""

    __slots__ = ("counts", "nanousd", "seconds", "tokens")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.seconds = 0.0
        self.tokens = self.nanousd = 0

    def add(self, other: "_Times") -> None:
        """All but tokens and nano-USD."""
        self.counts = [mine + more for mine, more in zip(self.counts, other.counts, strict=True)]
        self.seconds += other.seconds
