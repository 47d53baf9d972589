"""Entry point ``vllm.general_plugins``: runs in every vLLM process, possibly more than once."""


def register() -> None:
    """Make vLLM know the quantization method ``matgptq`` and how its checkpoints are read; log where vLLM does."""
    from matgptq_vllm.compat.logs import join_vllm_logs
    from matgptq_vllm.compat.model_loader import register_loader
    from matgptq_vllm.kernels.ops import register_ops
    from matgptq_vllm.plugin.config import register_config

    join_vllm_logs()
    register_ops()
    register_config()
    register_loader()
