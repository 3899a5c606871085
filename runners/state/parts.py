"""The folder of the parts of an output, beside it.

OUT.h5.parts/
    ESM-PACKED-PARTS        the marker: this folder is ours
    1a2b3c4d/00007.h5       the parts of one run; those of the run that OUT.h5 is of are read through it
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from esm_packed.errors import UsageError
from esm_packed.files import read_regular, whole_or_nothing

PART_FORMAT = "esm-packed part"
MOST_PARTS = 128
MARKER = "ESM-PACKED-PARTS"
_MARKER_TEXT = b"esm-packed: residues of the output beside this folder; move both together\n"
_RUN = re.compile(r"[0-9a-f]{8}")
_PART = re.compile(r"[0-9]{5}\.h5")


class PartsFolder:
    """Parts of one run.

    Args:
        output: the file they belong to.
        run: name of the folder of the run.
    """

    def __init__(self, output: Path, run: str) -> None:
        self._root = output.with_name(f"{output.name}.parts")
        self._run = run
        self.path = self._root / run

    @property
    def attribute(self) -> str:
        """Where the parts are, relative to the output."""
        return f"{self._root.name}/{self._run}"

    def make(self) -> None:
        """Make the folder if it is not there.

        Raises:
            UsageError: something that is not ours has its name.
            OSError: it cannot be made.
        """
        if not self._is_ours():
            with suppress(FileExistsError):
                self._root.mkdir()
            if self._root.is_symlink() or not self._root.is_dir() or any(self._root.iterdir()):
                raise UsageError(
                    f"{self._root}: in the way of the parts of the output, and not made by esm-packed; "
                    "move it away"
                )
            with whole_or_nothing(self._root / MARKER) as temporary:
                temporary.write_bytes(_MARKER_TEXT)
        self.path.mkdir(exist_ok=True)
        if self.path.is_symlink():
            raise UsageError(f"{self.path}: is a link, and not made by esm-packed; move it away")

    def remove_others(self, *, keep: bool) -> None:
        """Remove the parts of other runs, and of this one unless `keep`."""
        if not self._is_ours():
            return
        for folder in self._root.iterdir():
            is_kept = keep and folder.name == self._run
            if _RUN.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink() and not is_kept:
                for file in folder.iterdir():
                    if _PART.fullmatch(file.name):
                        file.unlink(missing_ok=True)
                with suppress(OSError):  # something else is in it
                    folder.rmdir()
        if all(entry.name == MARKER for entry in self._root.iterdir()):
            (self._root / MARKER).unlink(missing_ok=True)
            with suppress(OSError):
                self._root.rmdir()

    def _is_ours(self) -> bool:
        try:
            return not self._root.is_symlink() and read_regular(self._root / MARKER) == _MARKER_TEXT
        except OSError:
            return False
