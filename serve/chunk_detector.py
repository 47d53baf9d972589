"""Whether an engine computes prompts in chunks, inferred from what vLLM counts in every step."""


class ChunkDetector:
    """For one engine. The sign of a chunk is a running sequence that gets no token.

    One step of that proves nothing: with asynchronous scheduling, the sequences of the next step count as running already.
    """

    def __init__(self) -> None:
        self._silent = False
        self._in_chunks = False

    def seen(self, silent: bool, started: bool) -> bool:
        """Whether a step computed a chunk. ``silent``: a running sequence got no token; ``started``: one got its first."""
        last = self._in_chunks and started
        self._in_chunks = silent and self._silent
        self._silent = silent
        return self._in_chunks or last
