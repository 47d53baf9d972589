"""A short measurement of step times before the server listens: every profile with a few batch sizes."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from serve.load_tracker import LoadTracker

BATCHES = (1, 4, 16, 64)
TOKENS = 12
"""Of each sequence, in two requests where there are several: the second begin while others decode, as under load."""

ROUNDS = 3
"""How often everything is measured, if there is time: a GPU needs a second for all of it, and its first steps vary most."""
PROMPT_TOKENS = 16

Generate = Callable[[str, int, int], Awaitable[object]]
"""(profile, prompt tokens, output tokens): computes one request to its end."""


@dataclass(frozen=True)
class Sweep:
    """What to run.

    Args:
        profiles: narrow to wide.
        max_batch: most sequences that the engine computes at once.
    """

    profiles: Sequence[str]
    max_batch: int
    seconds: float

    async def run(self, generate: Generate, tracker: LoadTracker) -> bool:
        """Run requests, whose steps ``tracker``'s listeners observe; whether all of them fitted once into the time."""
        ends = time.monotonic() + self.seconds
        batches = [size for size in BATCHES if size <= self.max_batch]
        for done in range(ROUNDS):
            for batch in batches:
                if done == 0 and (batch == batches[0] or time.monotonic() < ends):
                    await self._warm_up(batch, generate, tracker)
                # Wide ones first: if time runs out, narrower ones are predicted from wider ones.
                for profile in reversed(self.profiles):
                    if time.monotonic() >= ends:
                        return done > 0
                    sequences = (self._one(profile, number, batch, generate, tracker) for number in range(batch))
                    await asyncio.gather(*sequences)
        return True

    async def _warm_up(self, batch: int, generate: Generate, tracker: LoadTracker) -> None:
        """The first steps of a size compile and allocate; they would be taken for slow ones."""
        tracker.paused = True
        try:
            await asyncio.gather(*(generate(self.profiles[-1], PROMPT_TOKENS, 2) for _ in range(batch)))
        finally:
            tracker.paused = False

    async def _one(self, profile: str, number: int, batch: int, generate: Generate, tracker: LoadTracker) -> None:
        # Of different lengths, so that the second ones begin in different steps.
        first = 3 + number % 5
        for tokens in (TOKENS,) if batch == 1 else (first, TOKENS - first):
            request = tracker.begin(profile, PROMPT_TOKENS)
            try:
                await generate(profile, PROMPT_TOKENS, tokens)
            finally:
                tracker.end(request)
