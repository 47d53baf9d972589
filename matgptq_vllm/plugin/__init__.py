"""vLLM's public extension points: the quantization method ``matgptq``."""
