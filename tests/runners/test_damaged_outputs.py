"""Outputs of which something is not as it should be: each is an error in a line, and stays as it is."""

import json
import resource
from pathlib import Path

import h5py
import numpy as np
import pytest

from esm_packed.runners.cli import main as cli


def without(name):
    def remove(file):
        del file[name]

    return remove


def instead(name, **dataset):
    def replace(file):
        del file[name]
        file.create_dataset(name, **dataset)

    return replace


def a_group_instead(name):
    def replace(file):
        del file[name]
        file.create_group(name)

    return replace


def a_link_instead(name, link):
    def replace(file):
        del file[name]
        file[name] = link

    return replace


def attribute(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


def many_rows(file):
    """As many rows as no file of this size can hold, none of them written."""
    for name in ("sequence_ids", "lengths", "embedded_lengths", "truncated", "status", "embeddings"):
        shape, dtype = (2**34, *file[name].shape[1:]), file[name].dtype
        del file[name]
        file.create_dataset(name, shape, dtype, chunks=(1024, *shape[1:]))


def many_compressed_rows(file):
    many_rows(file)
    instead("lengths", shape=(2**34,), dtype="i4", chunks=(2**20,), compression="gzip")(file)


def many_problems(file):
    dtype = file["problems"].dtype
    instead("problems", shape=(2**34,), dtype=dtype, chunks=(1024,))(file)


def plan_with(**changes):
    def change(file):
        plan = json.loads(file["plan"][()])
        instead("plan", data=json.dumps(plan | changes))(file)

    return change


DAMAGES = {
    "plan_hash is a number": attribute("plan_hash", 3),
    "format is a list": attribute("format", ["esm-packed", "esm-packed"]),
    "format_version is text": attribute("format_version", "1"),
    "format_version is a list": attribute("format_version", [1, 2]),
    "layers is text": attribute("layers", "six"),
    "layers is empty": attribute("layers", np.zeros(0, np.int32)),
    "layers has no such layer": attribute("layers", [5, 6]),
    "an attribute without a value": attribute("layers", h5py.Empty("i4")),
    **{
        f"no {name}": without(name)
        for name in (
            "sequence_ids",
            "lengths",
            "embedded_lengths",
            "truncated",
            "status",
            "embeddings",
            "problems",
            "plan",
        )
    },
    "status is a group": a_group_instead("status"),
    "plan is a group": a_group_instead("plan"),
    "plan is a number": instead("plan", data=7),
    "plan is a list": instead("plan", data=["{}", "{}"], dtype=h5py.string_dtype()),
    "plan is no JSON": instead("plan", data="{"),
    "plan is deep": instead("plan", data="[" * 100_000),
    "plan is another": plan_with(identity={}),
    "plan has no names": plan_with(input_names=[1, 2]),
    "plan is invalid UTF-8": instead("plan", data=b"\xff", dtype=h5py.string_dtype()),
    "lengths are floats": instead("lengths", data=np.zeros(3)),
    "lengths are references": instead("lengths", shape=(3,), dtype=h5py.ref_dtype),
    "lengths is a scalar": instead("lengths", data=np.int32(3)),
    "lengths is empty": instead("lengths", data=h5py.Empty("i4")),
    "status is too short": instead("status", data=np.zeros(2, np.uint8)),
    "sequence_ids are numbers": instead("sequence_ids", data=np.zeros(3)),
    "embeddings have one dimension": instead("embeddings", data=np.zeros(3, np.float32)),
    "embeddings are text": instead("embeddings", data=[["a"]] * 3, dtype=h5py.string_dtype()),
    "problems are numbers": instead("problems", data=np.zeros(3)),
    "problems lack a field": instead("problems", data=np.zeros(3, [("line", "i8")])),
    "status leads to another file": a_link_instead("status", h5py.ExternalLink("/dev/zero", "status")),
    "status leads nowhere": a_link_instead("status", h5py.SoftLink("/nothing")),
    "2^34 rows": many_rows,
    "2^34 compressed rows": many_compressed_rows,
    "2^34 problems": many_problems,
}


@pytest.fixture
def little_memory():
    """A broken program fails here instead of taking all of the machine's memory."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.timeout(60)
def test_an_output_that_is_not_as_it_should_be(fasta, capsys, without_computing, little_memory, damage):
    output = fasta.parent / "out.h5"
    embed = ["embed", str(fasta), "-o", str(output), "--model", "demo", "--device", "cpu"]
    assert cli.main(embed) == 0
    with h5py.File(output, "r+") as file:
        damage(file)
    content = output.read_bytes()
    for command in (["info", str(output)], ["status", str(output)], embed):
        capsys.readouterr()
        assert cli.main(command) == 2, command[0]
        *before, line = capsys.readouterr().err.splitlines()
        assert line.startswith("esm-packed: error: ") and str(output) in line
        assert not any(earlier.startswith(("Traceback", "esm-packed: error")) for earlier in before)
    assert output.read_bytes() == content
