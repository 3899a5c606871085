"""What a scoring run computes: copies of proteins, and the sites read from each."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esm_packed.errors import UserError
from esm_packed.files import open_regular, whole_or_nothing
from esm_packed.scoring import Query

_ARRAYS = ("records", "starts", "stops", "ends", "sites")


class QueriesError(UserError, ValueError):
    """The queries of a run are missing, damaged, or from another run."""


@dataclass(frozen=True)
class Queries:
    """Queries of many proteins, ordered by protein; see `scoring.plan_queries`.

    Args:
        records: (num_queries,) int32 protein of each query.
        starts, stops: (num_queries,) int32 residues [start, stop) of each copy.
        ends: (num_queries + 1,) int64; the sites of query i are `sites[ends[i] : ends[i + 1]]`.
        sites: (num_sites,) int32, 0-based positions in the protein.
        are_masked: whether sites are masked.
    """

    records: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    stops: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]
    sites: npt.NDArray[np.int32]
    are_masked: bool

    def __len__(self) -> int:
        return len(self.records)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(num_queries,) number of residues of each copy."""
        return self.stops - self.starts

    def __getitem__(self, query: int) -> Query:
        first, last = self.ends[query : query + 2].tolist()
        sites = tuple(self.sites[first:last].tolist())
        return Query(int(self.starts[query]), int(self.stops[query]), sites, self.are_masked)

    @classmethod
    def of(cls, plans: Iterable[tuple[int, Sequence[Query]]], *, are_masked: bool) -> Queries:
        """Collect the queries of proteins.

        Args:
            plans: (record, its queries) pairs, in ascending order of records.
            are_masked: whether their sites are masked.
        """
        found: dict[str, list[npt.NDArray[np.int32]]] = {name: [] for name in (*_ARRAYS, "counts")}
        for record, queries in plans:
            found["records"].append(np.full(len(queries), record, np.int32))
            found["starts"].append(np.array([query.start for query in queries], np.int32))
            found["stops"].append(np.array([query.stop for query in queries], np.int32))
            found["counts"].append(np.array([len(query.sites) for query in queries], np.int32))
            found["sites"].append(np.array([site for query in queries for site in query.sites], np.int32))
        none = [np.zeros(0, np.int32)]
        records, starts, stops, counts, sites = (
            np.concatenate(none + found[name]) for name in ("records", "starts", "stops", "counts", "sites")
        )
        ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return cls(records, starts, stops, ends, sites, are_masked)

    def write(self, path: Path, scratch: Path, plan: str) -> None:
        """Write the file atomically, via the directory `scratch`; `plan` is the hash of the run's plan.

        Raises:
            OSError: the disk is full or has failed.
        """
        with whole_or_nothing(path, scratch) as temporary, temporary.open("wb") as file:
            arrays = {name: getattr(self, name) for name in _ARRAYS}
            np.savez(file, **arrays, are_masked=self.are_masked, plan=plan)

    @classmethod
    def read(cls, path: Path, plan: str) -> Queries:
        """Read a file written by `write`, verifying the CRC-32 of each array.

        Raises:
            QueriesError: the file is missing, damaged, or from another plan.
        """
        try:
            with open_regular(path) as file, np.load(file) as found:
                if str(found["plan"]) == plan:
                    records, starts, stops, ends, sites = (found[name] for name in _ARRAYS)
                    return cls(records, starts, stops, ends, sites, bool(found["are_masked"]))
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
            pass
        raise QueriesError(f"{path}: missing, damaged or another run's; rerun the command that began the run")
