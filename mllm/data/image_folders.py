"""Finds the image files of a dataset in its folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


class ImageFolders:
    """The image folders of a dataset. Each is listed once: checking 100,000 files one by one takes minutes."""

    def __init__(self, root: Path, folders: Sequence[str]) -> None:
        self.root = root
        self.folders = folders
        self._files = {folder: set(os.listdir(root / folder)) for folder in folders if (root / folder).is_dir()}

    def find(self, *names: str, first: str | None = None) -> str:
        """The path of the first of these names in the first folder that has it.

        If no folder has it, returns the expected path: opening it fails, but the text of a dataset can be read without
        its images.

        Args:
            names: File names, in order of preference.
            first: Folder to search before the others.
        """
        for folder in self.folders if first is None else (first, *self.folders):
            for name in names:
                # a name with a folder ("train2014/1.jpg") is in no listing
                if name in self._files.get(folder, ()) or "/" in name and (self.root / folder / name).is_file():
                    return str(self.root / folder / name)
        return str(self.root / (first or self.folders[0]) / names[0])
