"""MatGPTQ-vLLM: one 8-bit parent checkpoint, served at any slice width, per request, in one vLLM engine.

Importing this package imports nothing else, so ``matgptq_vllm.core`` can be used where vLLM is not installed.
"""

__version__ = "0.1.0"
