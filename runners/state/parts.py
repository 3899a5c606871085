"""The directory with the parts of an output, next to the output file.

OUT.h5.parts/
    ESM-PACKED-PARTS        the marker: this directory belongs to esm-packed
    1a2b3c4d/00007.h5       the parts of one run; OUT.h5 refers to those of its own run
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
_MARKER_TEXT = b"esm-packed: residues of the output next to this directory; move both together\n"
_RUN = re.compile(r"[0-9a-f]{8}")
_PART = re.compile(r"[0-9]{5}\.h5")


class PartsDirectory:
    """The parts of one run.

    Args:
        output: the file they belong to.
        run: name of the run's directory.
    """

    def __init__(self, output: Path, run: str) -> None:
        self._output = output
        self._root = _root_of(output)
        self.path = self._root / run
        self.attribute = f"{self._root.name}/{run}"
        """Path of the parts, relative to the output."""

    def check(self) -> None:
        """Check that the directory exists or can be created.

        Raises:
            UsageError: something not created by esm-packed has its name, or HDF5 cannot store that name.
        """
        try:
            self.attribute.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{self._output}: an output in parts needs a UTF-8 name; rename it, or use --merge to write "
                "one file"
            ) from None
        if _is_foreign(self._root) or (not _is_ours(self._root) and _has_entries(self._root)):
            raise UsageError(
                f"{self._root}: not created by esm-packed, but the parts of the output need this name; "
                "move it, or use --merge to write one file"
            )
        if _is_foreign(self.path):
            raise UsageError(f"{self.path}: not created by esm-packed; move it")

    def make(self, scratch: Path) -> None:
        """Create the directory if it does not exist.

        Args:
            scratch: a directory on the same file system for unfinished files.

        Raises:
            UsageError: as in `check`.
            OSError: the directory cannot be created.
        """
        self.check()
        self._root.mkdir(exist_ok=True)
        if not _is_ours(self._root):
            with whole_or_nothing(self._root / MARKER, scratch) as temporary:
                temporary.write_bytes(_MARKER_TEXT)
        self.path.mkdir(exist_ok=True)


def remove_unused_parts(output: Path, used: str | None) -> None:
    """Remove the parts that belong to runs other than that of the output.

    Args:
        output: the file.
        used: its attribute `parts`; None if it has none.
    """
    root = _root_of(output)
    if not _is_ours(root):
        with suppress(OSError):  # a killed process may have left an empty one
            root.rmdir()
        return
    for path in root.iterdir():
        is_used = used == f"{root.name}/{path.name}"
        if _RUN.fullmatch(path.name) and path.is_dir() and not path.is_symlink() and not is_used:
            for file in path.iterdir():
                if _PART.fullmatch(file.name):
                    file.unlink(missing_ok=True)
            with suppress(OSError):  # it contains something else
                path.rmdir()
    if all(entry.name == MARKER for entry in root.iterdir()):
        (root / MARKER).unlink(missing_ok=True)
        with suppress(OSError):
            root.rmdir()


def _root_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def _is_ours(root: Path) -> bool:
    try:
        return not root.is_symlink() and read_regular(root / MARKER) == _MARKER_TEXT
    except OSError:
        return False


def _is_foreign(path: Path) -> bool:
    """Whether the path exists but is not a directory."""
    return path.is_symlink() or (path.exists() and not path.is_dir())


def _has_entries(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
