"""(1 + lambda) evolution with multi-step selection, after EvoPress (arXiv 2410.14649, algorithms 1 and 2). No model, no torch.

Every child keeps the budget: some units are widened a step, others narrowed until the budget holds again, and what
room that leaves is filled. All children are compared on a few windows of text, the best of them on more, and the last
few on all windows, where the winner must beat its parent. Fitness on all windows never rises from one generation to the next.
"""

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from calibrate.search.space import SearchSpace
from calibrate.search.units import Genome

MAX_SWITCHES = 3
"""Units widened at once, at most. The number is the smaller of two uniform draws, so mostly one."""

ATTEMPTS_PER_CHILD = 20
"""Mutations tried for each child wanted, before fewer children are accepted: small spaces run out of new ones."""

CHILDREN_PER_CHILD = 8
"""Children made for each one that is measured, if their fitness can be guessed."""


class Fitness(Protocol):
    """Mean over windows of text of what is minimised."""

    def __call__(self, genome: Genome, windows: Sequence[int]) -> float:
        """Fitness of ``genome`` on the windows of these indices."""


@dataclass(frozen=True)
class Stage:
    """A preliminary comparison of children."""

    windows: int
    """Windows of text, drawn anew in every generation; those of the stage before are among them."""

    survivors: int
    """Children that go on to the next stage."""


@dataclass(frozen=True)
class Settings:
    """How long and how widely to search."""

    generations: int
    offspring: int
    """Children per generation."""

    stages: tuple[Stage, ...]
    """Preliminary comparisons; the survivors of the last are compared on all windows."""

    num_windows: int
    patience: int
    """Generations without progress after which the search ends."""

    seed: int


@dataclass(frozen=True)
class Outcome:
    """Where a search ended."""

    genome: Genome
    fitness: float
    """On all windows."""

    history: tuple[float, ...]
    """Fitness of the best start, and of the parent after each generation, generation 0 included."""


def evolve(
    starts: Sequence[Genome],
    proposals: Sequence[Genome],
    space: SearchSpace,
    settings: Settings,
    fitness: Fitness,
    predict: Callable[[Genome], float] | None = None,
    on_generation: Callable[[int, float], None] = lambda generation, best: None,
) -> Outcome:
    """The fittest genome found that the budget allows; at least as fit as every start.

    The same arguments give the same outcome: all randomness comes from the seed.

    Args:
        starts: genomes that the budget allows, at least one; all are measured on all windows.
        proposals: more such genomes, perhaps many: the children of generation 0.
        predict: a guess at the fitness, up to a constant. Where there is one, ``CHILDREN_PER_CHILD`` times the children are
            made, and the best by it are kept.
        on_generation: called after each generation with its number, from 0, and the best fitness so far.
    """
    assert starts
    assert all(map(space.fits, (*starts, *proposals)))
    everything = tuple(range(settings.num_windows))
    judged = {genome: fitness(genome, everything) for genome in starts}
    parent = min(judged, key=judged.__getitem__)
    history, idle = [judged[parent]], 0
    for generation in range(settings.generations + 1):
        random = Random(f"{settings.seed}/{generation}")
        if generation == 0:
            children = [genome for genome in dict.fromkeys(proposals) if genome not in judged]
        else:
            wanted = settings.offspring * (1 if predict is None else CHILDREN_PER_CHILD)
            children = _children(parent, space, wanted, judged.keys(), random)
            if predict is not None:
                children = sorted(children, key=predict)[: settings.offspring]
        finalists = _race(children, parent, settings, fitness, random)
        judged |= {child: fitness(child, everything) for child in finalists}
        best = min((parent, *finalists), key=judged.__getitem__)
        idle = 0 if best != parent or generation == 0 else idle + 1
        parent = best
        history.append(judged[parent])
        on_generation(generation, judged[parent])
        if idle >= settings.patience:
            break
    return Outcome(parent, judged[parent], tuple(history))


def mutate(genome: Genome, space: SearchSpace, random: Random) -> Genome:
    """A neighbour of ``genome`` that the budget allows; it may be ``genome`` itself.

    Args:
        genome: need not keep the budget.
    """
    widths = list(space.lifted(genome))
    cost = space.cost(tuple(widths))
    widened: set[int] = set()

    def step(unit: int, width: int) -> None:
        nonlocal cost
        cost += space.unit_cost(unit, width) - space.unit_cost(unit, widths[unit])
        widths[unit] = width

    for _ in range(min(random.randint(1, MAX_SWITCHES), random.randint(1, MAX_SWITCHES))):
        options = [(unit, wider) for unit in range(space.num_units) if (wider := space.wider(unit, widths[unit])) is not None]
        if options:
            unit, width = random.choice(options)
            step(unit, width)
            widened.add(unit)
    while cost > space.limit:
        options = [
            (unit, narrower) for unit in range(space.num_units) if (narrower := space.narrower(unit, widths[unit])) is not None
        ]
        assert options, "the cheapest genome keeps every budget that a space was made for"
        step(*random.choice([option for option in options if option[0] not in widened] or options))
    while True:
        options = [
            (unit, wider)
            for unit in range(space.num_units)
            if (wider := space.wider(unit, widths[unit])) is not None
            and cost + space.unit_cost(unit, wider) - space.unit_cost(unit, widths[unit]) <= space.limit
        ]
        if not options:
            return tuple(widths)
        step(*random.choice(options))


def _race(children: list[Genome], parent: Genome, settings: Settings, fitness: Fitness, random: Random) -> list[Genome]:
    """The children that survive every stage.

    The windows of a stage are the first of one order per generation, so that a stage measures only what the one before
    did not. The parent has been measured on all of them: from the second stage on, a child that is worse is given up.
    """
    order = random.sample(range(settings.num_windows), settings.num_windows)
    for number, stage in enumerate(settings.stages):
        windows = tuple(order[: stage.windows])
        scores = {child: fitness(child, windows) for child in children}
        bound = fitness(parent, windows) if number else math.inf
        fitter = [child for child in children if scores[child] < bound]
        children = sorted(fitter, key=scores.__getitem__)[: stage.survivors]
    return children


def _children(parent: Genome, space: SearchSpace, wanted: int, known: Container[Genome], random: Random) -> list[Genome]:
    """Up to ``wanted`` different mutations of ``parent`` that were not judged before."""
    children: dict[Genome, None] = {}
    for _ in range(ATTEMPTS_PER_CHILD * wanted):
        child = mutate(parent, space, random)
        if child not in known:
            children[child] = None
        if len(children) == wanted:
            break
    return list(children)
