from random import Random

import pytest

from calibrate.search.evolution import Settings, Stage
from calibrate.search.profile_search import generation_work, search_profile, start_work
from calibrate.search.sensitivity import Sensitivity
from calibrate.search.starts import plain_starts

SETTINGS = Settings(generations=4, offspring=8, stages=(Stage(2, 4), Stage(4, 2)), num_windows=8, patience=4, seed=0)


class Counting:
    """Additive errors that fall by 4 with every bit; remembers what was measured on which window."""

    def __init__(self, weights):
        self.weights = weights
        self.measured = set()

    def __call__(self, genome, windows):
        self.measured |= {(genome, window) for window in windows}
        return sum(weight * 0.25**width for weight, width in zip(self.weights, genome, strict=True))


def test_penalties_are_those_of_single_steps(bits_space):
    space, fitness = bits_space((1, 1), 3.0), Counting((64, 128))
    sensitivity = Sensitivity((2, 4), space, fitness, (0, 1))
    assert sensitivity.penalties == [{2: 0.0, 3: -3.0}, {4: 0.0, 3: 1.5, 6: 128 * (0.25**6 - 0.25**4)}]


@pytest.mark.parametrize("genome", [(2, 2, 2), (8, 2, 6), (4, 4, 4), (6, 8, 3)])
def test_what_is_predicted_of_a_quantizer_is_so(bits_space, genome):
    space, fitness = bits_space((1, 1, 1), 3.0), Counting((7, 2, 5))
    sensitivity = Sensitivity((3, 4, 3), space, fitness, (0, 1))
    assert sensitivity.predict(genome) == pytest.approx(fitness(genome, [0]) - fitness((3, 4, 3), [0]))


def test_the_narrowest_and_widest_widths_have_one_step_only(bits_space):
    sensitivity = Sensitivity((2, 8), bits_space((1, 1), 3.0), Counting((1, 1)), (0,))
    assert [sorted(row) for row in sensitivity.penalties] == [[2, 3], [6, 8]]


def test_the_first_genome_is_the_best_and_all_fit(bits_space, every_genome):
    space, fitness = bits_space((2, 1, 1, 2), 3.0), Counting((1, 30, 2, 8))
    sensitivity = Sensitivity((3,) * 4, space, fitness, range(8))
    genomes = list(sensitivity.best_genomes(5, Random(0)))
    assert len(genomes) == 6
    assert all(map(space.fits, genomes))
    near = [genome for genome in every_genome(space) if space.fits(genome) and set(genome) <= {2, 3, 4}]
    assert fitness(genomes[0], [0]) == min(fitness(genome, [0]) for genome in near)


@pytest.mark.parametrize("bits", [2.0, 2.5, 3.0, 3.7, 6.0])
def test_plain_starts_hold_the_widest_uniform_profile_and_fit(bits_space, bits):
    space = bits_space((3, 1, 4, 1, 5), bits)
    starts = plain_starts(space)
    assert (space.widest_uniform,) * 5 in starts
    assert all(map(space.fits, starts))
    assert (len(starts) > 1) == (bits in (2.5, 3.7))


def test_a_search_from_sensitivities_beats_every_plain_start_and_stays_within_its_estimate(bits_space):
    space, fitness = bits_space((2, 1, 1, 2, 3, 1), 3.0), Counting((1, 30, 2, 8, 1, 90))
    outcome = search_profile(space, SETTINGS, 4, fitness)
    assert space.fits(outcome.genome)
    assert outcome.fitness < min(fitness(start, range(8)) for start in plain_starts(space))
    assert search_profile(space, SETTINGS, 4, fitness) == outcome
    bound = start_work(space, SETTINGS, 4) + (SETTINGS.generations + 1) * (generation_work(SETTINGS) + 8)
    assert len(fitness.measured) <= bound


def test_a_search_without_sensitivities_works_too(bits_space):
    space, fitness = bits_space((2, 1, 1, 2), 3.0), Counting((1, 30, 2, 8))
    assert search_profile(space, SETTINGS, 0, fitness).fitness <= fitness((3,) * 4, [0])
