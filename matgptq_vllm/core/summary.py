"""ParentSummary: what a parent's small files tell, read without torch: its constants, layers and profiles."""

from pathlib import Path

from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.manifest import read_manifest
from matgptq_vllm.core.precision import PARENT_WIDTH
from matgptq_vllm.core.profile import PROFILES_FILE, Profile, all_profiles, profiles_from_json


class ParentSummary:
    """A parent on disk, as far as its manifest, config.json and profile table tell.

    Raises (from the constructor and every method):
        InputError: there is no such folder.
        FormatError: the folder is not a whole parent; the message names the file.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise InputError(
                f"{directory} is not a folder; give the folder of a parent, as `matgptq calibrate --out` writes it"
            )
        manifest = read_manifest(self.directory)
        self.spec = manifest.spec
        self.layers = manifest.layers
        """Quantized layers: name -> (N, K)."""
        self._sha256 = manifest.sha256

    @property
    def num_weights(self) -> dict[str, int]:
        """Weights of every quantized layer."""
        return {name: n * k for name, (n, k) in self.layers.items()}

    def stored_profiles(self) -> list[Profile]:
        """The profiles in the parent's table; uniform ones are not stored."""
        try:
            text = (self.directory / PROFILES_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise FormatError(f"{PROFILES_FILE}: cannot be read ({error}); copy it again") from error
        return profiles_from_json(text, self.layers.keys(), PROFILES_FILE)

    def profiles(self, max_width: int = PARENT_WIDTH) -> list[Profile]:
        """Every profile that a replica of ``max_width`` can serve, in index order."""
        return all_profiles(self.layers.keys(), self.stored_profiles(), max_width)

    def profile(self, name: str) -> Profile:
        """The profile called ``name``; InputError lists what there is."""
        profiles = {profile.name: profile for profile in self.profiles()}
        if name not in profiles:
            raise InputError(f"{self.directory} has no profile {name!r}; it has {', '.join(profiles)}")
        return profiles[name]
