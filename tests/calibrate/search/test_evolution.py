"""The search on fitness functions that cost nothing."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.search.evolution import Settings, Stage, evolve, mutate
from matgptq_vllm.core.precision import WIDTHS

SHORT = Settings(generations=12, offspring=8, stages=(Stage(2, 4), Stage(4, 2)), num_windows=8, patience=12, seed=0)


class Additive:
    """Each unit's error falls by 4 with every bit; windows differ by a fixed factor."""

    def __init__(self, weights):
        self.weights = weights
        self.calls = []

    def __call__(self, genome, windows):
        self.calls.append((genome, tuple(windows)))
        error = sum(weight * 0.25**width for weight, width in zip(self.weights, genome, strict=True))
        return error * sum(1 + 0.1 * window for window in windows) / len(windows)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(0, 1000))
def test_a_mutation_keeps_the_budget_and_leaves_no_room(spaces, every_genome, data, seed):
    space = data.draw(spaces(6))
    genome = data.draw(st.tuples(*[st.sampled_from(WIDTHS)] * space.num_units))
    child = mutate(genome, space, Random(seed))
    assert len(child) == space.num_units
    assert space.fits(child)
    left = space.limit - space.cost(child)
    for unit, width in enumerate(child):
        wider = space.wider(unit, width)
        assert wider is None or space.unit_cost(unit, wider) - space.unit_cost(unit, width) > left


def test_mutations_are_mostly_one_switch_and_reach_every_unit(bits_space):
    space = bits_space((1,) * 12, 3.0)
    random = Random(0)
    changes = [[unit for unit, width in enumerate(mutate((3,) * 12, space, random)) if width != 3] for _ in range(400)]
    assert {unit for changed in changes for unit in changed} == set(range(12))
    assert sum(len(changed) == 2 for changed in changes) > 150
    assert max(map(len, changes)) <= 6


def test_evolution_finds_the_best_profile_of_a_small_space(bits_space, every_genome):
    space = bits_space((3, 1, 2, 5, 1), 3.2)
    fitness = Additive((1, 40, 3, 2, 9))
    best = min((fitness(genome, range(8)), genome) for genome in every_genome(space) if space.fits(genome))
    outcome = evolve([(3,) * 5], [], space, replace(SHORT, generations=40, patience=40), fitness)
    assert outcome.fitness == pytest.approx(best[0])
    assert space.fits(outcome.genome)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(0, 99))
def test_the_outcome_fits_is_as_fit_as_every_start_and_repeats(spaces, every_genome, data, seed):
    space = data.draw(spaces(4))
    fitting = [genome for genome in every_genome(space) if space.fits(genome)]
    starts = data.draw(st.lists(st.sampled_from(fitting), min_size=1, max_size=3))
    proposals = data.draw(st.lists(st.sampled_from(fitting), max_size=3))
    fitness = Additive(data.draw(st.tuples(*[st.floats(-1, 9)] * space.num_units)))
    short = replace(SHORT, generations=3, seed=seed)
    outcome = evolve(starts, proposals, space, short, fitness)
    assert space.fits(outcome.genome)
    assert outcome.fitness == fitness(outcome.genome, range(8)) == outcome.history[-1]
    assert outcome.fitness <= min(fitness(start, range(8)) for start in starts)
    assert list(outcome.history) == sorted(outcome.history, reverse=True)
    assert evolve(starts, proposals, space, short, fitness) == outcome


def test_another_seed_walks_another_way(bits_space):
    space = bits_space((1,) * 16, 3.0)
    walks = []
    for seed in (0, 1):
        fitness = Additive(range(1, 17))
        evolve([(3,) * 16], [], space, replace(SHORT, generations=2, seed=seed), fitness)
        walks.append(fitness.calls)
    assert walks[0] != walks[1]


def test_children_are_compared_on_ever_more_windows_and_ever_fewer_remain(bits_space):
    space = bits_space((1,) * 16, 3.0)
    fitness = Additive(tuple(4.0**unit for unit in range(16)))
    evolve([(3,) * 16], [], space, replace(SHORT, generations=1), fitness)
    children = [(genome, windows) for genome, windows in fitness.calls if genome != (3,) * 16]
    by_size = {size: {genome for genome, windows in children if len(windows) == size} for size in (2, 4, 8)}
    assert len(by_size[2]) == 8
    assert len(by_size[4]) == 4
    assert 1 <= len(by_size[8]) <= 2
    assert by_size[8] <= by_size[4] <= by_size[2]
    (few,) = {windows for _, windows in children if len(windows) == 2}
    (more,) = {windows for _, windows in children if len(windows) == 4}
    assert set(few) < set(more)


def test_a_child_that_wins_on_few_windows_only_does_not_replace_its_parent(bits_space):
    space = bits_space((1,) * 8, 3.0)
    parent = (3,) * 8

    def fitness(genome, windows):
        return 0.0 if genome == parent else sum(1.0 if window < 6 else -1.0 for window in windows)

    assert evolve([parent], [], space, SHORT, fitness).genome == parent


def test_search_ends_when_nothing_has_improved_for_long_enough(bits_space):
    space = bits_space((1,) * 8, 3.0)
    seen = []
    outcome = evolve(
        [(3,) * 8], [], space, replace(SHORT, generations=50, patience=3), lambda genome, windows: 1.0, None,
        lambda generation, best: seen.append((generation, best)),
    )  # fmt: skip
    assert seen == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0)]
    assert len(outcome.history) == 5


def test_proposals_are_raced_and_the_best_becomes_the_parent(bits_space):
    space = bits_space((1,) * 4, 3.0)
    fitness = Additive((1, 1, 1, 50))
    proposals = [(2, 3, 3, 4), (3, 2, 3, 4), (2, 2, 2, 6), (4, 3, 3, 2)]
    outcome = evolve([(3,) * 4], proposals, space, replace(SHORT, generations=0), fitness)
    assert outcome.genome == min(proposals, key=lambda genome: fitness(genome, range(8)))


def test_a_good_guess_keeps_measurements_for_good_children(bits_space):
    space = bits_space((1,) * 16, 3.0)
    judge = Additive(tuple(4.0**unit for unit in range(16)))
    results = []
    for predict in (None, lambda genome: judge(genome, range(8))):
        short = replace(SHORT, generations=6)
        results.append(evolve([(3,) * 16], [], space, short, Additive(judge.weights), predict).fitness)
    assert results[1] < results[0]


def test_a_space_without_other_profiles_ends_where_it_began(bits_space):
    space = bits_space((1,), 2.0)
    assert evolve([(2,)], [], space, SHORT, Additive((1,))).genome == (2,)
