"""One search: starts, then evolution. A pure function of the space, the settings and the fitness; no model, no disk."""

from collections.abc import Callable
from random import Random

from calibrate.search.evolution import Fitness, Outcome, Settings, evolve
from calibrate.search.sensitivity import Sensitivity
from calibrate.search.space import SearchSpace
from calibrate.search.starts import plain_starts
from calibrate.search.units import Genome


def search_profile(
    space: SearchSpace,
    settings: Settings,
    sensitivity_windows: int,
    fitness: Fitness,
    on_generation: Callable[[int, float], None] = lambda generation, best: None,
) -> Outcome:
    """The fittest profile found; on the search text at least as fit as the widest uniform profile that the budget allows.

    Args:
        sensitivity_windows: windows on which the sensitivity of every unit is measured; 0 for no such start.
        on_generation: as for ``evolve``.
    """
    everything = range(settings.num_windows)
    starts = plain_starts(space)
    proposals: list[Genome] = []
    predict = None
    if sensitivity_windows:
        random = Random(f"{settings.seed}/sensitivity")
        windows = random.sample(everything, min(sensitivity_windows, settings.num_windows))
        base = min(starts, key=lambda genome: fitness(genome, everything))
        sensitivity = Sensitivity(base, space, fitness, windows)
        proposals, predict = list(sensitivity.best_genomes(settings.offspring, random)), sensitivity.predict
    return evolve(starts, proposals, space, settings, fitness, predict, on_generation)


def start_work(space: SearchSpace, settings: Settings, sensitivity_windows: int) -> int:
    """Upper bound on the measurements before generation 0; one is of one genome on one window."""
    plain = len(plain_starts(space)) * settings.num_windows
    return plain + (2 * space.num_units + 1) * min(sensitivity_windows, settings.num_windows)


def generation_work(settings: Settings) -> int:
    """Upper bound on the measurements of one generation."""
    total, children, measured = 0, settings.offspring, 0
    for stage in settings.stages:
        total += children * (stage.windows - measured)
        children, measured = min(stage.survivors, children), stage.windows
    return total + children * (settings.num_windows - measured)
