"""The text of ``/metrics``: its samples, summed."""

from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def totals(text: str, prefix: str = "") -> dict[str, float]:
    """Sum over the labels, by the name of the sample; of the names that begin with ``prefix``."""
    found: dict[str, float] = {}
    for one in _samples(text, prefix):
        found[one.name] = found.get(one.name, 0.0) + one.value
    return found


def by_label(text: str, name: str, label: str) -> dict[str, float]:
    """Sum of the samples called ``name`` by the value of ``label``, which all of them have."""
    found: dict[str, float] = {}
    for one in _samples(text, name):
        if one.name == name:
            found[one.labels[label]] = found.get(one.labels[label], 0.0) + one.value
    return found


def _samples(text: str, prefix: str) -> Iterator[Sample]:
    # Parsing a line takes far longer than looking at it, and a server has hundreds.
    lines = "\n".join(line for line in text.splitlines() if line.startswith(prefix))
    for family in text_string_to_metric_families(lines):
        yield from family.samples
