"""The parent's own evaluation report: what each profile is worth, for whoever serves it. Optional; standard library only."""

import json
import math
from pathlib import Path

from matgptq_vllm.core.errors import FormatError

QUALITY_FILE = "matgptq_evaluation.json"
"""report.json of ``matgptq evaluate PARENT --update-card``."""


def read_perplexities(directory: Path) -> dict[str, float]:
    """Perplexity of every profile that was measured; empty if the parent was not.

    Raises:
        FormatError: the file is there but is no such report.
    """
    try:
        report = json.loads((directory / QUALITY_FILE).read_text(encoding="utf-8"))
        found = {str(result["precision"]): float(result["perplexity"]) for result in report["results"]}
    except FileNotFoundError:
        return {}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{QUALITY_FILE}: is no evaluation report ({type(error).__name__}: {error}); delete it, or measure again with "
            "`matgptq evaluate PARENT --text FILE --update-card`"
        ) from error
    return {name: value for name, value in found.items() if math.isfinite(value)}
