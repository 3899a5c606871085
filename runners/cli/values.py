"""Convert arguments of the command line to values; an error says what is accepted."""

from __future__ import annotations

import argparse
import errno
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from esm_packed.config import DTYPES
from esm_packed.outputs import KINDS


def path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name of a file or directory is empty")
    path = Path(text)
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise argparse.ArgumentTypeError(f"{shown!r}: {error.strerror}") from error
    return path


def existing(text: str) -> Path:
    found = path(text)
    if not found.exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return found


def output_file(text: str) -> Path:
    file = path(text)
    if text.endswith("/") or file.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a directory; name a file in it")
    return file


def output_directory(text: str) -> Path:
    directory = path(text)
    if directory.exists() and not directory.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: not a directory; name a directory for the output")
    return directory


def model(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name of the model is empty")
    return text


def input_name(text: str) -> str:
    path(text)
    return text


def whole_number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch("-?[0-9]{1,18}", text) or not least <= int(text) <= 2**31 - 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {least} to {2**31 - 1}")
        return int(text)

    return read


def layers(text: str) -> tuple[int, ...]:
    if not re.fullmatch("-?[0-9]{1,9}(,-?[0-9]{1,9})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 6,12 or -1")
    return tuple(int(layer) for layer in text.split(","))


def layer(text: str) -> int:
    if not re.fullmatch("-?[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a layer such as 33 or -1")
    return int(text)


def kinds(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(KINDS)}")
    return names


def table_column(text: str) -> tuple[Path, str]:
    colons = [place for place, character in enumerate(text) if character == ":"]
    files = [place for place in colons if Path(text[:place]).is_file()]  # there may be colons in either
    place = (files or colons or [0])[-1]
    table, column = text[:place], text[place + 1 :]
    if not table or not column:
        raise argparse.ArgumentTypeError(f"{text!r} is not TABLE.tsv:COLUMN")
    return path(table), column


def device(text: str) -> str:
    if text.partition(":")[0] == "mps":
        raise argparse.ArgumentTypeError(
            "mps is not supported: its results have not been checked against fair-esm; use cpu"
        )
    if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, cpu, cuda, cuda:INDEX")
    return text


def gpu_numbers(text: str) -> tuple[int, ...]:
    if text == "all":
        return ()
    if not re.fullmatch("[0-9]{1,3}(,[0-9]{1,3})*", text) or len(set(text.split(","))) < text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor a list of GPU numbers such as 0,1")
    return tuple(map(int, text.split(",")))


def dtypes(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        if not set(names) <= set(choices):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(choices)}")
        return names

    return read


def threshold(text: str) -> tuple[str, float, float | None]:
    dtype, _, numbers = text.partition("=")
    try:
        relative_l2, cosine = [*map(float, numbers.split(",")), None][:2]
    except ValueError:
        relative_l2 = cosine = None
    if re.search("[^-+.,0-9A-Za-z]", numbers):  # float() takes more, such as the digits of other scripts
        relative_l2 = None
    if dtype not in DTYPES or relative_l2 is None or numbers.count(",") > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not DTYPE=L2[,COSINE], such as fp16=1e-3,0.99999")
    if not 0 <= relative_l2 < math.inf or (cosine is not None and not -1 <= cosine <= 1):
        raise argparse.ArgumentTypeError(
            f"{text!r}: the relative L2 error must be finite and at least 0, the cosine between -1 and 1"
        )
    return dtype, relative_l2, cosine


def join_negative_layers(arguments: Sequence[str]) -> list[str]:
    """`--layers -1,-2` as `--layers=-1,-2`: argparse would take the list for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--layers" and re.match("-[0-9]", argument):
            joined[-1] = f"--layers={argument}"
        else:
            joined.append(argument)
    return joined
