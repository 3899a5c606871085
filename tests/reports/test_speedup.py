"""The speedup report, on a small file that a CPU run wrote and on a synthetic one in the shape of a GPU run.

`data/cpu_results.json` is as pytest-benchmark wrote it on 2 shared cores of an AMD EPYC; its `machine_info`
has the command. The GPU-like file is made by `gpu_like_results.make`: nobody measured it.
"""

from __future__ import annotations

import builtins
import csv
import importlib.util
import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from esm_packed.reports import page
from esm_packed.reports.page import ReportError
from esm_packed.reports.speedup import figures as speedup_figures
from esm_packed.reports.speedup import results
from esm_packed.reports.speedup import tables as speedup
from esm_packed.reports.speedup.answer import answer
from esm_packed.reports.speedup.page import write_report
from esm_packed.runners.cli import main as cli

CPU_RESULTS = Path(__file__).parent / "data" / "cpu_results.json"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _load_generator() -> Any:
    spec = importlib.util.spec_from_file_location(
        "gpu_like_results", Path(__file__).parent / "gpu_like_results.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GPU_LIKE = _load_generator()


def write_json(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def gpu_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_json(tmp_path_factory.mktemp("results") / "gpu.json", GPU_LIKE.make())


@dataclass(frozen=True)
class Written:
    """A report on disk, and its lines for the terminal."""

    folder: Path
    lines: list[str]


@pytest.fixture(scope="module")
def cpu_report(tmp_path_factory: pytest.TempPathFactory) -> Written:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("cpu")
    return Written(folder, write_report(CPU_RESULTS, [], folder))


@pytest.fixture(scope="module")
def gpu_report(gpu_like: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Of the GPU-like file against one that has nothing in common with it, and against a slower one."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("gpu")
    slower = write_json(folder / "slower.json", GPU_LIKE.make(slower=1.5, seed=1))
    return Written(folder, write_report(gpu_like, [CPU_RESULTS, slower], folder))


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports whose text is looked at hold one small figure in place of each of theirs."""
    figure = pytest.importorskip("matplotlib.figure")
    for name in (
        "speedups",
        "forward_times",
        "rivals",
        "roofline",
        "attention",
        "padding",
        "stages",
        "scaling",
    ):
        monkeypatch.setattr(speedup_figures, name, lambda *_, **__: [figure.Figure((1, 1), dpi=10)])


def check_pictures(folder: Path, names: set[str]) -> None:
    """Every figure is there in both formats, and there is something on it."""
    image = pytest.importorskip("matplotlib.image")
    assert {path.stem for path in folder.glob("*.png")} == names
    assert {path.stem for path in folder.glob("*.svg")} == names
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(PNG_SIGNATURE)
        pixels = image.imread(folder / f"{name}.png")[:, :, :3]
        colored = np.ptp(pixels, axis=2) > 0.2
        assert colored.mean() > 1e-4, f"{name} shows nothing"


def panels(name: str, number: int) -> set[str]:
    return {name, *(f"{name}-{place}" for place in range(2, number + 1))}


def check_page(folder: Path, num_pictures: int) -> str:
    """The page needs no other file, and nothing unknown is printed as None or nan."""
    text = (folder / "speedup.html").read_text()
    sources = re.findall(r'src="([^"]{20})', text)
    assert len(sources) == num_pictures
    assert all(source.startswith("data:image/svg+xml") for source in sources)
    assert "<link" not in text
    assert "<script" not in text
    for report in (text, (folder / "speedup.md").read_text()):
        assert not re.search(r">(None|nan)<|\| (None|nan) \|", report)
    return text


def test_a_cpu_run(cpu_report: Written) -> None:
    names = {"speedups", "speedups-2", "forward", "rivals", "attention", "packing", "stages"}
    check_pictures(cpu_report.folder, names)
    text = check_page(cpu_report.folder, len(names))
    machine = json.loads(CPU_RESULTS.read_text())["machine_info"]
    for shown in (machine["cpu_model"], machine["torch"], machine["git_commit"], "pytest benchmarks"):
        assert shown in text
    assert "AuthenticAMD, family 26, model 2" in text
    assert "avx512_bf16" in text
    assert re.search(r"This is a small trial of \d+ proteins", text)
    assert "peak memory" not in text  # a CPU run knows none
    assert any("packed over padded, FP32" in line for line in cpu_report.lines)
    with (cpu_report.folder / "measurements.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results.read_results(CPU_RESULTS).measurements)
    assert {row["peak_memory_bytes"] for row in rows} == {""}
    assert all(float(row["seconds_p20"]) <= float(row["seconds_median"]) for row in rows)


@pytest.mark.slow  # 11 s with the report that it shares
def test_a_gpu_like_file_and_an_older_one(gpu_report: Written) -> None:
    num_models = len(GPU_LIKE.MODELS)
    names = {"attention", "stages", "scaling"} | panels("roofline", 2) | panels("packing", 4)
    names |= panels("speedups", 2 * num_models) | panels("forward", num_models) | panels("rivals", num_models)
    check_pictures(gpu_report.folder, names | {"change-2"})
    text = check_page(gpu_report.folder, len(names) + 1)
    assert "peak memory" in text
    assert "faesm in fp16: synthetic" in text


def test_the_answer_comes_first_and_the_conditions_last(cpu_report: Written) -> None:
    page = (cpu_report.folder / "speedup.html").read_text()
    top = page.partition("<h2>")[0]
    assert "as fast as" in top and "Packed batches are" in top and "Speed compared with FP32" in top
    assert top.count("<img ") == 1 and "Tokens per second of each contender" in top
    headings = re.findall(r"<h2>(.+)</h2>", page)
    assert headings[0] == "Compared with other packages" and headings[-1] == "Conditions"


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("gpu", ["SYNTHETIC GPU", None])
def test_kernels_of_a_cpu_run_are_folded(tmp_path: Path, gpu: str | None) -> None:
    content = GPU_LIKE.make()
    kept = [each for each in content["benchmarks"] if each["extra_info"]["suite"] == "kernels"][:5]
    machine = content["machine_info"] | {"gpu": gpu}
    path = write_json(tmp_path / "x.json", content | {"benchmarks": kept, "machine_info": machine})
    write_report(path, [], tmp_path)
    kernels = (tmp_path / "speedup.html").read_text().partition("Kernels</h2>")[2].partition("<h2>")[0]
    assert ("<details>" in kernels.partition("<table>")[0]) == (gpu is None)
    assert ("<img " in kernels) == (gpu is not None)


def test_the_answer_quotes_the_ratios(gpu_like: Path) -> None:
    found = results.read_results(gpu_like)
    text = answer(found)
    rivals = {
        m.info["provider"]: m
        for m in found.suite("peers")
        if results.short_model(m.info["model"]) == "650M" and m.info["dtype"] == "fp16"
    }
    for name, shown in (("fair_esm", "fair-esm"), ("transformers", "transformers")):
        times = results.ratio(rivals[name], rivals["esm_packed"])
        assert times is not None
        assert f"{speedup.times_text(times)} as fast as {shown}" in text
    totals = {c.what: c.times for c in results.precision_comparisons(found) if c.workload == "all"}
    assert f"FP16 {speedup.times_text(totals['FP16 over FP32, packed'])} (expected" in text
    assert text.count("esm-packed as transformers") == 0


@pytest.mark.parametrize(("suites", "sentences"), [({"peers"}, 1), ({"model"}, 2), ({"kernels"}, 0)])
def test_the_answer_has_a_sentence_for_what_was_measured(
    tmp_path: Path, suites: set[str], sentences: int
) -> None:
    content = GPU_LIKE.make()
    content["benchmarks"] = [b for b in content["benchmarks"] if b["extra_info"]["suite"] in suites]
    text = answer(results.read_results(write_json(tmp_path / "x.json", content)))
    assert len(re.findall(r"\.(?= |$)", text)) == sentences


def test_no_label_touches_a_whisker_or_leaves_the_axes() -> None:
    pytest.importorskip("matplotlib")
    with page.figure_style():
        (figure,) = speedup_figures.rivals(results.read_results(CPU_RESULTS))
        figure.draw_without_rendering()
    (axes,) = figure.axes
    (bars,) = (container for container in axes.containers if hasattr(container, "errorbar"))
    whiskers = bars.errorbar[2]
    ends = [
        axes.transData.transform(segment).max(axis=0)[0]
        for whisker in whiskers
        for segment in whisker.get_segments()
    ]
    boxes = [text.get_window_extent() for text in axes.texts]
    rates = boxes[1::2]
    assert len(rates) == len(ends) > 3
    assert all(box.x0 > end + 2 for box, end in zip(rates, ends, strict=True))
    assert all(box.x1 < figure.bbox.x1 for box in boxes)
    assert not any(box.count_overlaps([other for other in boxes if other is not box]) for box in boxes)


def test_medians_and_percentiles_are_those_of_all_rounds() -> None:
    raw = json.loads(CPU_RESULTS.read_text())["benchmarks"]
    found = results.read_results(CPU_RESULTS)
    for measurement in found.suite("model"):
        names = ("model", "workload", "dtype", "layout", "token_budget")
        own = [
            entry
            for entry in raw
            if entry["extra_info"]["suite"] == "model"
            and all(entry["extra_info"][name] == measurement.info[name] for name in names)
        ]
        assert len(own) == len(measurement.blocks) == 2
        rounds = [second for entry in own for second in entry["stats"]["data"]]
        assert measurement.seconds.middle == pytest.approx(median(rounds))
        assert measurement.seconds.low == pytest.approx(np.quantile(rounds, 0.2))
        assert measurement.seconds.high == pytest.approx(np.quantile(rounds, 0.8))
        tokens = own[0]["extra_info"]["useful_tokens"]
        assert measurement.rate("useful_tokens") == pytest.approx(tokens / median(rounds))


def test_ratios_are_formed_within_a_block(tmp_path: Path, gpu_like: Path) -> None:
    """When the machine is four times as slow in one block, ratios stay what they are."""
    content = GPU_LIKE.make()
    for entry in content["benchmarks"]:
        if entry["extra_info"]["block"] == 2:
            entry["stats"]["data"] = [4 * second for second in entry["stats"]["data"]]
    disturbed = write_json(tmp_path / "disturbed.json", content)
    for compare in (results.precision_comparisons, results.layout_comparisons, results.combined_comparisons):
        before, after = compare(results.read_results(gpu_like)), compare(results.read_results(disturbed))
        assert len(before) == len(after) > 0
        for one, other in zip(before, after, strict=True):
            assert one.what == other.what
            if one.workload != "all":
                assert other.times.middle == pytest.approx(one.times.middle)


def test_comparisons_find_the_ratios_that_were_put_in(gpu_like: Path) -> None:
    found = results.read_results(gpu_like)
    by_name = {(c.what, c.model, c.workload): c.times.middle for c in results.precision_comparisons(found)}
    for model in GPU_LIKE.MODELS:
        for dtype in ("tf32", "fp16", "bf16"):
            for workload in [*GPU_LIKE.WORKLOADS, "all"]:
                times = by_name[f"{dtype.upper()} over FP32, packed", model, workload]
                assert times == pytest.approx(1 / GPU_LIKE.TIMES_FP32[dtype], rel=0.06)
    for comparison in results.layout_comparisons(found):
        if comparison.workload != "all":
            wanted = 1 / (1 - GPU_LIKE.WORKLOADS[comparison.workload])
            assert comparison.times.middle == pytest.approx(wanted, rel=0.06)
    wastes = [1 / (1 - padding) for padding in GPU_LIKE.WORKLOADS.values()]
    total = next(c for c in results.layout_comparisons(found) if c.workload == "all")
    assert total.times.middle == pytest.approx(np.mean(wastes), rel=0.05)
    larger = "FP16 over FP32, packed, packs of 65,536"
    assert any(name == larger for name, _, _ in by_name)


def test_changes_are_marked_only_outside_the_spread(tmp_path: Path, gpu_like: Path) -> None:
    older = results.read_results(gpu_like)
    assert {change.mark for change in results.changes(older, older)} == {""}

    again = results.read_results(write_json(tmp_path / "again.json", GPU_LIKE.make(seed=7)))
    assert {change.mark for change in results.changes(again, older)} == {""}

    slower = results.read_results(write_json(tmp_path / "slower.json", GPU_LIKE.make(slower=1.5, seed=1)))
    for change in results.changes(slower, older):
        info = change.measurement.info
        is_slower = (
            info["dtype"] == "fp16"
            and info["provider"] == "esm_packed"
            and info["suite"] in ("model", "peers")
        )
        assert change.mark == ("slower" if is_slower else "")
    assert "faster" in {change.mark for change in results.changes(older, slower)}


def test_one_block_gives_no_mark(tmp_path: Path) -> None:
    old, new = GPU_LIKE.make(), GPU_LIKE.make(slower=3.0)
    for content in (old, new):
        content["benchmarks"] = [
            entry for entry in content["benchmarks"] if entry["extra_info"]["block"] == 0
        ]
    files = [results.read_results(write_json(tmp_path / f"{i}.json", c)) for i, c in enumerate((new, old))]
    assert {change.mark for change in results.changes(*files)} == {""}


@pytest.mark.usefixtures("no_drawing")
def test_an_older_file_without_common_benchmarks(tmp_path: Path, gpu_like: Path) -> None:
    """Equal names do not make equal work: the GPU-like file counts other tokens."""
    small, large = results.read_results(CPU_RESULTS), results.read_results(gpu_like)
    assert small.measurements.keys() & large.measurements.keys()
    assert results.changes(small, large) == []
    write_report(CPU_RESULTS, [gpu_like], tmp_path / "report")
    text = (tmp_path / "report" / "speedup.md").read_text()
    assert "benchmarks in both files did other work (tokens, sequences). None can be compared." in text
    assert not (tmp_path / "report" / "change-1.png").exists()


def test_the_files_published_before_are_read(tmp_path: Path) -> None:
    """They have none of the later fields."""
    published = sorted((Path(__file__).parents[2] / "reports" / "published").rglob("peers-*.json"))
    assert published
    for path in published:
        assert results.read_results(path).measurements


def test_rivals_are_compared_in_their_own_precision(gpu_like: Path) -> None:
    table = speedup.rivals_table(results.read_results(gpu_like))
    column = list(table.headers).index("esm-packed is")
    rows = {row[2]: row[column] for row in table.rows if row[0] == "650M"}
    assert rows["esm-packed, FP16"] == ""
    assert float(rows["fair-esm, FP32"].partition("x")[0]) == pytest.approx(1.9, rel=0.06)
    assert float(rows["fair-esm, FP16"].partition("x")[0]) == pytest.approx(0.5 / 0.12, rel=0.06)


def test_scaling_is_over_the_fewest_workers(gpu_like: Path) -> None:
    table = speedup.scaling_table(results.read_results(gpu_like))
    rows = {(row[0], row[1]): row for row in table.rows}
    assert rows["ray 650M uniref", "1"][4] == "1.00x"
    assert float(rows["ray 650M uniref", "8"][4].rstrip("x")) == pytest.approx(8**0.96, rel=0.06)


def test_kernel_shares_use_the_times_of_single_launches(tmp_path: Path) -> None:
    """A round holds many launches; `round_seconds` are those of one."""
    content = GPU_LIKE.make()
    for entry in content["benchmarks"]:
        if entry["extra_info"]["suite"] == "kernels":
            entry["extra_info"]["round_seconds"] = entry["stats"]["data"]
            entry["stats"]["data"] = [100 * second for second in entry["stats"]["data"]]
    found = results.read_results(write_json(tmp_path / "a.json", content))
    ours = [
        m
        for m in found.suite("kernels")
        if m.info["operation"] == "layer_norm" and m.info["provider"] == "ours"
    ]
    assert results.achieved(ours[0]) / ours[0].info["ceiling_per_second"] == pytest.approx(0.9, rel=0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "not a result of pytest benchmarks"),
        ("[]", "not a result of pytest benchmarks"),
        ('{"benchmarks": [{"name": "a"}]}', "not a result of pytest benchmarks"),
        ('{"benchmarks": []}', "contains no benchmark"),
    ],
)
def test_what_is_no_result_file_is_refused_in_one_line(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ReportError, match=message) as error:
        results.read_results(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, gpu_like: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "taken").write_text("")
    with pytest.raises(ReportError, match=r"taken.*exists"):
        write_report(gpu_like, [], tmp_path / "taken")


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, gpu_like: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return genuine(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ReportError, match=re.escape("pip install 'matplotlib>=3.8'")):
        write_report(gpu_like, [], tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.usefixtures("no_drawing")
def test_the_command(tmp_path: Path, gpu_like: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", "speedup", str(CPU_RESULTS), str(gpu_like), "-o", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert f"report written to {tmp_path / 'out' / 'speedup.html'}" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"benchmarks": []}'])
def test_what_is_no_result_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["report", "speedup", str(path), "-o", str(tmp_path / "out")]) == 2
    assert "results.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_table_cells_are_escaped() -> None:
    table = page.Table(("a|b", "c"), [["<1", "x|y & z"]])
    assert "&lt;1" in table.html()
    assert "x|y &amp; z" in table.html()
    assert r"x\|y & z" in table.markdown()
    assert table.csv() == "a|b,c\n<1,x|y & z\n"


def test_missing_values_leave_no_column() -> None:
    found = results.read_results(CPU_RESULTS)
    assert "peak memory" not in speedup.forward_table(found).headers
    content = deepcopy(dict(next(iter(found.suite("model"))).info))
    assert content["peak_memory_bytes"] is None
    assert content["launches"] is None


def test_the_record_of_the_median_block_stands_for_a_variant(tmp_path: Path) -> None:
    """Stages and errors come from it, and the rates of the spreadsheet from the median of all times."""
    content = GPU_LIKE.make()
    kept = [each for each in content["benchmarks"] if each["extra_info"]["suite"] == "end_to_end"]
    own = [each for each in kept if each["params"] | {"block": 0} == kept[0]["params"]]
    for number, each in enumerate(own):
        seconds = [3.0, 1.0, 2.0, 5.0, 4.0][number]
        each["extra_info"] |= {"seconds": seconds, "tokens_per_second": 100 / seconds, "useful_tokens": 100}
        each["extra_info"]["stages"] = dict.fromkeys(each["extra_info"]["stages"], seconds)
        each["stats"]["data"] = [seconds]
    path = write_json(tmp_path / "x.json", content | {"benchmarks": own})
    found = results.read_results(path)
    (measurement,) = found.suite("end_to_end")
    middle = sorted(each["extra_info"]["seconds"] for each in own)[(len(own) - 1) // 2]
    assert set(measurement.info["stages"].values()) == {middle}
    path = write_json(tmp_path / "two_blocks.json", content | {"benchmarks": own[:2]})
    (row,) = speedup.measurement_rows(results.read_results(path))
    assert row["seconds_median"] == 2.0  # between the blocks' 3 and 1
    assert row["tokens_per_second"] == pytest.approx(100 / 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda benchmark: benchmark["stats"].update(data=[]), "has an invalid time"),
        (lambda benchmark: benchmark["stats"].update(data=[0.0]), "has an invalid time"),
        (lambda benchmark: benchmark["extra_info"].pop("model", None), "lacks what the report needs"),
        (lambda benchmark: benchmark["extra_info"].pop("dtype", None), "lacks what the report needs"),
    ],
)
def test_a_damaged_record_is_named(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    content = GPU_LIKE.make()
    for benchmark in content["benchmarks"]:
        change(benchmark)
    with pytest.raises(ReportError, match=message):
        write_report(write_json(tmp_path / "x.json", content), [], tmp_path / "report")


@pytest.mark.usefixtures("no_drawing")
def test_suites_without_a_section_are_listed(tmp_path: Path) -> None:
    published = Path(__file__).parents[2] / "reports" / "published" / "cpu-amd-epyc-2-cores"
    write_report(published / "runner-merge.json", [], tmp_path)
    assert "| runner | merge copy |" in (tmp_path / "speedup.md").read_text()


def test_reproducible_mode_is_compared(gpu_like: Path) -> None:
    found = results.reproducible_comparisons(results.read_results(gpu_like))
    times = {c.what: c.times.middle for c in found if c.model == next(iter(GPU_LIKE.MODELS))}
    assert times == {
        "packs of one size, over packed, FP16": pytest.approx(1 / 1.02, rel=0.05),
        "packs of one size, as CUDA graphs, over packed, FP16": pytest.approx(1 / 0.8, rel=0.05),
        "packs of one size, as CUDA graphs, over the same, launched one by one, FP16": pytest.approx(
            1.02 / 0.8, rel=0.05
        ),
    }


def test_operations_saved_stand_beside_the_speedup(gpu_like: Path) -> None:
    found = results.read_results(gpu_like)
    table = speedup.comparison_table(results.layout_comparisons(found))
    column = list(table.headers).index("fewer operations")
    times = {row[2]: row[column] for row in table.rows if row[0] == "packed over padded, FP16"}
    assert times == {
        **{workload: f"{1 / (1 - padding):.2f}x" for workload, padding in GPU_LIKE.WORKLOADS.items()},
        "all": f"{np.mean([1 / (1 - padding) for padding in GPU_LIKE.WORKLOADS.values()]):.2f}x",
    }


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(("load", "is_warned"), [(2.0, False), (3.4, True)])
def test_a_load_above_the_cores_stands_at_the_top(tmp_path: Path, load: float, is_warned: bool) -> None:
    content = json.loads(CPU_RESULTS.read_text())
    content["machine_info"]["load_average"] = load
    lines = write_report(write_json(tmp_path / "x.json", content), [], tmp_path)
    text = "The load of the machine reached 3.4 on 2 cores"
    page, markdown = (tmp_path / "speedup.html").read_text(), (tmp_path / "speedup.md").read_text()
    for report in (page, markdown, "\n".join(lines)):
        assert (text in report) == is_warned
    if is_warned:
        assert page.index(text) < page.index("<h2>") and markdown.index(text) < markdown.index("## ")


@pytest.mark.usefixtures("no_drawing")
def test_a_share_above_all_is_explained(tmp_path: Path) -> None:
    for name, share in (("below", 0.9), ("above", 1.2)):
        content = GPU_LIKE.make()
        for each in content["benchmarks"]:
            if each["extra_info"]["suite"] == "model":
                each["extra_info"]["share_of_floor"] = share
        write_report(write_json(tmp_path / "x.json", content), [], tmp_path / name)
        text = (tmp_path / name / "speedup.md").read_text()
        assert ("A share above 100%" in text) == (name == "above")


@pytest.mark.slow
def test_the_expectation_is_marked_on_a_gpu_only(cpu_report: Written, gpu_report: Written) -> None:
    assert any(
        "FP16 over FP32, packed: " in line and "expected 1.5x to 1.8x: above" in line
        for line in gpu_report.lines
    )
    assert "| expected 1.5x to 1.8x |" in (gpu_report.folder / "speedup.md").read_text()
    assert "1.5x to 1.8x" in (gpu_report.folder / "speedups.svg").read_text()
    assert "1.8x" not in "\n".join(cpu_report.lines) + (cpu_report.folder / "speedup.md").read_text()
    assert "1.5x to 1.8x" not in (cpu_report.folder / "speedups.svg").read_text()
