"""The files of versions as they are read: checked against what was published, and damage noted."""

from __future__ import annotations

from app.checkpoint import CONFIG_FILE, TENSORS_FILE, read_checkpoint
from app.errors import NotReady, PromptCorrupt, ReferenceNotFound
from app.manifest import ManifestInput
from app.registry.index import Index
from app.registry.log import sha256
from app.registry.quarantine import Quarantine
from app.registry.reference import not_found
from app.registry.store import Store
from app.registry.task import Version
from app.soft_prompt import BaseInfo, SoftPrompt


class Files:
    """Of one store, for one base model. Thread-safe."""

    def __init__(self, store: Store, index: Index, quarantine: Quarantine, base: BaseInfo) -> None:
        self._store = store
        self._index = index
        self._quarantine = quarantine
        self._base = base

    def read(self, version: Version, name: str) -> bytes:
        """Raises PromptCorrupt if it is not what was published, and ReferenceNotFound if the version is gone."""
        data = self._store.read_file(version.task, version.number, name)
        if data is None and version.number not in self._index.catch_up(version.task).task.versions:
            raise not_found()
        if data is None or sha256(data) != version.files[name]:
            self._quarantine.add(version, name)
            raise PromptCorrupt(f"{version.reference}: {name} does not match its digest")
        self._quarantine.lift(version, name)
        return data

    def load(self, version: Version) -> SoftPrompt:
        """Raises what `read` raises, and InvalidPromptFile if the prompt does not fit the base model."""
        config, tensors = self.read(version, CONFIG_FILE), self.read(version, TENSORS_FILE)
        given = version.manifest.model_dump(include=set(ManifestInput.model_fields))
        manifest = ManifestInput.model_validate(given)
        prompt = read_checkpoint(config, tensors, manifest, self._base).prompt
        if prompt.digest != version.digest:
            raise PromptCorrupt(f"{version.reference}: its files do not match its digest")
        return prompt

    def are_intact(self, version: Version) -> bool:
        try:
            return all(self.read(version, name) for name in version.files)
        except (PromptCorrupt, ReferenceNotFound, NotReady):
            return False  # a file on a bad sector cannot be read at all, and is mended as one that is damaged is
