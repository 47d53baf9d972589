"""Speed of the engine at every width beside stock vLLM on the same machine. Unlike the other load tests it needs no server."""
