"""The HTTP side of a replica: one command around vLLM's own server, request middleware, endpoints and metrics."""
