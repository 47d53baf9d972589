"""A short measurement of step times before the server listens: every profile with a few batch sizes."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from serve.load_tracker import LoadTracker

BATCHES = (1, 4, 16)
TOKENS = 12
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
        """Run requests, whose steps ``tracker``'s listeners observe; whether all of them fitted into the time."""
        ends = time.monotonic() + self.seconds
        # The first request of an engine compiles and allocates; its steps would be taken for slow ones.
        tracker.paused = True
        await generate(self.profiles[-1], PROMPT_TOKENS, 2)
        tracker.paused = False
        for batch in (size for size in BATCHES if size <= self.max_batch):
            # Wide ones first: if time runs out, narrower ones are predicted from wider ones.
            for profile in reversed(self.profiles):
                if time.monotonic() >= ends:
                    return False
                await asyncio.gather(*(self._one(profile, generate, tracker) for _ in range(batch)))
        return True

    async def _one(self, profile: str, generate: Generate, tracker: LoadTracker) -> None:
        request = tracker.begin(profile, PROMPT_TOKENS)
        try:
            await generate(profile, PROMPT_TOKENS, TOKENS)
        finally:
            tracker.end(request)
