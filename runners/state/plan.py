"""How a run is cut up: shards of like cost, and which records are computed at all."""

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
    """SHA-256 (hex) of what defines a run, independent of the order of keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class PlanError(UserError, ValueError):
    """A run directory belongs to another run; the message says what differs."""


@dataclass(frozen=True)
class Plan:
    """A run, fixed before anything is computed and the same for every process that works on it.

    Args:
        identity: what makes two runs the same one.
        input_names: the inputs as the user named them.
        starts: first record of each shard, and the number of records at the end; of a scoring run, queries.
        model_name: for people; `model_sha256` in the identity says which model it is.
        hidden_size: columns of the embeddings.
        command: the one that began the run, for people.
        nonce: tells this run from others of the same identity, by the parts of its output.
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
        """Names of the outputs that are kept."""
        return output_names(self.identity["kinds"], self.layers)

    @property
    def is_scoring(self) -> bool:
        """Whether variants are scored, in place of proteins embedded."""
        return "scoring" in self.identity

    @property
    def scoring(self) -> Mapping[str, Any]:
        """How variants are scored: the fields of `request.Scoring` that make another run."""
        scoring: Mapping[str, Any] = self.identity["scoring"]
        return scoring

    @property
    def windows(self) -> Windows | None:
        """How long proteins are cut into windows; None for not at all."""
        windows = self.identity["windows"]
        return Windows(*windows) if windows else None

    @property
    def token_budget(self) -> int:
        """Tokens in a pack."""
        return int(self.identity["token_budget"])

    @property
    def max_length(self) -> int:
        """Residues kept of a sequence; 0 keeps all."""
        return int(self.identity["max_length"])

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the identity."""
        return plan_hash(self.identity)

    @property
    def num_shards(self) -> int:
        """Shards of the run."""
        return len(self.starts) - 1

    def records(self, shard: int) -> tuple[int, int]:
        """Records [start, stop) of a shard; of a scoring run, queries."""
        return self.starts[shard], self.starts[shard + 1]

    def write(self, path: Path, scratch: Path) -> None:
        """Write the plan so that it is there whole or not at all; `scratch` holds it meanwhile."""
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
            PlanError: the file is no plan, or a newer program's.
            OSError: it is not there or cannot be read.
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
        """See that a run of `identity` may continue this one.

        Raises:
            PlanError: names what differs, with both values.
        """
        if differing := differences(self.identity, identity):
            raise PlanError(
                f"{where}: an unfinished run with other input or options ({differing}); "
                "rerun its command to continue it, or use --overwrite to start over"
            )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between the identities of two runs, with both values; empty if nothing does."""
    before, now = _flat(before), _flat(now)
    return "; ".join(
        f"{name} was {_shown(name, before.get(name))}, now {_shown(name, now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity whose ways of scoring stand beside everything else."""
    rest = {name: value for name, value in identity.items() if name != "scoring"}
    return {**rest, **identity.get("scoring", {})}


def _shown(name: str, value: Any) -> str:
    if name != "inputs" or not isinstance(value, list):
        return repr(value)
    return ", ".join(f"{each['size']:,} bytes with sha256 {each['sha256'][:12]}..." for each in value)
