"""What is asked of vLLM's worker beside steps; named by ``worker_extension_cls``."""

from typing import Any

import torch

from loadtests.engine.kernel_times import Times

NAME_LENGTH = 72
"""Of a kernel's name, what is kept: those of templates go on for lines."""


class MeasuredWorker:
    """Methods for ``collective_rpc``; vLLM mixes them into its worker."""

    model_runner: Any

    def fill_integer_weights(self) -> dict[str, Any]:
        """Put random bits into codes, which loading ``dummy`` leaves as they are in memory; returns what the model holds.

        Equal codes would be faster than those of a real model: a GPU at its power limit clocks higher where few bits change.
        """
        model = self.model_runner.get_model()
        generator: dict[torch.device, torch.Generator] = {}
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                device = parameter.device
                chance = generator.setdefault(device, torch.Generator(device).manual_seed(0))
                limits = torch.iinfo(parameter.dtype)
                parameter.data.random_(limits.min, limits.max, generator=chance)
        kernels = {type(module.scheme.kernel).__name__ for module in model.modules() if _has_kernel(module)}
        return {
            "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
            "kernels": sorted(kernels),
            "runner": f"{type(self.model_runner).__module__}.{type(self.model_runner).__name__}",
        }

    def begin_profile(self) -> None:
        """Watch what runs on the device."""
        # Where there is no GPU, operators.
        activity = torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else torch.profiler.ProfilerActivity.CPU
        self._profiler = torch.profiler.profile(activities=[activity])
        self._profiler.start()

    def end_profile(self) -> Times:
        """What has run since."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profiler.stop()
        found: dict[str, tuple[float, float]] = {}
        for event in self._profiler.key_averages():
            us = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
            name = event.key[:NAME_LENGTH]
            us_before, calls_before = found.get(name, (0.0, 0.0))
            found[name] = (us_before + us, calls_before + event.count)
        return found


def _has_kernel(module: Any) -> bool:
    """Whether vLLM computes the layer with one of its kernels for packed integers."""
    return hasattr(getattr(module, "scheme", None), "kernel")
