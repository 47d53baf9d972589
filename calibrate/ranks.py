"""The processes of a run started by ``torchrun``, or the one process that a run is without it.

Each process calibrates on a part of the windows and rounds a part of the rows. They meet only here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

from matgptq_vllm.core.errors import InputError, MatGPTQError, UnsupportedError

Value = TypeVar("Value")


class Ranks:
    """This process among those of the run. One that is alone meets nobody and pays nothing.

    Args:
        rank: number of this process; 0 writes files and shows progress.
        size: number of processes.
        device: where it computes.
    """

    def __init__(self, rank: int, size: int, device: torch.device):
        self.rank = rank
        self.size = size
        self.device = device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and shows progress."""
        return self.rank == 0

    def part_of(self, items: torch.Tensor) -> torch.Tensor:
        """This process's share of ``items`` along the first axis: contiguous, sizes differ by at most one."""
        return items.tensor_split(self.size)[self.rank]

    def sum_of(self, number: int) -> int:
        """The sum over all processes."""
        if self.size == 1:
            return number
        return int(self.sum_tensor(torch.tensor([number], dtype=torch.int64, device=self.device)).item())

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """``values``, summed over all processes in place."""
        if self.size > 1:
            self._meet(lambda: distributed.all_reduce(values))
        return values

    def gather_rows(self, part: torch.Tensor, num_rows: int) -> torch.Tensor:
        """All rows [num_rows, ...], of which this process has ``part_of``'s share."""
        if self.size == 1:
            return part
        # Shares differ by one row, and not every backend gathers ragged shares or every type: equal shares of bytes always do.
        flat = part.reshape(part.shape[0], -1)
        row_bytes = flat.shape[1] * flat.element_size()
        most = -(-num_rows // self.size)
        padded = torch.zeros((most, row_bytes), dtype=torch.uint8, device=self.device)
        padded[: flat.shape[0]] = flat.contiguous().view(torch.uint8).view(flat.shape[0], row_bytes)
        shares = [torch.empty_like(padded) for _ in range(self.size)]
        self._meet(lambda: distributed.all_gather(shares, padded))
        sizes = [len(share) for share in torch.arange(num_rows).tensor_split(self.size)]
        rows = torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)])
        return rows.view(-1).view(part.dtype).view(num_rows, *part.shape[1:])

    def from_first(self, value: Value | None) -> Value:
        """The value that the first process gives; the others give None. It must pickle; tensors in it on the CPU."""
        if self.size == 1:
            assert value is not None
            return value
        box: list[Any] = [value]
        self._meet(lambda: distributed.broadcast_object_list(box, src=0, device=self.device))
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within it no process waits for another; at its end all go on, or all end with an error of one of them."""
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        reports: list[Any] = [None] * self.size
        self._meet(
            lambda: distributed.all_gather_object(reports, None if error is None else f"{type(error).__name__}: {error}")
        )
        if error is not None:
            raise error
        failed = next((rank for rank, report in enumerate(reports) if report is not None), None)
        if failed is not None:
            raise RankError(f"process {failed} of {self.size} failed, so this one ends too: {reports[failed]}")

    def _meet(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            message = str(error).strip().splitlines()[0]
            raise RankError(f"another process of this run is gone, so this one ends too ({message}); see its output") from error


class RankError(MatGPTQError, RuntimeError):
    """Another process of the run failed."""


ALONE = Ranks(0, 1, torch.device("cpu"))
"""For code that runs in one process."""


@contextmanager
def joined_ranks(environment: Mapping[str, str], device: torch.device) -> Iterator[Ranks]:
    """The processes that ``torchrun`` started, connected for as long as the context lasts; one alone without it.

    Args:
        environment: ``os.environ``, where ``torchrun`` says who this process is.
        device: cpu, or cuda: then each process takes the GPU of its local number.

    Raises:
        InputError: a process has no GPU of its own.
    """
    size, rank = int(environment.get("WORLD_SIZE", "1")), int(environment.get("RANK", "0"))
    if size == 1:
        yield Ranks(0, 1, device)
        return
    if device.type == "cuda":
        local = int(environment.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {rank} is number {local} on its host, which has {torch.cuda.device_count()} GPUs; "
                "start torchrun with --nproc-per-node of at most that, or use --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not distributed.is_backend_available(backend):
        raise UnsupportedError(f"this build of torch has no {backend}, by which the processes would meet; run without torchrun")
    distributed.init_process_group(backend, rank=rank, world_size=size)
    try:
        yield Ranks(rank, size, device)
    finally:
        distributed.destroy_process_group()
