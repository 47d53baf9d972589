"""Other formats: the published MatGPTQ checkpoint becomes a parent, a slice becomes a checkpoint that stock vLLM loads."""
