"""Search spaces small enough to look at every profile of, and a tiny parent to search."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
from hypothesis import strategies as st

from calibrate.run import run_calibration
from calibrate.search.budget import parse_budgets
from calibrate.search.options import SearchOptions
from calibrate.search.space import SearchSpace
from calibrate.search.units import Genome
from matgptq_vllm.core.precision import WIDTHS


@pytest.fixture(scope="session")
def every_genome() -> Callable[[SearchSpace], Iterator[Genome]]:
    """Function from a space to all genomes, whether or not they fit."""
    return lambda space: product(WIDTHS, repeat=space.num_units)


@pytest.fixture(scope="session")
def bits_space() -> Callable[[tuple[int, ...], float], SearchSpace]:
    """Function from sizes of units and bits per weight to the space of a budget of bits."""
    return lambda sizes, bits: SearchSpace(
        tuple(tuple(width * size for width in WIDTHS) for size in sizes), int(bits * sum(sizes))
    )


@pytest.fixture(scope="session")
def spaces() -> Callable[[int], st.SearchStrategy[SearchSpace]]:
    """Function from a number of units to spaces of at most as many; see ``_spaces``."""
    return _spaces


@st.composite
def _spaces(draw: st.DrawFn, max_units: int) -> SearchSpace:
    """Spaces of any costs, also such as fall with the width, whose limit allows something."""
    row = st.lists(st.integers(0, 50), min_size=len(WIDTHS), max_size=len(WIDTHS)).map(tuple)
    costs = tuple(draw(st.lists(row, min_size=1, max_size=max_units)))
    least = sum(min(row) for row in costs)
    return SearchSpace(costs, draw(st.integers(least, least + 100)))


@pytest.fixture
def search_options(tiny_options, tmp_path: Path) -> Callable[..., SearchOptions]:
    """Function from changes to the options of a search, of a new tiny parent, that takes about a second."""
    calibration = tiny_options(out=tmp_path / "searched")
    parent = run_calibration(calibration)

    def make(**changes: object) -> SearchOptions:
        changes["budget"] = parse_budgets(str(changes.get("budget", "3.0")))
        values = {
            "model": parent,
            "text": calibration.text,
            "num_samples": 12,
            "seq_len": 16,
            "generations": 3,
            "offspring": 6,
            "sensitivity_samples": 4,
            "held_out": 0.2,
            "held_out_samples": 6,
            "held_out_seq_len": 32,
            "device": "cpu",
        }
        return SearchOptions(**values | changes)

    return make
