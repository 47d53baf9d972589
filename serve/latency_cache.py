"""Step times measured by earlier starts, one small JSON file for each combination of what they depend on."""

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from matgptq_vllm.core.errors import InputError
from serve.latency_model import LatencyModel

_logger = logging.getLogger(__name__)


def cache_folder(setting: str | None) -> Path:
    """The folder in the settings, or the user's cache folder."""
    if setting is not None:
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matgptq-vllm" / "latency"


class LatencyCache:
    """The file of one replica.

    Args:
        folder: made when something is first stored.
        key: everything that step times depend on: device, parent, versions, options.
    """

    def __init__(self, folder: Path, key: Mapping[str, object]):
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{digest[:32]}.json"
        self._key = dict(key)

    def restore(self, model: LatencyModel) -> bool:
        """Teach ``model`` what was stored; False if nothing was, or the file is damaged, which is logged."""
        try:
            document = json.loads(self.path.read_text("utf-8"))
            # The key is stored too, so that a person can tell what a file is about.
            if document["key"] != self._key:
                return False
            model.restore(document["model"])
        except FileNotFoundError:
            return False
        except (OSError, LookupError, TypeError, ValueError, InputError) as error:
            _logger.warning("%s cannot be read and is not used: %s", self.path, error)
            return False
        return True

    def store(self, model: LatencyModel) -> None:
        """Replace what is stored."""
        self.write(model.to_json())

    def store_soon(self, model: LatencyModel) -> threading.Thread:
        """As ``store``, of the model as it is now, but written in another thread: an event loop does not wait for a disk."""
        writer = threading.Thread(target=self.write, args=(model.to_json(),), name="latency-cache")
        writer.start()
        return writer

    def write(self, document: Mapping[str, object]) -> None:
        """Replace what is stored, in one step. A failure is logged: a server does not stop for its cache."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=self.path.parent, delete=False) as file:
                json.dump({"key": self._key, "model": document}, file)
            os.replace(file.name, self.path)
        except OSError as error:
            _logger.warning("step times cannot be kept in %s: %s", self.path, error)
