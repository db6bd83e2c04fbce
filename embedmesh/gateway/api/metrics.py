"""A gateway's own metrics for Prometheus. Numbers and fixed labels only: never a text, a key or an id."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate

import prometheus_client
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from embedmesh.gateway.api.worker_metrics import Collected, WorkerMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

GATEWAY_COUNTERS = {
    "store_holds": "Holds written: money set aside for a request.",
    "store_holds_refused": "Holds refused: the account had too little, or the key had no room.",
    "store_captured": "Holds captured: the reply was delivered and charged.",
    "store_captured_under_tabs": "Of those captured, the ones whose money was taken from a tab.",
    "store_captured_at_notes": "Holds of streams whose gateway died or fell silent, captured at what was last noted.",
    "store_holds_extended": "Holds of streams extended, each time with a note of what was delivered.",
    "store_released": "Holds released: no reply was delivered, nothing was charged.",
    "store_expired": "Holds without a note released because their deadline had passed.",
    "store_recovered": "Holds found open at a start of their gateway, without a note, and released.",
    "store_locks_opened": "Locks opened: money set aside for one confidential request to one node.",
    "store_locks_used": "Locks that a request has used.",
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
    "cache_hits": "Inputs answered from an account's cache of vectors.",
    "cache_misses": "Inputs looked for in an account's cache of vectors and not found.",
    "log_lines_dropped": "Log lines that were not written: what reads standard error is too slow, or has gone.",
}
GATEWAY_GAUGES = {
    "in_flight": "Embedding requests being handled now.",
    "reply_bytes": "Bytes of replies that are being made or sent.",
    "store_largest_batch": "Writes in the largest transaction since the start.",
    "nodes_ready": "Nodes that take work now.",
    "tokens_outstanding": "Tokens sent to nodes and not answered yet.",
    "tokens_waiting": "Tokens of requests that wait for a node.",
    "cache_bytes": "Bytes of vectors in the caches of all accounts.",
}


class Metrics:
    """One registry for each process. `readings` gives the values of GATEWAY_COUNTERS and GATEWAY_GAUGES at each scrape.

    Counts of every request are plain numbers: the library's own counters cost four times as much.
    """

    def __init__(self, readings: Callable[[], dict[str, float]], workers: WorkerMetrics | None = None) -> None:
        """With `workers`, a page is the sum over all gateway processes that share a port."""
        self.registry = CollectorRegistry()
        self._workers = workers
        self._times: dict[tuple[str, str], _Times] = {}
        self.registry.register(Collected(self._collect))
        self.internal_errors = prometheus_client.Counter(
            "embedmesh_internal_errors", "Bugs of ours. Stays at 0.", registry=self.registry
        )
        self.registry.register(Collected(lambda: _families(readings())))
        ProcessCollector(registry=self.registry)

    def ended(self, code: str, model: str, seconds: float, tokens: int = 0, nanousd: int = 0) -> None:
        """Count a request, ended `seconds` after its head: `ok`, `broken_off`, `dropped`, or the code of its failure.

        `model` is empty if the request ended before its model was known. `tokens` and `nanousd` were charged.
        """
        try:
            times = self._times[code, model]
        except KeyError:
            times = self._times[code, model] = _Times()
        times.counts[bisect_left(BUCKETS_S, seconds)] += 1
        times.seconds += seconds
        times.tokens += tokens
        times.nanousd += nanousd

    def requests(self) -> Counter[str]:
        """Outcome -> requests that ended with it."""
        found: Counter[str] = Counter()
        for (code, _), times in self._times.items():
            found[code] += sum(times.counts)
        return found

    def text(self) -> bytes:
        """All metrics in the exposition format."""
        return generate_latest(self.registry if self._workers is None else self._workers.summed(self.registry))

    def _collect(self) -> Iterator[Metric]:
        yield _by_label("requests", "Embedding requests that ended, by outcome.", "code", self.requests())
        tokens: Counter[str] = Counter()
        nanousd: Counter[str] = Counter()
        for (_, model), times in self._times.items():
            if times.nanousd or times.tokens:
                tokens[model] += times.tokens
                nanousd[model] += times.nanousd
        yield _by_label("tokens", "Tokens embedded and charged.", "model", tokens)
        yield _by_label("charged_nanousd", "Nano-USD charged.", "model", nanousd)
        bounds = [*map(str, map(float, BUCKETS_S)), "+Inf"]
        words = "Seconds from a request's head to its end, by outcome and model (empty if it was not known yet)."
        family = HistogramMetricFamily("embedmesh_request_seconds", words, labels=["code", "model"])
        for labels, times in self._times.items():
            buckets = list(zip(bounds, accumulate(times.counts), strict=True))
            family.add_metric(labels, buckets, times.seconds)
        yield family


class _Times:
    """Requests of one outcome of one model by bucket, and the sums of their seconds, tokens and nano-USD."""

    __slots__ = ("counts", "nanousd", "seconds", "tokens")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.seconds = 0.0
        self.tokens = self.nanousd = 0


def _by_label(name: str, words: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(f"embedmesh_{name}", words, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _families(values: dict[str, float]) -> Iterator[Metric]:
    for name, value in values.items():
        if name in GATEWAY_COUNTERS:
            yield CounterMetricFamily(f"embedmesh_{name}", GATEWAY_COUNTERS[name], value=value)
        else:
            yield GaugeMetricFamily(f"embedmesh_{name}", GATEWAY_GAUGES[name], value=value)
