"""compat.versions: releases that are refused, accepted, and warned of."""

import logging

import pytest

from matgptq_vllm.compat.versions import check_vllm_version
from matgptq_vllm.core.errors import UnsupportedError


@pytest.mark.parametrize("found", ["0.25.1", "0.9.2"])
def test_too_old_a_vllm_is_refused(found: str) -> None:
    with pytest.raises(UnsupportedError, match=f"vLLM {found} is too old"):
        check_vllm_version(found)


@pytest.mark.parametrize("found", ["0.26.0", "0.32.0+cpu", "0.33.1.post2", "0.27.0.dev1+g1234"])
def test_a_supported_vllm_passes_in_silence(found: str, caplog: pytest.LogCaptureFixture) -> None:
    check_vllm_version(found)
    assert not caplog.records


def test_a_newer_vllm_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_vllm_version("0.34.0")
    assert "newer than any release" in caplog.text


def test_the_installed_vllm_is_supported(caplog: pytest.LogCaptureFixture) -> None:
    check_vllm_version()
    assert not caplog.records
