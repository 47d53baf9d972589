"""vLLM's own load generator, ``vllm bench serve``, in this process: it replays the trace and bounds concurrency.

Ours is only its request function, which gives each request its precision, cancels some and malforms some, and keeps what became
of every one as soon as it is over, so that an interrupted run has a report too. Needs vLLM; importing this file imports it.
"""

import asyncio
import contextlib
import gc
import random
import time
import warnings
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from vllm.benchmarks import serve as bench
from vllm.benchmarks.lib.endpoint_request_func import (
    ASYNC_REQUEST_FUNCS,
    RequestFuncInput,
    RequestFuncOutput,
    async_request_openai_completions,
)
from vllm.tokenizers import get_tokenizer
from vllm.utils.argparse_utils import FlexibleArgumentParser

from loadtests.malformed import FORMS
from loadtests.records import CANCELLED, COMPLETED, FAILED, INTERRUPTED, REFUSED, Record
from loadtests.server import DEFAULT, Server, authorization
from loadtests.workload import CHUNK, Planned
from matgptq_vllm.core.errors import InputError

BACKEND = "openai"
"""The generator's name for completions over HTTP, the only kind that replays traces."""


@dataclass(frozen=True)
class Target:
    """Where requests go, and what all of them have in common."""

    server: Server
    tokenizer: str
    """Folder with the model's tokenizer, for random prompts of its tokens."""
    headers: Mapping[str, str]
    """Of every request, such as budgets."""


def put_load(
    target: Target, plan: Sequence[Planned], concurrency: int, warmups: int, trace: Path, progress: bool, records: list[Record]
) -> None:
    """Send the requests of ``plan`` and add a record of each to ``records``, as they end.

    Args:
        concurrency: bound on requests in flight.
        warmups: requests before the first, without records.
        trace: file to write the plan to, in the generator's format; what the generator prints is put beside it.
        progress: whether to draw a bar on standard error.

    Raises:
        KeyboardInterrupt: the user stopped it; requests in flight are recorded as interrupted.
    """
    trace.write_text("".join(f"{planned.trace_line()}\n" for planned in plan), encoding="utf-8")
    arguments = [
        *("--backend", BACKEND, "--base-url", target.server.url),
        *("--model", target.server.model, "--served-model-name", target.server.model, "--tokenizer", target.tokenizer),
        *("--dataset-name", "timed_trace", "--dataset-path", str(trace), "--timed-trace-chunk-hash-size", str(CHUNK)),
        *("--num-prompts", str(len(plan)), "--max-concurrency", str(concurrency), "--num-warmups", str(warmups)),
        *("--request-id-prefix", f"load-{random.getrandbits(64):x}-", "--temperature", "0"),
        *([] if progress else ["--disable-tqdm"]),
    ]
    requests = _Requests(target, plan, records)
    original = ASYNC_REQUEST_FUNCS[BACKEND]
    with trace.with_suffix(".log").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        parser = FlexibleArgumentParser()
        bench.add_cli_args(parser)
        options = parser.parse_args(arguments)
        ASYNC_REQUEST_FUNCS[BACKEND] = requests
        try:
            with warnings.catch_warnings():
                # Of runs that are so short, or go so wrong, that the generator's own statistics are empty.
                warnings.simplefilter("ignore")
                bench.main(options)
        finally:
            ASYNC_REQUEST_FUNCS[BACKEND] = original
            # The generator has frozen all objects, for its own time; at the end of the process they would count as leaked.
            gc.unfreeze()


def check_tokenizer(folder: str) -> None:
    """InputError if there is no tokenizer in ``folder``; nothing is downloaded."""
    reason = "there is no such folder"
    if Path(folder).is_dir():
        try:
            get_tokenizer(folder)
            return
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
    raise InputError(
        f"no tokenizer in {folder} ({reason}); "
        "name a folder with the model's tokenizer, such as that of the parent, in --tokenizer"
    )


class _Requests:
    """The generator's function that sends a request and awaits its answer."""

    def __init__(self, target: Target, plan: Sequence[Planned], records: list[Record]):
        self._target = target
        self._plan = plan
        self._records = records
        self._timed = any(planned.due_s for planned in plan)
        self._started = 0.0
        self._warmed = 0
        self._taken_s = 1.0
        """How long requests take of late, in seconds; before any has completed, a guess."""

    async def __call__(
        self, request_func_input: RequestFuncInput, session: aiohttp.ClientSession, pbar: Any = None
    ) -> RequestFuncOutput:
        if request_func_input.request_id is None:
            # A warm-up request: in turn at every precision of the plan.
            names = list(dict.fromkeys(planned.precision for planned in self._plan))
            self._warmed += 1
            given = self._with_headers(request_func_input, names[self._warmed % len(names)])
            return await async_request_openai_completions(given, session, pbar)
        number = int(request_func_input.request_id.rpartition("-")[2])
        planned = self._plan[number]
        if not self._started:
            self._started = time.perf_counter() - planned.due_s
        given = self._with_headers(request_func_input, planned.precision)
        watched = _WatchedSession(session)
        output = RequestFuncOutput(start_time=time.perf_counter(), prompt_len=planned.input_tokens)
        outcome = INTERRUPTED
        try:
            if planned.malformed is not None:
                output.error = await _send_malformed(given, planned.malformed, watched)
                outcome = FAILED if output.error else REFUSED
            else:
                timeout = None if planned.cancel_at is None else planned.cancel_at * self._taken_s
                output = await asyncio.wait_for(async_request_openai_completions(given, watched), timeout)  # type: ignore[arg-type]
                outcome = COMPLETED if output.success else FAILED
                if output.success:
                    self._taken_s += (output.latency - self._taken_s) / 8
        except asyncio.TimeoutError:
            outcome = CANCELLED
        finally:
            self._records.append(self._record(number, planned, watched, output, outcome))
            if pbar is not None:
                pbar.update(1)
        return output

    def _with_headers(self, request: RequestFuncInput, precision: str) -> RequestFuncInput:
        chosen = {} if precision == DEFAULT or not self._target.server.bits else {"X-Precision": precision}
        return replace(request, extra_headers={**(request.extra_headers or {}), **self._target.headers, **chosen})

    def _record(
        self, number: int, planned: Planned, watched: "_WatchedSession", output: RequestFuncOutput, outcome: str
    ) -> Record:
        return Record(
            number,
            planned.precision,
            watched.precision,
            outcome,
            watched.status,
            # Without times, a request is due when the bound on concurrency lets it go: there is no queue to hide.
            planned.due_s if self._timed else output.start_time - self._started,
            output.start_time - self._started,
            output.ttft,
            tuple(output.itl),
            time.perf_counter() - self._started,
            output.prompt_len,
            output.output_tokens,
            output.error.strip()[-500:] if outcome == FAILED else "",
        )


class _WatchedSession:
    """Stands between the generator and its HTTP session, and keeps the status and the precision of the answer."""

    def __init__(self, session: aiohttp.ClientSession):
        self._session = session
        self.status: int | None = None
        self.precision: str | None = None

    @contextlib.asynccontextmanager
    async def post(self, **arguments: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        async with self._session.post(**arguments) as response:
            self.status = response.status
            self.precision = response.headers.get("X-Precision")
            yield response


async def _send_malformed(request: RequestFuncInput, form: str, session: _WatchedSession) -> str:
    """What was wrong with how it was refused; empty: nothing."""
    body = {"model": request.model_name, "prompt": request.prompt, "max_tokens": request.output_len, "stream": True}
    headers = {**authorization(), **(request.extra_headers or {}), "Content-Type": "application/json"}
    try:
        async with session.post(url=request.api_url, data=FORMS[form](body), headers=headers) as response:
            await response.read()
    except aiohttp.ClientError as error:
        return f"a malformed request ({form}) was not answered: {error!r}"
    return "" if 400 <= response.status < 500 else f"a malformed request ({form}) was answered with {response.status}"
