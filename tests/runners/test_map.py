"""`esm-packed map`: pictures and pages of an output."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from output_files import IDS, Output, write_output

from esm_packed.runners.cli import main as cli


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Output:
    monkeypatch.chdir(tmp_path)
    return write_output(Path("in.h5"))


def table(**columns: list[str]) -> str:
    """A table of the sequences in `IDS`."""
    lines = ["\t".join(["id", *columns])]
    lines += ["\t".join(fields) for fields in zip(IDS, *columns.values(), strict=True)]
    Path("table.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "table.tsv"


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_maps_are_the_same_every_time(
    output: Output, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    arguments = ["map", "in.h5", "--color", f"{table(x=list('aabbccd'))}:x"]
    for name in ("one", "two"):
        assert cli.main([*arguments, "-o", f"{name}.{suffix}"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"one.{suffix}: m, mean of layer 6, 5 proteins",
        "2 sequences failed or not computed: skipped",
    ]
    assert (content := Path(f"one.{suffix}").read_bytes()) == Path(f"two.{suffix}").read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "html": b"<!DOCTYPE html>"}[suffix])


def test_legend_and_axes(output: Output) -> None:
    color = f"{table(x=['u', 'u', 'u', '<', '<', '', 'u'])}:x"
    assert cli.main(["map", "in.h5", "-o", "x.svg", "--kind", "max", "--layer", "1", "--color", color]) == 0
    texts = [text.text for text in ElementTree.parse("x.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"x", "u (3)", "< (1)", "no value (1)", "m, max of layer 1, 5 proteins"} <= set(texts)
    values = output.values["max/1"][output.status < 2].astype(np.float64)
    variances = np.linalg.eigvalsh(np.cov(values.T))[::-1] / np.cov(values.T).trace()
    assert {f"PC {place + 1} ({variances[place]:.1%} of the variance)" for place in (0, 1)} <= set(texts)
    assert {output.ids[row] for row in (0, 1, 4, 5, 6)} & set(texts)


def found_in(page: str, pattern: str) -> str:
    found = re.search(pattern, page)
    assert found is not None, pattern
    return found[1]


def test_a_page_says_what_each_point_is(output: Output) -> None:
    color = f"{table(x=['</script>', 'v', 'v', 'v', '', 'v', 'v'])}:x"
    assert cli.main(["map", "in.h5", "-o", "x.html", "--color", color]) == 0
    page = Path("x.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 1
    assert not re.search("(?:src|href)=.(?!data:)", page)  # needs nothing else
    stated = {
        name: json.loads(found_in(page, rf"\b{name} = (\[.*?\])[,;]"))
        for name in ("ids", "notes", "xs", "ys")
    }
    assert stated["ids"] == [output.ids[row] for row in (0, 1, 4, 5, 6)]
    assert stated["notes"] == ["x: </script>", "x: v", "", "x: v", "x: v"]
    picture = ElementTree.fromstring(base64.b64decode(found_in(page, 'base64,([^"]+)')))
    width, height = map(float, picture.attrib["viewBox"].split()[2:])
    group = picture.find(".//*[@id='PathCollection_1']")
    assert group is not None
    drawn = [
        (float(use.attrib["x"]) / width, float(use.attrib["y"]) / height)
        for use in group.iter("{http://www.w3.org/2000/svg}use")
    ]
    assert len(drawn) == 5
    np.testing.assert_allclose(sorted(drawn), sorted(zip(stated["xs"], stated["ys"], strict=True)), atol=1e-3)


def test_many_are_fitted_to_a_sample_and_all_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esm_packed.runners.mapping.MOST_FITTED", 200)
    write_output(tmp_path / "in.h5", ["mean"], repeats=500)
    for name in ("one", "two"):
        assert cli.main(["map", str(tmp_path / "in.h5"), "-o", str(tmp_path / f"{name}.html")]) == 0
    assert "mean of layer 6, 2,500 proteins (components fitted to 200)" in capsys.readouterr().out
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert len(json.loads(found_in(page, r"\bxs = (\[.*?\]),"))) == 2500
    assert page == (tmp_path / "two.html").read_text(encoding="utf-8")


def test_a_table_may_name_accessions_and_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rename(file) -> None:
        file["sequence_ids"][0] = "sp|P12345|X_HUMAN"

    write_output(tmp_path / "in.h5", change=rename)
    path = tmp_path / "t.tsv"
    path.write_text("Entry\tOS: x\r\nP12345\tHuman\r\nfailed\tu\r\nQ1\tu\r\nQ2\tu\r\n")
    arguments = ["map", str(tmp_path / "in.h5"), "-o", str(tmp_path / "x.svg"), "--color", f"{path}:OS: x"]
    assert cli.main(arguments) == 0
    assert f"2 of 4 IDs in {path} are not in {tmp_path / 'in.h5'}, such as 'Q1'" in capsys.readouterr().out
    assert "Human (1)" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("id\tx\ny\t1\nz\t1\n", [], "2 of 2 IDs in t.tsv are not in in.h5, such as 'y'"),
        ("id\tu\tv\na\t1\t2\n", [], "t.tsv: no column 'x'; choose from 'u', 'v'"),
        ("id,x\na,1\n", [], "t.tsv: its first line has no tab"),
        ("", [], "t.tsv: its first line has no tab"),
        ("id\tx\n", [], "t.tsv: no rows below the header"),
        ("id\tx\na\t1\na\t2\n", [], "t.tsv: line 3: 'a' appears twice"),
        ("id\tw\tx\na\t1\n", [], "t.tsv: line 2 has 2 columns; the header has 3"),
        ("id\tx\na\t1\n", ["-o", "x.pdf"], "x.pdf: unknown file type; use OUT.png, OUT.svg, OUT.html"),
        ("id\tx\na\t1\n", ["--kind", "logits"], "--kind logits: has no vector per sequence"),
        ("id\tx\na\t1\n", ["-o", "there.png"], "there.png: already exists; use --overwrite to replace it"),
        (
            "id\tx\na\t1\n",
            ["-o", "there.png", "--overwrite", "--color", "there.png:x"],
            "would overwrite the input",
        ),
        ("id\tx\na\t1\n", ["--color", "t.tsv"], "'t.tsv' is not TABLE.tsv:COLUMN"),
        ("id\tx\na\t1\n", ["--color", "none.tsv:x"], "none.tsv: no such file"),
    ],
)
def test_what_cannot_be_is_said(
    output: Output, capsys: pytest.CaptureFixture[str], content: str, options: list[str], message: str
) -> None:
    Path("t.tsv").write_text(content)
    Path("there.png").touch()
    assert cli.main(["map", "in.h5", "-o", "x.png", "--color", "t.tsv:x", *options]) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in Path().iterdir()} == {"in.h5", "t.tsv", "there.png"}


def test_two_proteins_are_too_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(file) -> None:
        file["status"][2:] = 2

    write_output(tmp_path / "in.h5", ["mean"], change=fail)
    assert cli.main(["map", str(tmp_path / "in.h5"), "-o", str(tmp_path / "x.png")]) == 2
    assert "at least 3 proteins that were computed; there are 2" in capsys.readouterr().err
