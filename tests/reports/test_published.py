"""What the repository publishes: files that pages name exist, and README quotes the published numbers."""

from __future__ import annotations

import re
from pathlib import Path

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


@pytest.mark.parametrize("size", ["8M", "150M"])
def test_readme_quotes_the_published_ratios_to_openvino(size: str) -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    published = results.read_results(PUBLISHED / "cpu-intel-xeon-2-cores" / f"peers-{size}.json")
    fp32 = {m.info["provider"]: m for m in published.suite("peers") if m.info["dtype"] == "fp32"}
    times = results.ratio(fp32["openvino"], fp32["esm_packed"])
    assert times is not None
    assert times_text(times) in text
