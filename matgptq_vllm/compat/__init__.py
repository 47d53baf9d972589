"""Everything that depends on a vLLM release. Overrides are subclasses; a release that moves a hook is handled here only."""
