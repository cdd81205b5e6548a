"""Pooling over windows whose size differs from region to region: slices of regions that fit a memory budget."""

from collections.abc import Iterator

MAX_GATHERED = 2**24  # values gathered at once: 64 MiB in fp32


def region_slices(num_regions: int, values_per_region: int) -> Iterator[slice]:
    """Yield slices that cover ``range(num_regions)``, each of at most `MAX_GATHERED` values and one region or more."""
    step = max(1, MAX_GATHERED // max(1, values_per_region))
    for start in range(0, num_regions, step):
        yield slice(start, start + step)
