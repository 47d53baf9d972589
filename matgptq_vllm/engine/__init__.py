"""State of a serving engine that knows nothing of vLLM: testable on a laptop."""
