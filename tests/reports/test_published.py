"""What the repository publishes: files that pages name exist, and README quotes the published numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median

import pytest

from esm_packed.reports.speedup import results
from esm_packed.reports.speedup.tables import times_text

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "reports" / "published"
CPU = PUBLISHED / "cpu-amd-epyc-2-cores"


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md", *PUBLISHED.rglob("*.md")], ids=str)
def test_links_lead_to_files(page: str | Path) -> None:
    path = ROOT / page
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing


def test_readme_quotes_the_published_ratios() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    published = results.read_results(CPU / "benchmarks.json")
    rivals = {m.info["provider"]: m for m in published.suite("peers") if m.info["dtype"] == "fp32"}
    quoted = [
        results.ratio(rivals[name], rivals["esm_packed"]) for name in ("transformers", "fair_esm", "esm_cpp")
    ]
    totals = {c.what: c.times for c in results.layout_comparisons(published) if c.workload == "all"}
    for times in (*quoted, totals["packed over padded, FP32"]):
        assert times is not None
        assert times_text(times) in text


@pytest.mark.parametrize("name", ["8M", "35M-fp32", "150M-fp32", "650M"])
def test_readme_quotes_the_published_ratios_in_fp32(name: str) -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    measured = variants_of(f"peers-{name}", "dtype provider")
    for rival in measured.keys() & {"fp32 openvino", "fp32 transformers"}:
        times = results.ratio(measured[rival], measured["fp32 esm_packed"])
        assert times is not None
        assert times_text(times) in text


@pytest.mark.parametrize("name", ["8M", "35M", "150M", "650M"])
def test_bf16_is_quoted_as_published(name: str) -> None:
    page = (PUBLISHED / "README.md").read_text()
    measured = variants_of(f"peers-{name}", "dtype provider")
    own = results.ratio(measured["fp32 esm_packed"], measured["bf16 esm_packed"])
    assert f"in BF16 is {shown(own)} as fast as in FP32" in page
    times = results.ratio(measured["bf16 openvino"], measured["bf16 esm_packed"])
    assert f"| {shown(times)} as fast |" in page
    readme = (ROOT / "README.md").read_text()
    row = next(line for line in readme.splitlines() if line.startswith(f"| {name}, "))
    rivals = measured.keys() & {"bf16 openvino", "bf16 transformers"}
    quoted = [results.ratio(measured[rival], measured["bf16 esm_packed"]) for rival in rivals]
    for times in (*quoted, own):
        assert f"| {shown(times)} |" in row


def test_floors_of_150m_are_quoted() -> None:
    text = " ".join((PUBLISHED / "README.md").read_text().split())
    measured = variants_of("peers-150M-fp32", "provider")
    total = measured["esm_packed"].block_medians
    products, attention = (
        {block: seconds / total[block] for block, seconds in measured[floor].block_medians.items()}
        for floor in ("floor_matmul_best", "floor_attention")
    )
    both = {block: products[block] + attention[block] for block in total}
    first, second, third = (
        f"{median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"
        for shares in (products.values(), attention.values(), both.values())
    )
    assert (
        f"take {first} of esm-packed's time in FP32, attention takes {second}, and both together {third}"
        in text
    )


def test_a_run_with_an_unfair_rival_is_named() -> None:
    text = " ".join((PUBLISHED / "README.md").read_text().split())
    measured = variants_of("peers-35M-fp32-search", "provider")
    openvino, transformers = (
        shown(results.ratio(measured[rival], measured["esm_packed"]))
        for rival in ("openvino", "transformers")
    )
    assert f"OpenVINO {openvino}, transformers {transformers}" in text
    assert measured["transformers"].info["token_budget"] == 4096


def variants_of(name: str, key: str) -> dict[str, results.Measurement]:
    """What a published file measured, by the values of fields."""
    published = results.read_results(PUBLISHED / "cpu-intel-xeon-2-cores" / f"{name}.json")
    return {
        " ".join(str(each.info[field]) for field in key.split()): each
        for each in published.measurements.values()
    }


def shown(times: results.Spread | None) -> str:
    assert times is not None
    text = f"{times.middle:.2f}x"
    return text if times.blocks == 1 else f"{text} ({times.low:.2f} to {times.high:.2f})"


@pytest.mark.parametrize(
    ("name", "key", "ours", "others"),
    [
        ("contacts", "workload provider", f"contacts{n} esm_packed", [f"contacts{n} fair_esm"])
        for n in (100, 500, 1000)
    ]
    + [
        (f"scoring-{size}", "provider token_budget", "esm_packed 906", [
            "esm_packed_every_row 906", "fair_esm 302",
            "transformers 302", "transformers 1208", "transformers 4832",
        ])
        for size in ("8M", "35M")
    ],
)  # fmt: skip
def test_tables_quote_the_published_ratios(name: str, key: str, ours: str, others: list[str]) -> None:
    text = (PUBLISHED / "README.md").read_text()
    variants = variants_of(name, key)
    for other in others:
        assert f"| {shown(results.ratio(variants[other], variants[ours]))} as fast |" in text, other


def test_cores_and_starting_are_quoted() -> None:
    text = (PUBLISHED / "README.md").read_text()
    cores = variants_of("cores", "model provider")
    for size in ("6_8M", "12_35M", "30_150M"):
        threads = cores[f"random:esm2_t{size}_UR50D threads"]
        for provider in ("processes", "packs_at_once"):
            times = results.ratio(threads, cores[f"random:esm2_t{size}_UR50D {provider}"])
            assert f"| {shown(times)} as fast |" in text
    beyond = [
        each["extra_info"]["seconds_beyond_import"]
        for each in json.loads((PUBLISHED / "cpu-intel-xeon-2-cores" / "startup.json").read_text())[
            "benchmarks"
        ]
        if "-embed]" in each["name"]
    ]
    assert f"| {median(beyond):.2f} ({min(beyond):.2f} to {max(beyond):.2f}) |" in text


def test_rates_of_multiplications_are_quoted() -> None:
    text = " ".join((PUBLISHED / "README.md").read_text().split())
    rates: dict[str, list[int]] = {}
    for name in ("8M", "35M", "35M-fp32", "150M", "150M-fp32"):
        content = json.loads((PUBLISHED / "cpu-intel-xeon-2-cores" / f"peers-{name}.json").read_text())
        for library, rate in content["machine_info"]["cpu_matmul_rates"].items():
            rates.setdefault(library, []).append(round(rate / 1e9))
    low, high = ({library: f"{end(values):,}" for library, values in rates.items()} for end in (min, max))
    assert f"{low['MKL FP32']} to {high['MKL FP32']} GFLOP/s through MKL in FP32" in text
    assert f"{low['oneDNN FP32']} to {high['oneDNN FP32']} through oneDNN" in text
    assert f"{low['oneDNN BF16']} to {high['oneDNN BF16']} through oneDNN in BF16" in text
