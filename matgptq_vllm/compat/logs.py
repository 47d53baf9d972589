"""Log lines of this project, among vLLM's."""

import logging

PACKAGES = ("matgptq_vllm", "serve")


def join_vllm_logs() -> None:
    """Send what the project's loggers say to vLLM's handlers, at vLLM's level (``VLLM_LOGGING_LEVEL``).

    vLLM sets up the loggers of its own name only; without this, lines of level INFO would be lost. Loggers that have handlers
    already are left as they are, and so are all where vLLM was told to set up none (``VLLM_CONFIGURE_LOGGING=0``).
    """
    theirs = logging.getLogger("vllm")
    for name in PACKAGES:
        ours = logging.getLogger(name)
        if theirs.handlers and not ours.handlers:
            ours.setLevel(theirs.level)
            ours.propagate = theirs.propagate
            for handler in theirs.handlers:
                ours.addHandler(handler)
