"""Where a model's files are: a local folder as it is, a Hub repository fetched in the part that this replica needs."""

from pathlib import Path

from huggingface_hub import snapshot_download

from matgptq_vllm.core.checkpoint import METADATA_FILES, ParentReader


def local_folder(model: str, revision: str | None, max_width: int) -> Path:
    """Folder that holds the parent ``model``; of a Hub repository, only the planes for ``max_width`` are downloaded."""
    if Path(model).is_dir():
        return Path(model)
    folder = snapshot_download(model, revision=revision, allow_patterns=list(METADATA_FILES))
    files = ParentReader(folder).files(max_width)
    return Path(snapshot_download(model, revision=revision, allow_patterns=[*METADATA_FILES, *files]))
