"""A simulated engine with continuous batching: every step decodes one token of each running sequence and computes prompts.

How long a step takes is hidden from the policies. On purpose it is not of the form that ``serve.latency_model`` fits: batches
are padded, costs per token bend, weights that are read overlap with arithmetic, and there are noise, drift and hiccups. On
some engines slow steps come together, as they do where other work has the same cores.
"""

import copy
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from loadtests.simulation.trace import Arrival

WIDTHS = (2, 3, 4, 6, 8)

PAD = 4
"""Sequences of a precision are padded to a multiple of this, as captured graphs are."""

LUCK_STEPS = 4096
"""Steps whose noise is drawn at once."""

DRIFT = 0.05
"""Amplitude of the slow change of the machine's speed."""

DRIFT_S = 240.0
"""Its period."""


@dataclass(frozen=True)
class Hardware:
    """The hidden truth: milliseconds."""

    name: str
    base: float
    """Per step."""

    read: tuple[float, ...]
    """Per step, for reading the weights at each of WIDTHS."""

    token: tuple[float, ...]
    """Per decoded token at each of WIDTHS."""

    bend: float
    """Costs of decoding go with the number of tokens to this power."""

    prompt: float
    """Per prompt token."""

    context: float
    """Per token of context."""

    noise: float
    """Standard deviation of the logarithm of a step's time."""

    hiccup_share: float = 0.002
    hiccup: float = 3.0
    """Factor by which that share of the steps takes longer."""

    max_running: int = 256
    max_batched_tokens: int = 1024
    wander: tuple[tuple[float, float], ...] = ()
    """Noise that lasts: (standard deviation of the logarithm of a step's time, steps after which 1/e of it is left)."""

    prompts: float = 0.0
    """Per step that computes prompts, however many."""

    prompt_noise: float = 0.0
    """Standard deviation of the logarithm of what the prompts in a step cost."""

    def common_ms(self, prefill: Sequence[float], context: int) -> float:
        """What a step takes whatever the widths in it."""
        return self.base + self.context * context + (self.prompts if any(prefill) else 0.0)

    def step_ms(self, decode: Sequence[int], prefill: Sequence[float], context: int, at_s: float) -> float:
        """Without noise."""
        total = self.common_ms(prefill, context)
        for width, (sequences, prompts) in enumerate(zip(decode, prefill, strict=True)):
            if sequences or prompts:
                padded = -(-sequences // PAD) * PAD
                arithmetic = self.token[width] * padded**self.bend + self.prompt * prompts
                # Reading and arithmetic overlap in part: between their sum and the larger of the two.
                total += 0.5 * (self.read[width] + arithmetic) + 0.5 * math.hypot(self.read[width], arithmetic)
        return total * (1 + DRIFT * math.sin(2 * math.pi * at_s / DRIFT_S))


GPU = Hardware("gpu", 2.0, (2.6, 3.9, 5.0, 7.6, 10.0), (0.09, 0.10, 0.10, 0.12, 0.14), 1.08, 0.02, 1e-4, 0.04)
"""Reading the weights dominates: the shape of an 8B model on one large GPU."""

H200 = Hardware(
    "h200", 0.5, (1.9, 2.1, 2.4, 2.75, 2.95), (0.03,) * 5, 1.0, 0.0025, 2.5e-4, 0.06,
    max_running=64, max_batched_tokens=8192, prompts=6.0,
)  # fmt: skip
"""What a server of an 8B model on an H200 learned of itself, rounded (docs/results/server-h200): every step that computes a
prompt, however short, runs other kernels and takes 10 ms where others take 3."""

CPU = Hardware("cpu", 6.0, (4.0, 5.5, 6.0, 9.0, 11.0), (0.9, 1.2, 1.15, 1.6, 1.75), 0.95, 0.25, 1e-4, 0.08)
"""Costs per token dominate, and widths that are no power of two cost extra."""

BLOCK_CPU = Hardware(
    "block", 33.0, (10.6, 24.1, 35.3, 40.8, 45.3), (1.7, 1.6, 1.4, 1.6, 1.5), 1.0, 1.25, 1.3e-3, 0.08, max_running=64
)
"""What a real CPU server learned of one block of a 1.1B model, rounded: the width decides little (a step of 8 sequences grows
by 60% from 2 to 8 bits), prompts are dear and steps vary."""

ROWS = Hardware("rows", 10.0, (1.0, 1.6, 2.2, 3.2, 4.2), (0.2,) * 5, 1.0, 0.015, 6e-6, 0.04)
"""Costs per sequence, the same at every width, dominate: a step at 8 bits takes 1.27 times one at 2 with one sequence, and
1.09 times with 60. The shape of a model whose weights are read in little time."""

SHAKY_CPU = Hardware(
    "shaky", 33.0, (14.0, 33.0, 49.0, 58.0, 66.0), (1.9,) * 5, 1.0, 3.0, 1.3e-3, 0.08,
    max_running=64, wander=((0.1, 7.0), (0.1, 50.0)), prompt_noise=0.5,
)  # fmt: skip
"""The same model on a server whose client and API process use the same two cores, read off a real run's plot: at 8 bits
half-second means scatter by 14% around 107 ms + 1.1 ms per sequence, and of a deviation 0.55 is left after 1 s, 0.3 after 2 to
4 s, 0.1 after 6 s; at 2 bits 25 sequences take 75 to 110 ms without arrivals and 120 to 200 with 4 a second."""


@dataclass
class Served:
    """What became of one request."""

    arrival: Arrival
    width: int
    """Index in WIDTHS."""

    decision: object = None
    first_s: float = math.inf
    first_step: int = 0
    finished_s: float = math.inf

    @property
    def tpot_ms(self) -> float:
        """Per output token after the first."""
        return (self.finished_s - self.first_s) * 1e3 / (self.arrival.output_tokens - 1)

    @property
    def ttft_ms(self) -> float:
        """From the arrival to the first token."""
        return (self.first_s - self.arrival.at_s) * 1e3


@dataclass(frozen=True)
class Step:
    """What an engine tells of one step."""

    decode: list[int]
    """Sequences, for each of WIDTHS."""

    prefill: list[int]
    """Prompt tokens, for each of WIDTHS."""

    context: int
    ends_s: float
    ms: float


@dataclass
class Engine:
    """One engine. ``advance`` runs steps until a moment; ``submit`` adds a request at that moment."""

    hardware: Hardware
    seed: int
    now_s: float = 0.0
    steps: int = 0
    context: int = 0
    decode: list[int] = field(default_factory=lambda: [0] * len(WIDTHS))
    tokens: list[int] = field(default_factory=lambda: [0] * len(WIDTHS))
    """Decoded so far, for each of WIDTHS."""

    queue: deque[list[int]] = field(default_factory=deque)
    """[number, prompt tokens left] of those whose prompts are not computed."""

    started: int = 0
    """How many of the queue's head have begun."""

    requests: dict[int, Served] = field(default_factory=dict)
    """In flight."""

    ends: list[tuple[int, int]] = field(default_factory=list)
    """Heap of (last step, number) of those that decode."""

    luck: list[tuple[float, float]] = field(default_factory=list)
    """Noise of the present LUCK_STEPS steps: factors on the whole, and on prompts."""

    follow: int | None = None
    """Index in WIDTHS that running requests go to, each after its prompt; None if they keep theirs."""

    def clone(self) -> "Engine":
        """A copy that can be run on its own."""
        twin = copy.copy(self)
        twin.decode = list(self.decode)
        twin.tokens = list(self.tokens)
        twin.queue = deque([number, left] for number, left in self.queue)
        twin.requests = {number: copy.copy(served) for number, served in self.requests.items()}
        twin.ends = list(self.ends)
        return twin

    def submit(self, served: Served) -> None:
        """A request comes."""
        self.requests[served.arrival.number] = served
        self.queue.append([served.arrival.number, served.arrival.prompt_tokens])

    def change_all(self, width: int) -> None:
        """All requests in flight go to the index ``width`` with the next step; a prompt is computed before its request does."""
        if self.follow == width:
            return
        self.follow = width
        self.decode = [len(self.ends) if index == width else 0 for index in range(len(WIDTHS))]
        for _, number in self.ends:
            self.requests[number].width = width

    def advance(
        self,
        until_s: float,
        on_finish: Callable[[Served], None],
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        """Run steps that begin before ``until_s``; afterwards the engine may be in a step that ends later."""
        while self.now_s < until_s:
            if not self.requests:
                self.now_s = until_s
                return
            self._step(on_finish, on_step)

    def _step(self, on_finish: Callable[[Served], None], on_step: Callable[[Step], None] | None) -> None:
        hardware = self.hardware
        running = sum(self.decode)
        room = hardware.max_batched_tokens - running
        prefill = [0] * len(WIDTHS)
        ready: list[int] = []
        for position, entry in enumerate(self.queue):
            if room <= 0 or running + position >= hardware.max_running:
                break
            part = min(entry[1], room)
            entry[1] -= part
            room -= part
            prefill[self.requests[entry[0]].width] += part
            self.started = max(self.started, position + 1)
            if entry[1] == 0:
                ready.append(entry[0])
        # Noise belongs to the number of the step, so that policies see the same luck as far as their steps agree.
        if not self.luck or self.steps % LUCK_STEPS == 0:
            self.luck = _luck(hardware, self.seed, self.steps // LUCK_STEPS)
        whole, prompts = self.luck[self.steps % LUCK_STEPS]
        ms = whole * hardware.step_ms(self.decode, [tokens * prompts for tokens in prefill], self.context, self.now_s)
        self.now_s += ms / 1e3
        self.steps += 1
        if on_step is not None:
            on_step(Step(list(self.decode), prefill, self.context, self.now_s, ms))
        self.context += running
        for width, sequences in enumerate(self.decode):
            self.tokens[width] += sequences
        while self.ends and self.ends[0][0] <= self.steps:
            served = self.requests.pop(heapq.heappop(self.ends)[1])
            self.decode[served.width] -= 1
            self.context -= served.arrival.prompt_tokens + served.arrival.output_tokens
            served.finished_s = self.now_s
            on_finish(served)
        for number in ready:
            self.queue.popleft()
            self.started -= 1
            served = self.requests[number]
            served.first_s = self.now_s
            served.first_step = self.steps
            if self.follow is not None:
                served.width = self.follow
            self.decode[served.width] += 1
            self.context += served.arrival.prompt_tokens + 1
            heapq.heappush(self.ends, (self.steps + served.arrival.output_tokens - 1, number))


@cache
def _luck(hardware: Hardware, seed: int, part: int) -> list[tuple[float, float]]:
    """Factors on the times of LUCK_STEPS steps: on the whole, and on prompts."""
    randomness = random.Random(seed * 1_000_003 + part)
    factors = [math.exp(randomness.gauss(0.0, hardware.noise)) for _ in range(LUCK_STEPS)]
    factors = [factor * (hardware.hiccup if randomness.random() < hardware.hiccup_share else 1.0) for factor in factors]
    for deviation, lasts in hardware.wander:
        kept = math.exp(-1 / lasts)
        state = randomness.gauss(0.0, deviation)
        for index in range(LUCK_STEPS):
            factors[index] *= math.exp(state)
            state = kept * state + randomness.gauss(0.0, deviation * math.sqrt(1 - kept**2))
    return [(factor, math.exp(randomness.gauss(0.0, hardware.prompt_noise))) for factor in factors]
