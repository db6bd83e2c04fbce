"""What a metric is, in one line of a table. docs/reference/metrics.md is made from the tables."""

from collections.abc import Mapping

MetricWords = str | tuple[str, ...]
"""What a metric means; where it has labels, their names behind that."""
MetricReadings = Mapping[str, float | Mapping[tuple[str, ...], float]]
"""Values by the name of a metric, which a table has; those of one with labels by the values of its labels."""


def words_and_labels(said: MetricWords) -> tuple[str, tuple[str, ...]]:
    """What a metric means, and the names of its labels."""
    return (said, ()) if isinstance(said, str) else (said[0], said[1:])
