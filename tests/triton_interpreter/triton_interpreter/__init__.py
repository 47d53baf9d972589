"""A Triton backend for machines without a GPU: active only under TRITON_INTERPRET=1, where kernels run in numpy.

It makes vLLM see a usable Triton, and so lets its V2 model runner start on a CPU. It compiles nothing.
"""
