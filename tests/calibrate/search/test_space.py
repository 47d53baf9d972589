from hypothesis import given
from hypothesis import strategies as st

from calibrate.search.space import SearchSpace
from matgptq_vllm.core.precision import WIDTHS

COSTS = st.lists(st.integers(0, 9), min_size=len(WIDTHS), max_size=len(WIDTHS)).map(tuple)


@given(st.lists(COSTS, min_size=1, max_size=4).map(tuple))
def test_an_efficient_width_costs_less_than_every_wider_one(costs):
    space = SearchSpace(costs, 0)
    for unit, row in enumerate(costs):
        expected = [w for i, w in enumerate(WIDTHS) if all(row[i] < wider for wider in row[i + 1 :])]
        assert list(space.efficient[unit]) == expected
        for width in WIDTHS:
            assert space.wider(unit, width) == min((w for w in expected if w > width), default=None)
            assert space.narrower(unit, width) == max((w for w in expected if w < width), default=None)


@given(st.lists(COSTS, min_size=1, max_size=4).map(tuple))
def test_the_cheapest_genome_costs_least(costs):
    space = SearchSpace(costs, 0)
    assert space.cost(space.cheapest) == sum(min(row) for row in costs)


@given(st.lists(COSTS, min_size=1, max_size=4).map(tuple), st.data())
def test_lifting_never_costs_more_and_gives_efficient_widths_only(costs, data):
    space = SearchSpace(costs, 0)
    genome = data.draw(st.tuples(*[st.sampled_from(WIDTHS)] * len(costs)))
    lifted = space.lifted(genome)
    assert space.cost(lifted) <= space.cost(genome)
    for unit, width in enumerate(lifted):
        assert width in space.efficient[unit]
        assert width >= genome[unit]


def test_cost_adds_up_and_the_limit_is_allowed(bits_space):
    space = bits_space((10, 30), 3.0)
    assert space.cost((2, 3)) == 110
    assert space.fits((3, 3))
    assert not space.fits((4, 3))
    assert space.widest_uniform == 3
    assert bits_space((10, 30), 5.9).widest_uniform == 4
    assert bits_space((10, 30), 1.9).widest_uniform is None


def test_widening_takes_units_in_order_and_skips_what_does_not_fit(bits_space):
    space = bits_space((10, 30, 10), 3.2)
    assert space.limit == 160
    assert space.widened((3, 3, 3), [1, 0, 2]) == (4, 3, 3)
    assert space.widened((2, 3, 3), [0, 1, 2]) == (3, 3, 4)
    assert space.widened((3, 3, 3), []) == (3, 3, 3)
