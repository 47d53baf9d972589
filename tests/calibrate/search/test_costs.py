import json
from fractions import Fraction
from itertools import product

import pytest

from calibrate.run import run_calibration
from calibrate.search.budget import parse_budget
from calibrate.search.costs import price, read_times
from calibrate.search.units import find_units, genome_profile
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES
from matgptq_vllm.core.storage import profile_bytes


@pytest.fixture(scope="module")
def readers(llama_dir, text_file, tmp_path_factory):
    """Reader of a tiny parent, by slice rule."""
    from calibrate.options import CalibrateOptions

    found = {}
    for rule in SLICE_RULES:
        out = tmp_path_factory.mktemp("priced") / rule
        run_calibration(CalibrateOptions(llama_dir, out, method="rtn", group_size=32, slice_rule=rule))
        found[rule] = ParentReader(out)
    return found


def priced(reader, budget, times=None, bandwidth=None):
    return price(reader, find_units(reader.layers), parse_budget(budget), times, bandwidth)


def some_genomes(num_units):
    return [(width,) * num_units for width in WIDTHS] + [
        tuple(WIDTHS[(start + step * unit) % 5] for unit in range(num_units)) for start, step in product(range(5), range(1, 4))
    ]


def test_the_cost_of_bits_is_the_profiles_average(readers):
    reader = readers["nested"]
    found = priced(reader, "3.3")
    units = find_units(reader.layers)
    for genome in some_genomes(len(units)):
        average = genome_profile("mix", units, genome).average_bits(reader.num_weights)
        assert found.space.fits(genome) == (average <= 3.3 + 1e-12)
        assert float(found.amount(genome)) == pytest.approx(average, abs=1e-4)


@pytest.mark.parametrize("rule", SLICE_RULES)
def test_the_cost_of_bytes_is_what_storage_counts(readers, rule):
    reader = readers[rule]
    units = find_units(reader.layers)
    for genome in some_genomes(len(units)):
        size = profile_bytes(reader, genome_profile("mix", units, genome))
        found = priced(reader, "18000B")
        assert found.space.cost(genome) + found.floor == size
        assert found.space.fits(genome) == (size <= 18000)


def test_under_the_rule_round_width_6_reads_as_much_as_width_8_and_is_passed_over(readers):
    assert set(priced(readers["round"], "18000B").space.efficient) == {(2, 3, 4, 8)}
    for rule in ("nested", "curved"):
        assert set(priced(readers[rule], "18000B").space.efficient) == {WIDTHS}


def test_time_by_bandwidth_is_bytes_over_bandwidth(readers):
    reader = readers["nested"]
    found = priced(reader, "15us", bandwidth=Fraction(10**9))
    units = find_units(reader.layers)
    for genome in some_genomes(len(units)):
        size = profile_bytes(reader, genome_profile("mix", units, genome))
        assert found.space.cost(genome) + found.floor == pytest.approx(size * 1000, abs=len(units) + 1)


def test_time_by_a_table_is_the_sum_over_products(readers, tmp_path):
    reader = readers["nested"]
    path = tmp_path / "times.json"
    path.write_text(json.dumps({f"{n}x{k}": {str(w): n / 100 + w for w in WIDTHS} for n, k in _shapes(reader)}))
    found = priced(reader, "40us", times=read_times(path))
    units = find_units(reader.layers)
    for genome in some_genomes(len(units)):
        expected = sum(unit.shape[0] / 100 + width for unit, width in zip(units, genome, strict=True))
        assert found.space.cost(genome) == pytest.approx(expected * 10**6, abs=len(units))


def test_a_table_that_lacks_something_says_what(readers):
    reader = readers["nested"]
    shapes = _shapes(reader)
    times = {shape: {width: Fraction(10**6) * width for width in WIDTHS} for shape in shapes}
    (n, k) = shapes[0]
    with pytest.raises(InputError, match=f"no time of {n}x{k}"):
        priced(reader, "40us", times={shape: row for shape, row in times.items() if shape != (n, k)})
    with pytest.raises(InputError, match="at width 6"):
        priced(reader, "40us", times={shape: {w: t for w, t in row.items() if w != 6} for shape, row in times.items()})
    with pytest.raises(InputError, match="not above 0"):
        priced(reader, "40us", times={**times, (n, k): dict.fromkeys(WIDTHS, Fraction(0))})


def test_a_budget_of_time_needs_times_or_a_bandwidth(readers):
    with pytest.raises(InputError, match=r"--times FILE .* --bandwidth"):
        priced(readers["nested"], "2ms")


@pytest.mark.parametrize(("budget", "bandwidth"), [("1.99", None), ("1B", None), ("0.001us", 10**9)])
def test_a_budget_that_nothing_meets_states_the_least_that_something_does(readers, budget, bandwidth):
    rate = None if bandwidth is None else Fraction(bandwidth)
    with pytest.raises(InputError, match="the smallest possible is") as caught:
        priced(readers["nested"], budget, bandwidth=rate)
    least = str(caught.value).partition("smallest possible is ")[2].partition(";")[0]
    found = priced(readers["nested"], least, bandwidth=rate)
    assert found.space.fits(found.space.cheapest)


@pytest.mark.parametrize("budget", ["8", "8.5", "1GiB"])
def test_a_budget_that_everything_meets_points_to_width_8(readers, budget):
    with pytest.raises(InputError, match="serve the uniform profile 8"):
        priced(readers["nested"], budget)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"4096": {"2": 1}}', '{"4x4": 3}', '{"4x4": {"two": 1}}', '{"4x4": {"2": "fast"}}', '{"4x4": {"2": NaN}}'],
)
def test_a_file_that_is_no_table_of_times_is_refused(tmp_path, text):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"times\.json .*microseconds"):
        read_times(path)


def _shapes(reader):
    return sorted({unit.shape for unit in find_units(reader.layers)})
