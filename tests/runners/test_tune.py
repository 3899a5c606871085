from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from esm_packed import kernels
from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.errors import UsageError
from esm_packed.kernels import launch
from esm_packed.kernels.cases import Arguments
from esm_packed.kernels.launch import Settings
from esm_packed.kernels.timing import num_buffers
from esm_packed.numerics import PRECISIONS
from esm_packed.runners import tune
from esm_packed.runners.cli import main as cli
from esm_packed.runners.tune import Outcome
from esm_packed.runners.tuning_attention import order_backends
from esm_packed.runners.tuning_problems import TuningProblem, problems, sample_lengths
from esm_packed.runners.tuning_trials import SCREENING_ROUNDS, Timer, Trial, time_in_turns
from esm_packed.runners.watch.console import Console

CONFIG = ESM2Config(num_layers=1, hidden_size=64, num_heads=2)
GPU = "NVIDIA H200 (test)"
TRITON = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
TOKENS = 12
FACTS = {"gpu": GPU, "tokens": TOKENS, "triton": TRITON}
QUIET = Console(quiet=True)
FUSED = ["gemm_bias_gelu", "linear_gelu", "gemm_bias_rotary", "linear_rotary"]
"""In tuning's order."""


class FakeTimer:
    """Launches every trial, and takes what `microseconds` says for its time."""

    def __init__(self, microseconds: Callable[[Settings | None], float]) -> None:
        self.microseconds = microseconds
        self.timed: list[Settings | None] = []

    def __call__(self, trials: Sequence[Trial], rounds: int, /) -> list[float]:
        for trial in trials:
            trial.restore()
            trial.launch()
        settings = [trial.settings for trial in trials if not isinstance(trial.settings, str)]
        self.timed += settings
        return [self.microseconds(tried) for tried in settings]


@pytest.fixture
def tuned(triton_device: torch.device) -> Iterator[dict[str, Settings]]:
    """The live settings, as they were again afterward."""
    live = launch.tuned_settings(triton_device)
    before = dict(live)
    live.clear()
    yield live
    live.clear()
    live.update(before)


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for tuned settings; every CUDA device is called `GPU`."""
    monkeypatch.setattr(launch, "CONFIG_DIRECTORY", tmp_path / "configs")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    return tmp_path / "configs"


def problem_of(kernel: str, device: torch.device, precision: str = "fp16") -> TuningProblem:
    found = problems([CONFIG], [PRECISIONS[precision]], TOKENS, device)
    return next(problem for problem in found if problem.key.startswith(f"{kernel}/"))


def search(problem: TuningProblem, tuned: dict[str, Settings], timer: Timer) -> Outcome:
    return tune.search(problem, tuned, timer, lambda num_bytes: 2)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", "tf32"])
def test_every_kernel_of_a_precision_is_searched(precision: str, triton_device: torch.device) -> None:
    keys = [problem.key for problem in problems([CONFIG], [PRECISIONS[precision]], TOKENS, triton_device)]
    half = precision in ("fp16", "bf16")
    expected = {
        "embed_tokens", "layer_norm", "add_layer_norm_", "rotary_qk_", "bias_gelu_",
        "segment_mean", "segment_max", "add_attention_maps_",
        *({"fp32": ["packed_attention", "packed_attention_tf32x3"], "tf32": ["packed_attention_tf32"]}
          .get(precision, ["packed_attention", *FUSED])),
    }  # fmt: skip
    assert {key.split("/")[0] for key in keys} == expected
    assert ("bias_gelu_/256/float16" in keys) == (precision == "fp16")
    assert "layer_norm/64/float32" in keys  # of the residual stream, in every mode
    order = list(dict.fromkeys(key.split("/")[0] for key in keys))
    assert order[0].startswith("packed_attention")
    if half:
        assert order[:5] == ["packed_attention", *FUSED[:2], "add_layer_norm_", "bias_gelu_"]
        assert order[5:8] == ["rotary_qk_", *FUSED[2:]]


@pytest.mark.parametrize(
    "precision",
    ["fp16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp32", "bf16", "tf32"))],  # 3 s each
)
def test_inputs_suit_their_kernel(
    precision: str, triton_device: torch.device, tuned: dict[str, Settings]
) -> None:
    work = [
        replace(problem, candidates=problem.candidates[:1])
        for problem in problems([CONFIG], [PRECISIONS[precision]], TOKENS, triton_device)
    ]
    timer = FakeTimer(lambda settings: 1.0 if settings in [p.candidates[-1] for p in work] else 2.0)
    waited: list[int] = []
    outcomes = tune.search_all(
        work, tuned, timer, lambda num_bytes: 1, lambda outcome: None, QUIET, compiled=waited.append
    )
    assert waited == list(range(len(work)))
    assert [outcome.key for outcome in outcomes] == [problem.key for problem in work]
    for problem, outcome in zip(work, outcomes, strict=True):
        assert outcome.dropped == 0, outcome
        assert outcome.settings == problem.candidates[-1]
        assert (outcome.heuristic_us, outcome.tuned_us, outcome.gain) == (2.0, 1.0, 0.5)
    assert tuned == {problem.key: problem.candidates[-1] for problem in work}


def test_models_and_modes_that_share_a_kernel_tune_it_once(triton_device: torch.device) -> None:
    wide = ESM2Config(num_layers=1, hidden_size=128, num_heads=4)
    modes = [PRECISIONS[name] for name in ("fp16", "fp32", "tf32")]
    keys = [problem.key for problem in problems([CONFIG, wide], modes, TOKENS, triton_device)]
    assert len(keys) == len(set(keys))
    assert [key for key in keys if key.startswith("packed_attention/")] == [
        "packed_attention/32/float16",
        "packed_attention/32/float32",
    ]
    assert {key for key in keys if key.startswith("layer_norm/64")} == {
        "layer_norm/64/float32",
        "layer_norm/64/float16",
    }


@pytest.mark.parametrize("precision", ["fp16", "fp32", "tf32"])
def test_gpus_before_sm_80_tune_what_they_run(
    precision: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There attention is SDPA's, and fc1 is never fused."""
    monkeypatch.setattr(launch, "capability", lambda device: 75)
    names = {
        problem.case.name for problem in problems([CONFIG], [PRECISIONS[precision]], TOKENS, triton_device)
    }
    assert names == {
        "embed_tokens", "layer_norm", "add_layer_norm_", "rotary_qk_", "bias_gelu_",
        "segment_mean", "segment_max"
    }  # fmt: skip


def test_candidates_that_fail_or_compute_wrong_numbers_are_dropped(
    triton_device: torch.device, tuned: dict[str, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.errors import OutOfResources

    problem = problem_of("layer_norm", triton_device)
    subtle, unwritten, too_large, uncompiled, best, *_ = problem.candidates
    right = kernels.layer_norm

    def sometimes_wrong(**arguments: Any) -> torch.Tensor:
        settings = tuned.get(problem.key)
        if settings == too_large:
            raise OutOfResources(300_000, 232_448, "shared memory")
        if settings == uncompiled:
            raise RuntimeError("PassManager::run failed")
        if settings == unwritten:
            return torch.full_like(arguments["hidden_states"], torch.nan, dtype=arguments["weight"].dtype)
        out = right(**arguments)
        if settings == subtle:
            out[-1, -1] += 0.1
        return out

    monkeypatch.setattr(kernels, "layer_norm", sometimes_wrong)
    order = [subtle, unwritten, too_large, uncompiled, best]
    timer = FakeTimer(lambda settings: 1.0 + order.index(settings) if settings in order else 9.0)
    tuned["another/1/float16"] = {"BLOCK": 7}
    outcome = search(problem, tuned, timer)
    assert outcome == Outcome(problem.key, best, 9.0, 5.0, len(problem.candidates), 4)
    assert not [settings for settings in order[:4] if settings in timer.timed]
    assert tuned == {"another/1/float16": {"BLOCK": 7}, problem.key: best}


@pytest.mark.parametrize("kernel", ["embed_tokens", "rotary_qk_", "add_layer_norm_", "segment_mean"])
def test_every_output_is_checked(
    kernel: str, triton_device: torch.device, tuned: dict[str, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is modified in place, and integers."""
    problem = problem_of(kernel, triton_device)
    right = getattr(kernels, kernel)
    spoiled = {"embed_tokens": "out1", "rotary_qk_": "qkv", "add_layer_norm_": "residual"}

    def spoil(**arguments: Any) -> Any:
        returned = right(**arguments)
        if tuned.get(problem.key) == problem.candidates[0]:
            results = problem.case.results(lambda **_: returned, arguments)
            results[spoiled.get(kernel, "out0")].view(-1)[-1:].add_(1)
        return returned

    monkeypatch.setattr(kernels, kernel, spoil)
    problem = replace(problem, candidates=problem.candidates[:2])
    assert search(problem, tuned, FakeTimer(lambda settings: 1.0)).dropped == 1


def test_in_place_kernels_begin_every_timing_with_fresh_buffers(
    triton_device: torch.device, tuned: dict[str, Settings]
) -> None:
    problem = problem_of("add_layer_norm_", triton_device)
    made: list[Arguments] = []
    original = problem.arguments

    def arguments() -> Arguments:
        made.append(original())
        return made[-1]

    def timer(trials: Sequence[Trial], rounds: int, /) -> list[float]:
        assert {trial.launches for trial in trials} == {3}
        for trial in trials:
            for _ in range(4):
                trial.launch()
            trial.restore()
            for buffer in made:
                assert torch.equal(buffer["residual"], original()["residual"])
        return [1.0] * len(trials)

    problem = replace(problem, arguments=arguments, candidates=problem.candidates[:1])
    sizes = []
    tune.search(problem, tuned, timer, lambda num_bytes: sizes.append(num_bytes) or 3)  # type: ignore[func-returns-value]
    # FP16 delta, weight, bias and result, FP32 residual.
    assert sizes == [TOKENS * 64 * (2 + 4 + 2) + 2 * 64 * 2]
    assert len({buffer["residual"].data_ptr() for buffer in made}) == 4


@pytest.mark.parametrize(("tuned_us", "kept"), [(97.9, True), (98.0, False), (130.0, False)])
def test_settings_are_kept_for_a_gain_of_over_two_percent(
    tuned_us: float, kept: bool, triton_device: torch.device, tuned: dict[str, Settings]
) -> None:
    problem = problem_of("bias_gelu_", triton_device)
    problem = replace(problem, candidates=problem.candidates[:2])
    tuned[problem.key] = {"BLOCK_T": 2, "BLOCK_N": 128, "num_warps": 1}  # of an earlier run
    outcome = search(problem, tuned, FakeTimer(lambda settings: tuned_us if settings else 100.0))
    assert tuned == ({problem.key: problem.candidates[0]} if kept else {})
    assert outcome.settings == tuned.get(problem.key)
    assert (outcome.heuristic_us, outcome.tuned_us) == (100.0, tuned_us if kept else 100.0)


def test_a_heuristic_that_fails_gives_way_to_what_works(
    triton_device: torch.device, tuned: dict[str, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of("segment_mean", triton_device)
    right = kernels.segment_mean

    def fails_untuned(**arguments: Any) -> torch.Tensor:
        if problem.key not in tuned:
            raise RuntimeError("out of registers")
        return right(**arguments)

    monkeypatch.setattr(kernels, "segment_mean", fails_untuned)
    problem = replace(problem, candidates=problem.candidates[:2])
    outcome = search(problem, tuned, FakeTimer(lambda settings: 3.0))
    assert outcome == Outcome(problem.key, problem.candidates[0], None, 3.0, 2, 0)
    assert outcome.gain is None

    outcome = search(replace(problem, candidates=[]), tuned, FakeTimer(lambda settings: 3.0))
    assert outcome == Outcome(problem.key, None, None, None, 0, 0)
    assert tuned == {}
    assert "failed" in "\n".join(tune.summary([outcome]))


def test_luck_in_the_first_rounds_does_not_decide(
    triton_device: torch.device, tuned: dict[str, Settings]
) -> None:
    problem = problem_of("bias_gelu_", triton_device)
    lucky, steady, *_ = problem.candidates

    def timer(trials: Sequence[Trial], rounds: int, /) -> list[float]:
        first = rounds == SCREENING_ROUNDS
        times = {json.dumps(lucky): 1.0 if first else 9.0, json.dumps(steady): 2.0, "null": 8.0}
        return [times.get(json.dumps(trial.settings), 7.0) for trial in trials]

    assert search(problem, tuned, timer).settings == steady


def test_an_interrupted_run_leaves_everything_whole(
    triton_device: torch.device, tuned: dict[str, Settings], configs: Path
) -> None:
    configs.mkdir()
    path = launch.config_path(GPU)
    first, second = (
        replace(problem_of(kernel, triton_device), candidates=[settings])
        for kernel, settings in (
            ("bias_gelu_", {"BLOCK_T": 4, "BLOCK_N": 256, "num_warps": 4}),
            ("segment_mean", {"BLOCK_T": 16, "BLOCK_N": 64, "num_warps": 4}),
        )
    )
    tuned[second.key] = {"BLOCK_T": 8, "BLOCK_N": 64, "num_warps": 2}

    def timer(trials: Sequence[Trial], rounds: int, /) -> list[float]:
        trials[-1].launch()
        if second.key in tuned and tuned[second.key] == second.candidates[0]:
            raise cli.Interrupted("SIGTERM")
        return [2.0 if trial.settings is None else 1.0 for trial in trials]

    with pytest.raises(cli.Interrupted):
        tune.search_all(
            [first, second],
            tuned,
            timer,
            lambda _: 1,
            lambda found: tune.save_outcome(path, FACTS, found),
            QUIET,
        )
    assert tuned == {
        first.key: first.candidates[0],
        second.key: {"BLOCK_T": 8, "BLOCK_N": 64, "num_warps": 2},
    }
    assert json.loads(path.read_text())["settings"] == {first.key: first.candidates[0]}
    assert [entry.name for entry in configs.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_file(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs.mkdir()
    path = launch.config_path(GPU)
    tune.save_outcome(path, FACTS, Outcome("a/1/float16", {"BLOCK": 1}, 2.0, 1.0, 1, 0))
    before = path.read_bytes()

    def full(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(text.encode()[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        tune.save_outcome(path, FACTS, Outcome("b/1/float16", {"BLOCK": 1}, 2.0, 1.0, 1, 0))
    assert path.read_bytes() == before
    assert [entry.name for entry in configs.iterdir()] == [path.name]


def test_the_time_limit_ends_the_search_between_kernels(
    triton_device: torch.device, tuned: dict[str, Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    work = problems([CONFIG], [PRECISIONS["fp16"]], TOKENS, triton_device)
    work = [replace(problem, candidates=[]) for problem in work]
    timer, saved = FakeTimer(lambda settings: 1.0), list[Outcome]()
    outcomes = tune.search_all(work, tuned, timer, lambda _: 1, saved.append, Console(), time_limit=0)
    assert [outcome.key for outcome in outcomes] == [outcome.key for outcome in saved] == [work[0].key]
    err = capsys.readouterr().err
    assert f"1/{len(work)} {work[0].key}" in err
    assert f"stopped by the time limit after 1 of {len(work)} kernels" in err


def test_a_kernel_too_large_for_the_memory_is_left_out(
    triton_device: torch.device, tuned: dict[str, Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted() -> Arguments:
        raise torch.OutOfMemoryError("CUDA out of memory")

    first, second = problems([CONFIG], [PRECISIONS["fp16"]], TOKENS, triton_device)[:2]
    work = [replace(first, arguments=exhausted), replace(second, candidates=[])]
    timer = FakeTimer(lambda settings: 1.0)
    outcomes = tune.search_all(work, tuned, timer, lambda _: 1, lambda outcome: None, Console())
    assert [outcome.key for outcome in outcomes] == [second.key]
    assert f"{first.key}: unchanged" in capsys.readouterr().err


def test_settings_are_merged_and_launches_read_them(configs: Path) -> None:
    configs.mkdir()
    path = launch.config_path(GPU)
    for outcome in (
        Outcome("layer_norm/320/float32", {"BLOCK_T": 2, "num_warps": 4}, 10.0, 8.0, 14, 1),
        Outcome("bias_gelu_/1280/float16", {"BLOCK_T": 1, "num_warps": 4}, 10.0, 8.0, 14, 0),
        Outcome("layer_norm/320/float32", {"BLOCK_T": 4, "num_warps": 4}, 10.0, 7.0, 14, 2),
        Outcome("bias_gelu_/1280/float16", None, 10.0, 10.0, 14, 3),
    ):
        tune.save_outcome(path, FACTS, outcome)
    read = launch.tuned_settings.__wrapped__(torch.device("cuda", 0))
    assert read == {"layer_norm/320/float32": {"BLOCK_T": 4, "num_warps": 4}}
    content = json.loads(path.read_text())
    assert {name: content[name] for name in FACTS} == FACTS
    path.write_text(json.dumps(content | {"triton": "2.1.0"}))
    with pytest.warns(UserWarning, match=r"was tuned with Triton 2\.1\.0, not"):
        assert launch.tuned_settings.__wrapped__(torch.device("cuda", 0)) == {}
    assert content["measured"] == {
        "layer_norm/320/float32": {
            "heuristic_us": 10.0,
            "tuned_us": 7.0,
            "gain": 0.3,
            "candidates": 14,
            "dropped": 2,
        },
        "bias_gelu_/1280/float16": {
            "heuristic_us": 10.0,
            "tuned_us": 10.0,
            "gain": 0.0,
            "candidates": 14,
            "dropped": 3,
        },
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a file of tuned settings"),
        ("[]", "not a file of tuned settings"),
        ('{"settings": {}}', "not a file of tuned settings"),
        ("[" * 100_000, "not a file of tuned settings"),
        ('{"gpu": "NVIDIA A100", "settings": {}, "measured": {}}', "of NVIDIA A100, not of NVIDIA H200"),
    ],
)
def test_other_files_are_not_touched(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        tune.check_output(path, GPU)
    assert path.read_text() == content


def test_a_folder_that_cannot_be_written_names_the_way_out(configs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be written to \(No such file or directory\).* -o"):
        tune.check_output(tmp_path / "missing" / "out.json", GPU)
    configs.write_text("a file where the folder should be")
    with pytest.raises(UsageError, match=r"configs: cannot be written to .* -o"):
        tune.check_output(launch.config_path(GPU), GPU)
    configs.unlink()
    tune.check_output(launch.config_path(GPU), GPU)  # makes the folder
    assert list(configs.iterdir()) == []


@pytest.mark.parametrize("tokens", [3, 54, 55, 1024, 16384])
def test_lengths_are_mixed_and_sum_up(tokens: int) -> None:
    lengths = sample_lengths(tokens)
    assert sum(lengths) == tokens
    assert min(lengths) >= 3
    assert lengths == sorted(lengths, reverse=True)
    if tokens == 16384:
        assert 270 <= tokens / len(lengths) <= 330
        assert len(set(lengths)) >= 20


def test_without_a_gpu_or_triton_one_line_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert cli.main(["tune"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("esm-packed: error: ")
    assert "finds no CUDA device" in line

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["tune"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tune needs Triton, which is not installed" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "esm3"], "invalid choice: 'esm3'"),
        (["--dtype", "fp16,fp64"], "'fp16,fp64' is not a list of fp32, tf32, fp16, bf16"),
        (["--dtype", ""], "is not a list of"),
        (["--tokens", "100"], "not an integer from 1024"),
        (["--time-limit", "0"], "not an integer from 1"),
        (["--jobs", "-1"], "not an integer from 0"),
        (["--device", "mps"], "mps is not supported"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *options]) == 2
    assert message in capsys.readouterr().err


def test_help_has_examples_and_does_not_wait_for_torch() -> None:
    script = (
        "import sys; from esm_packed.runners.cli.main import main; code = main(['tune', '--help']); "
        "assert not {'torch', 'triton', 'tqdm'} & set(sys.modules); sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "examples:\n  esm-packed tune\n" in run.stdout


def test_the_command_from_its_options_to_the_table(
    triton_device: torch.device,
    tuned: dict[str, Settings],
    configs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def few_problems(models: Any, precisions: Any, tokens: int, device: torch.device) -> list[TuningProblem]:
        asked.append((models, [precision.name for precision in precisions], tokens, device))
        return [replace(problem_of("bias_gelu_", triton_device), candidates=[best])]

    best = {"BLOCK_T": 4, "BLOCK_N": 256, "num_warps": 8}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(launch, "tuned_settings", launch.tuned_settings.__wrapped__)
    monkeypatch.setattr(tune, "problems", few_problems)
    monkeypatch.setattr(tune, "num_buffers", lambda num_bytes, device: 1)
    timer = FakeTimer(lambda settings: 30.0 if settings else 40.0)
    monkeypatch.setattr(tune, "time_in_turns", lambda device, trials, rounds: timer(trials, rounds))
    output = tmp_path / "mine.json"
    options = ["--model", "esm2_t6_8M_UR50D", "--dtype", "fp16,fp32", "--tokens", "2048", "-o", str(output)]
    options += ["--jobs", "0"]
    assert cli.main(["tune", "--device", "cuda:1", *options]) == 0
    assert asked == [([ESM2_MODELS["esm2_t6_8M_UR50D"]], ["fp16", "fp32"], 2048, torch.device("cuda", 1))]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        "bias_gelu_/256/float16", "40.0", "us", "30.0", "us", "25.0%",
        "BLOCK_T=4", "BLOCK_N=256", "num_warps=8",
    ]  # fmt: skip
    assert lines[2].startswith("1 of 1 kernels have tuned settings; 0 of 1 candidates")
    assert lines[3:] == [
        f"written to {output}",
        f"copy it to {launch.config_path(GPU)} for launches to use it",
    ]
    content = json.loads(output.read_text())
    assert content["settings"] == {"bias_gelu_/256/float16": best}
    assert {"gpu", "capability", "torch", "triton", "esm_packed", "date", "tokens"} < set(content)
    assert (content["gpu"], content["capability"], content["tokens"]) == (GPU, "9.0", 2048)

    assert cli.main(["tune", "--model", "all", "--jobs", "0"]) == 0
    assert asked[1][0] == list(ESM2_MODELS.values())
    assert capsys.readouterr().out.splitlines()[-1] == f"written to {launch.config_path(GPU)}"
    assert cli.main(["tune", "--device", "cpu"]) == 2
    assert "choose cuda" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(cuda_device: torch.device) -> None:
    """Real clocks: repeated searches agree, and launching twice takes twice as long."""
    live = launch.tuned_settings(cuda_device)
    before = dict(live)
    config = ESM2Config(num_layers=1, hidden_size=1280, num_heads=20)
    try:
        with torch.cuda.device(cuda_device):
            timer = partial(time_in_turns, cuda_device)
            for problem in problems([config], [PRECISIONS["fp16"]], 16384, cuda_device):
                outcome = tune.search(
                    replace(problem, candidates=problem.candidates[::6]),
                    live,
                    timer,
                    partial(num_buffers, device=cuda_device),
                )
                assert outcome.heuristic_us is not None, problem.key
                assert outcome.tuned_us is not None
                assert 1 < outcome.tuned_us <= outcome.heuristic_us < 1e5, outcome
            order = order_backends(
                config,
                PRECISIONS["fp16"],
                16384,
                cuda_device,
                timer,
                partial(num_buffers, device=cuda_device),
            )
            assert order is not None
            assert {"varlen", "triton"} <= set(order.order)
            sleep = torch.empty(1 << 27, dtype=torch.int8, device=cuda_device)
            once = Trial(None, lambda: sleep.zero_(), lambda: None, 1)
            twice = Trial(None, lambda: (sleep.zero_(), sleep.zero_()), lambda: None, 1)
            short, long = timer([once, twice], 11)
            assert 1.8 < long / short < 2.2
    finally:
        live.clear()
        live.update(before)
