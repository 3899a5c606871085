"""Static slices of a run: which shards a process computes, and on which device of its node."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from esm_packed.errors import UserError


class SliceError(UserError, ValueError):
    """`--slice` is invalid; the message says why and shows valid values."""


@dataclass(frozen=True)
class Slice:
    """Part `index` (0-based) of `count` parts of a run."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def shards(self, num_shards: int) -> range:
        """Return the numbers of the shards in this part: every `count`-th one."""
        return range(self.index, num_shards, self.count)


def parse_slice(text: str, environment: Mapping[str, str]) -> Slice:
    """Parse `INDEX/COUNT`, or take both from the environment if `text` is `auto`.

    `auto` recognizes torchrun (RANK, WORLD_SIZE), Slurm tasks (SLURM_PROCID, SLURM_NTASKS) and Slurm arrays
    that start at 0 with step 1 (SLURM_ARRAY_TASK_ID and related variables), in this order.

    Raises:
        SliceError: `text` is neither, or the environment does not define a slice.
    """
    if text != "auto":
        found = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", text)
        if not found or int(found[1]) >= int(found[2]):
            raise SliceError(
                f"--slice {text!r} is neither auto nor INDEX/COUNT with INDEX from 0 to COUNT - 1"
            )
        return Slice(int(found[1]), int(found[2]))
    for index, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if index in environment and count in environment:
            part = Slice(_number(environment, index), _number(environment, count))
            if part.index >= part.count:
                raise SliceError(
                    f"--slice auto: {index} is {part.index} and {count} is {part.count}, but {index} goes "
                    f"from 0 to {count} - 1; say --slice INDEX/COUNT"
                )
            # a single Slurm task does not define a slice: in a Slurm array every job step is one
            if part.count > 1 or index == "RANK":
                return part
    if "SLURM_ARRAY_TASK_ID" in environment:
        return _array_slice(environment)
    raise SliceError(
        "--slice auto: neither torchrun nor Slurm started this process with several tasks; say --slice "
        "INDEX/COUNT, such as --slice 0/8"
    )


def _array_slice(environment: Mapping[str, str]) -> Slice:
    task, least, most, step, count = (
        _number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX", "STEP", "COUNT")
    )
    if least != 0 or step != 1 or most != count - 1:
        raise SliceError(
            f"--slice auto: this Slurm array goes from {least} to {most} by {step} in {count} tasks; submit "
            "it as --array=0-7, or say --slice INDEX/COUNT, such as --slice $SLURM_ARRAY_TASK_ID/8"
        )
    if task >= count:
        raise SliceError(
            f"--slice auto: SLURM_ARRAY_TASK_ID is {task} and SLURM_ARRAY_TASK_COUNT is {count}, but the "
            "array begins at 0; say --slice INDEX/COUNT"
        )
    return Slice(task, count)


def local_device_number(environment: Mapping[str, str], num_devices: int) -> int:
    """Return which of its visible devices a process should use, by its local rank on the node.

    Args:
        environment: environment of the process, searched for LOCAL_RANK (torchrun) and SLURM_LOCALID.
        num_devices: number of visible devices; a process that sees only one uses that one.
    """
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if name in environment:
            return _number(environment, name) % max(1, num_devices)
    return 0


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not re.fullmatch("[0-9]{1,9}", text):
        raise SliceError(f"--slice auto: {name} is {text!r}, not an integer from 0; say --slice INDEX/COUNT")
    return int(text)
