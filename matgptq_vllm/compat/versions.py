"""Which vLLM releases this project runs on."""

import logging
from importlib.metadata import version

from packaging.version import Version

from matgptq_vllm.core.errors import UnsupportedError

MIN_VERSION = Version("0.26")
NEXT_UNTESTED = Version("0.34")

_logger = logging.getLogger(__name__)


def check_vllm_version(found: str | None = None) -> None:
    """Refuse a vLLM without the hooks this project needs; warn of one newer than any it was tested on.

    Args:
        found: version to judge; None for the installed one.

    Raises:
        UnsupportedError: older than MIN_VERSION.
    """
    release = Version(found or version("vllm"))
    if release < MIN_VERSION:
        raise UnsupportedError(
            f"vLLM {release} is too old; matgptq-vllm runs on vLLM {MIN_VERSION} up to, not including, {NEXT_UNTESTED}"
        )
    if release >= NEXT_UNTESTED:
        _logger.warning("vLLM %s is newer than any release matgptq-vllm was tested on (below %s)", release, NEXT_UNTESTED)
