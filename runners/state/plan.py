"""The plan of a run: its shards of similar cost, and which records are computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esm_packed.errors import UserError
from esm_packed.files import read_regular, whole_or_nothing
from esm_packed.outputs import output_names
from esm_packed.windows import Windows

PLAN_FORMAT = 2


def plan_hash(identity: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of what defines a run, independent of key order."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class PlanError(UserError, ValueError):
    """A run directory belongs to another run; the message says what differs."""


@dataclass(frozen=True)
class Plan:
    """The definition of a run, fixed before anything is computed and shared by all its processes.

    Args:
        identity: what defines the run; two runs with equal identities are the same.
        input_names: the inputs as named by the user.
        starts: first record of each shard, followed by the number of records; queries for a scoring run.
        model_name: for display; `model_sha256` in the identity identifies the model.
        hidden_size: columns of the embeddings.
        command: the command that started the run, for display.
        nonce: distinguishes the output parts of this run from those of others with the same identity.
    """

    identity: Mapping[str, Any]
    input_names: tuple[str, ...]
    starts: tuple[int, ...]
    model_name: str = ""
    hidden_size: int = 0
    command: str = ""
    nonce: str = ""

    @property
    def layers(self) -> list[int]:
        """Layers kept; the mean of the last one is `embeddings`."""
        return list(self.identity["layers"])

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs kept."""
        return output_names(self.identity["kinds"], self.layers)

    @property
    def is_scoring(self) -> bool:
        """Whether the run scores variants instead of embedding proteins."""
        return "scoring" in self.identity

    @property
    def scoring(self) -> Mapping[str, Any]:
        """How variants are scored: the fields of `request.Scoring` that are part of the identity."""
        scoring: Mapping[str, Any] = self.identity["scoring"]
        return scoring

    @property
    def windows(self) -> Windows | None:
        """How long proteins are cut into windows; None if they are not."""
        windows = self.identity["windows"]
        return Windows(*windows) if windows else None

    @property
    def token_budget(self) -> int:
        """Tokens in a pack."""
        return int(self.identity["token_budget"])

    @property
    def max_length(self) -> int:
        """Number of residues kept of a sequence; 0 keeps all."""
        return int(self.identity["max_length"])

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the identity."""
        return plan_hash(self.identity)

    @property
    def num_shards(self) -> int:
        """Number of shards of the run."""
        return len(self.starts) - 1

    def records(self, shard: int) -> tuple[int, int]:
        """Return the records [start, stop) of a shard; queries for a scoring run."""
        return self.starts[shard], self.starts[shard + 1]

    def write(self, path: Path, scratch: Path) -> None:
        """Write the plan atomically, via the directory `scratch`."""
        content = {
            "format": PLAN_FORMAT,
            "identity": self.identity,
            "input_names": list(self.input_names),
            "starts": list(self.starts),
            "model_name": self.model_name,
            "hidden_size": self.hidden_size,
            "command": self.command,
            "nonce": self.nonce,
        }
        content["sha256"] = plan_hash(content)
        with whole_or_nothing(path, scratch) as temporary:
            temporary.write_text(json.dumps(content, indent=1))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan.

        Raises:
            PlanError: the file is not a plan, or was written by another version.
            OSError: the file is missing or cannot be read.
        """
        try:
            content = json.loads(read_regular(path))
            is_whole = content.pop("sha256") == plan_hash(content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            is_whole = False
        if not is_whole:
            raise PlanError(f"{path}: damaged; use --overwrite to start over")
        try:
            if content["format"] == PLAN_FORMAT:
                return cls(
                    content["identity"],
                    tuple(content["input_names"]),
                    tuple(content["starts"]),
                    content["model_name"],
                    content["hidden_size"],
                    content["command"],
                    content["nonce"],
                )
        except (KeyError, TypeError):
            pass
        raise PlanError(f"{path}: made by another version of esm-packed; use --overwrite to start over")

    def check_same(self, identity: Mapping[str, Any], where: Path) -> None:
        """Check that a run with `identity` may continue this one.

        Raises:
            PlanError: the identities differ; names the differences with both values.
        """
        if differing := differences(self.identity, identity):
            raise PlanError(
                f"{where}: an unfinished run with other input or options ({differing}); "
                "rerun its command to continue it, or use --overwrite to start over"
            )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe how the identities of two runs differ, with both values; empty if they are equal."""
    before, now = _flat(before), _flat(now)
    return "; ".join(
        f"{name} was {_shown(name, before.get(name))}, now {_shown(name, now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity with the entries of `scoring` moved to the top level."""
    rest = {name: value for name, value in identity.items() if name != "scoring"}
    return {**rest, **identity.get("scoring", {})}


def _shown(name: str, value: Any) -> str:
    if name != "inputs" or not isinstance(value, list):
        return repr(value)
    return ", ".join(f"{each['size']:,} bytes with sha256 {each['sha256'][:12]}..." for each in value)
