import math

from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.search.knapsack import least_penalty
from matgptq_vllm.core.precision import WIDTHS


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_knapsack_is_the_best_of_all_genomes(spaces, every_genome, data):
    space = data.draw(spaces(4))
    penalties = [
        {width: data.draw(st.floats(-5, 5)) for width in data.draw(st.sets(st.sampled_from(WIDTHS), min_size=1).map(sorted))}
        for _ in range(space.num_units)
    ]

    def penalty(genome):
        return sum(row.get(width, math.inf) for row, width in zip(penalties, genome, strict=True))

    best = min((penalty(genome) for genome in every_genome(space) if space.fits(genome)), default=math.inf)
    found = least_penalty(space, penalties)
    if math.isinf(best):
        assert found is None
    else:
        assert found is not None
        assert space.fits(found)
        assert penalty(found) <= best + 1e-9


def test_many_units_of_realistic_sizes_fit_and_use_the_budget(bits_space):
    sizes = tuple(40_960 + 7_919 * (index % 5) for index in range(128))
    space = bits_space(sizes, 3.3)
    penalties = [{2: 1.0 + index / 64, 3: 0.2, 4: 0.05} for index in range(128)]
    found = least_penalty(space, penalties)
    assert found is not None
    assert space.fits(found)
    assert space.cost(found) > 0.995 * space.limit


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_coarse_grid_still_gives_genomes_that_fit(spaces, data):
    space = data.draw(spaces(6))
    penalties = [{width: data.draw(st.floats(-5, 5)) for width in WIDTHS} for _ in range(space.num_units)]
    found = least_penalty(space, penalties, grid=7)
    assert found is not None
    assert space.fits(found)


def test_a_budget_that_is_met_exactly_is_used_whole(bits_space):
    space = bits_space((65536, 3 * 65536, 65536), 3.0)
    assert least_penalty(space, [{2: 9.0, 3: 5.0, 4: 0.0}, {2: 9.0, 3: 0.0}, {2: 0.0, 3: -1.0}]) == (4, 3, 2)
