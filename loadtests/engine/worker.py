"""What is asked of vLLM's worker beside steps; named by ``worker_extension_cls``."""

from typing import Any

import torch

from loadtests.engine import kernel_times


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
        self._profiler = kernel_times.profiler()
        self._profiler.start()

    def end_profile(self) -> kernel_times.Times:
        """What has run since."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profiler.stop()
        return kernel_times.times_of(self._profiler)


def _has_kernel(module: Any) -> bool:
    """Whether vLLM computes the layer with one of its kernels for packed integers."""
    return hasattr(getattr(module, "scheme", None), "kernel")
