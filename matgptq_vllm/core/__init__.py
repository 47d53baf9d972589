"""The shared truth: widths, slices, planes, profiles and the parent format. Needs neither vLLM nor transformers."""
