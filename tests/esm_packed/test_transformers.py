"""`esm_packed.transformers` beside transformers' own models, on checkpoints that those saved."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_files import CONFIG, hub_config, hub_names
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from esm_packed.alphabet import BOS_ID, MASK_ID, PAD_ID
from esm_packed.attention import select_backend
from esm_packed.checkpoints import CheckpointError, RandomTensors, load_checkpoint
from esm_packed.kernels.reference import packed_attention
from esm_packed.transformers import EsmForMaskedLM, EsmModel, esm_config

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Of a tensor's largest value."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bare` and `lm`: what transformers saves of small models of the two classes, seeded."""
    path = tmp_path_factory.mktemp("saved")
    for name, theirs in (("bare", transformers.EsmModel), ("lm", transformers.EsmForMaskedLM)):
        torch.manual_seed(0)
        model: Any = theirs(esm_config(CONFIG, id2label={0: "mesophilic", 1: "thermophilic"}))
        with torch.no_grad():  # attention far from uniform, and no bias left at zero
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[Any, tuple[Any, Any]]:
    """By class name and dtype: transformers' model and ours."""
    pairs = (("EsmModel", "bare", EsmModel), ("EsmForMaskedLM", "lm", EsmForMaskedLM))
    return {
        (name, dtype): (
            getattr(transformers, name).from_pretrained(folder / saved, dtype=dtype),
            ours.from_pretrained(folder / saved, dtype=dtype),
        )
        for name, saved, ours in pairs
        for dtype in TOLERANCES
    }


@pytest.fixture
def bare(models: dict[Any, tuple[Any, Any]]) -> EsmModel:
    model: EsmModel = models["EsmModel", torch.float32][1]
    return model


@st.composite
def padded_batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask: any token anywhere, and padding before and behind the tokens of a row."""
    width = draw(st.integers(1, 40))
    starts = draw(st.lists(st.integers(0, width - 1), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    input_ids = torch.randint(0, MASK_ID, (len(starts), width), generator=generator)
    input_ids[torch.rand(input_ids.shape, generator=generator) < 0.2] = MASK_ID
    attention_mask = torch.zeros_like(input_ids)
    for row, start in enumerate(starts):
        attention_mask[row, start : draw(st.integers(start + 1, width))] = 1
        input_ids[row, start] = BOS_ID  # a row of masks alone is NaN in both
    # transformers counts masks in the padding, too
    return input_ids.masked_fill(attention_mask == 0, PAD_ID), attention_mask


def theirs_in(dtype: torch.dtype, model: Any, *args: Any, **kwargs: Any) -> Any:
    """What transformers computes, in FP64 throughout for FP64: it forms angles and dropout ratios in FP32."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if dtype == torch.float64:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return model(*args, **kwargs)


def assert_close(computed: torch.Tensor, expected: torch.Tensor) -> None:
    assert computed.dtype == expected.dtype
    scale = float(expected.abs().max())
    torch.testing.assert_close(computed, expected, rtol=0, atol=TOLERANCES[expected.dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCES)
@given(batch=padded_batches())
def test_equal_to_transformers_whatever_the_padding(
    models: dict[Any, tuple[Any, Any]], dtype: torch.dtype, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    input_ids, attention_mask = batch
    is_token = attention_mask.bool()
    for name in ("EsmModel", "EsmForMaskedLM"):
        theirs, ours = models[name, dtype]
        arguments = {"attention_mask": attention_mask, "output_hidden_states": True}
        expected = theirs_in(dtype, theirs, input_ids, **arguments)
        output = ours(input_ids, **arguments)
        assert type(output) is type(expected) and output.keys() == expected.keys()
        assert len(output.hidden_states) == len(expected.hidden_states) == CONFIG.num_layers + 1
        hidden_states = zip(output.hidden_states, expected.hidden_states, strict=True)
        for computed, reference in [*hidden_states, (output[0], expected[0])]:
            assert computed.shape == reference.shape
            assert_close(computed[is_token], reference[is_token])
            assert not computed[~is_token].any()
        if name == "EsmModel":
            from_the_left = is_token[:, 0]  # elsewhere transformers pools padding
            if from_the_left.any():
                assert_close(output.pooler_output[from_the_left], expected.pooler_output[from_the_left])
            alone = ours(input_ids[-1:, is_token[-1]])
            assert_close(output.pooler_output[-1:], alone.pooler_output)
            assert_close(output.last_hidden_state[-1:, is_token[-1]], alone.last_hidden_state)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_without_a_mask_all_are_tokens(models: dict[Any, tuple[Any, Any]], dtype: torch.dtype) -> None:
    input_ids = torch.tensor([[BOS_ID, 5, MASK_ID, 7, 2, PAD_ID, PAD_ID], [BOS_ID, 4, 5, 6, 7, 8, 2]])
    theirs, ours = models["EsmForMaskedLM", dtype]
    assert_close(ours(input_ids).logits, theirs_in(dtype, theirs, input_ids).logits)


def test_masks_of_every_dtype_and_ids_of_every_integer(bare: EsmModel) -> None:
    input_ids = torch.tensor([[BOS_ID, 5, 6, 7, 2, PAD_ID, PAD_ID], [PAD_ID, BOS_ID, 5, 6, 7, 8, 2]])
    mask = input_ids != PAD_ID
    expected = bare(input_ids, mask).last_hidden_state
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32):
        assert torch.equal(bare(input_ids, mask.to(dtype)).last_hidden_state, expected)
    assert torch.equal(bare(input_ids=input_ids.int(), attention_mask=mask).last_hidden_state, expected)


def test_a_batch_larger_than_a_pack(bare: EsmModel, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    input_ids = torch.randint(4, 24, (7, 30))
    mask = torch.arange(30) < torch.tensor([30, 3, 17, 30, 1, 9, 22])[:, None]
    expected = bare(input_ids, mask, output_hidden_states=True).hidden_states
    monkeypatch.setattr("esm_packed.transformers.default_token_budget", lambda device: 32)
    calls: list[int] = []
    with bare.esm2.register_forward_hook(lambda *_: calls.append(1)):
        computed = bare(input_ids, mask, output_hidden_states=True).hidden_states
    for packed, whole in zip(computed, expected, strict=True):
        assert_close(packed, whole)
    assert len(calls) == 4  # packs of 32 tokens; 112 tokens in all


def test_tuples_are_those_of_transformers(models: dict[Any, tuple[Any, Any]]) -> None:
    input_ids = torch.tensor([[BOS_ID, 5, 6, 7, 2]])
    for name in ("EsmModel", "EsmForMaskedLM"):
        theirs, ours = models[name, torch.float32]
        for hidden in (False, True):
            arguments = {"return_dict": False, "output_hidden_states": hidden}
            expected = theirs_in(torch.float32, theirs, input_ids, **arguments)
            computed = ours(input_ids, **arguments)
            assert isinstance(computed, tuple) and len(computed) == len(expected)
            assert_close(computed[0], expected[0])
            assert [type(part) for part in computed] == [type(part) for part in expected]


def test_config_says_what_is_returned_where_the_call_does_not(folder: Path) -> None:
    model = EsmModel.from_pretrained(folder / "bare")
    model.config.output_hidden_states, model.config.return_dict = True, False
    assert len(model(torch.tensor([[BOS_ID, 5, 2]]))) == 3


def test_an_empty_batch(models: dict[Any, tuple[Any, Any]]) -> None:
    model = models["EsmForMaskedLM", torch.float32][1]
    assert model(torch.zeros(0, 5).long()).logits.shape == (0, 5, 33)


# Loading


def test_config_is_that_of_the_folder_or_made_of_the_shape(folder: Path) -> None:
    model = EsmModel.from_pretrained(folder / "bare")
    assert model.config.id2label == {0: "mesophilic", 1: "thermophilic"}
    demo = EsmForMaskedLM.from_pretrained("demo")
    shape = demo.esm2.config
    assert demo.config.model_type == "esm"
    assert (demo.config.num_hidden_layers, demo.config.hidden_size) == (shape.num_layers, shape.hidden_size)
    assert demo(torch.tensor([[BOS_ID, 5, 2]])).logits.shape == (1, 3, 33)
    assert (demo.device, demo.dtype, demo.training) == (torch.device("cpu"), torch.float32, False)


def test_dtype_is_that_of_the_config_unless_given(folder: Path, tmp_path: Path) -> None:
    transformers.EsmModel.from_pretrained(folder / "bare", dtype=torch.bfloat16).save_pretrained(tmp_path)
    for arguments, dtype in (
        ({}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"dtype": "fp32"}, torch.float32),
    ):
        model = EsmModel.from_pretrained(tmp_path, device="auto", **arguments)
        output = model(torch.tensor([[BOS_ID, 5, 2]]), output_hidden_states=True)
        assert model.dtype == dtype
        assert {tensor.dtype for tensor in (*output[:2], *output.hidden_states)} == {dtype}


def test_half_types_are_near_fp32(folder: Path, bare: EsmModel) -> None:
    torch.manual_seed(0)
    input_ids = torch.randint(4, 24, (3, 20))
    exact = bare(input_ids)
    for dtype, tolerance in ((torch.float16, 5e-3), (torch.bfloat16, 3e-2)):
        output = EsmModel.from_pretrained(folder / "bare", dtype=dtype)(input_ids)
        for computed, expected in zip(output.to_tuple(), exact.to_tuple(), strict=True):
            assert (computed.float() - expected).norm() <= tolerance * expected.norm()


def test_a_checkpoint_without_a_pooler_says_so(folder: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"has no pooler: pooler_output is None.*add_pooling_layer=False"
    ) as seen:
        model = EsmModel.from_pretrained(folder / "lm")
    assert len(seen) == 1 and seen[0].filename == __file__
    assert model(torch.tensor([[BOS_ID, 5, 2]])).pooler_output is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("lm", "bare"):
            without = EsmModel.from_pretrained(folder / name, add_pooling_layer=False)
            assert without(torch.tensor([[BOS_ID, 5, 2]])).pooler_output is None
        EsmForMaskedLM.from_pretrained(folder / "lm")


def test_a_pooler_of_another_shape(folder: Path, tmp_path: Path) -> None:
    tensors = dict(load_checkpoint(folder / "bare").tensors)
    tensors |= {"pooler.dense.weight": torch.ones(3, 3), "pooler.dense.bias": torch.ones(3)}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: pooler\.dense has shapes \(3, 3\)"):
        EsmModel.from_pretrained(tmp_path / "odd.safetensors")


def test_logits_need_a_head(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"bare has no language-model head: use EsmModel"):
        EsmForMaskedLM.from_pretrained(folder / "bare")


def test_transformers_is_asked_for_by_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers: pip install 'transformers>=5'"):
        EsmModel.from_pretrained("demo")


def test_rotary_frequencies_of_the_checkpoint_are_kept_by_both(tmp_path: Path) -> None:
    """transformers computes its own, which are another model, only where a checkpoint has none."""
    tensors = dict(RandomTensors(CONFIG))
    input_ids = torch.cat([torch.tensor([[BOS_ID]]), torch.arange(200)[None] % 20 + 4], 1)
    (tmp_path / "config.json").write_text(hub_config())
    errors = []
    for lost in ("position_ids", "inv_freq"):
        stored = {name: tensor for name, tensor in hub_names(tensors).items() if lost not in name}
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "has no rotary frequencies|.*has no rotary frequencies")
            ours = EsmModel.from_pretrained(tmp_path, add_pooling_layer=False)
        theirs = transformers.EsmModel.from_pretrained(tmp_path, add_pooling_layer=False)
        expected = ours(input_ids).last_hidden_state
        computed = theirs_in(torch.float32, theirs, input_ids).last_hidden_state
        errors.append(float((computed - expected).norm() / expected.norm()))
    assert errors[0] < 1e-5 < 1e-4 < errors[1]


# What is refused


@pytest.mark.parametrize(
    ("argument", "instead"),
    [
        ({"output_attentions": True}, "output_attentions.*predict_contacts"),
        ({"labels": torch.zeros(1, 3)}, "labels.*train with transformers"),
        ({"inputs_embeds": torch.zeros(1, 3, 48)}, "inputs_embeds.*pass input_ids"),
        ({"position_ids": torch.arange(3)[None]}, "position_ids.*omit them"),
        ({"encoder_hidden_states": torch.zeros(1, 3, 48)}, "encoder_hidden_states.*leave them out"),
        ({"encoder_attention_mask": torch.ones(1, 3)}, "encoder_attention_mask.*leave it out"),
        ({"output_hidden_states": [0, -1]}, r"output_hidden_states is \[0, -1\]; pass True or False"),
    ],
)
def test_arguments_that_are_not_supported(
    models: dict[Any, tuple[Any, Any]], argument: dict[str, Any], instead: str
) -> None:
    for name in ("EsmModel", "EsmForMaskedLM"):
        ours = models[name, torch.float32][1]
        with pytest.raises(ValueError, match=instead):
            ours(torch.tensor([[BOS_ID, 5, 2]]), **argument)
        ours(torch.tensor([[BOS_ID, 5, 2]]), **dict.fromkeys(argument), use_cache=False)
        with pytest.raises(TypeError, match="'token_types' is not an argument"):
            ours(torch.tensor([[BOS_ID, 5, 2]]), token_types=1)


@pytest.mark.parametrize(
    ("argument", "instead"), [("device_map", "pass device"), ("attn_implementation", "pass attention")]
)
def test_options_of_loading_that_are_not_supported(argument: str, instead: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} is not supported: {instead}"):
        EsmModel.from_pretrained("demo", **dict.fromkeys([argument], "auto"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("input_ids", "attention_mask", "message"),
    [
        (None, None, r"input_ids must be a \(batch, length\) tensor of integers, got None"),
        (torch.zeros(4, dtype=torch.int64), None, r"input_ids must be .*got torch\.Size\(\[4\]\)"),
        (torch.zeros(1, 4), None, "input_ids must be .* tensor of integers"),
        (torch.tensor([[0, 33, 2]]), None, "input_ids are 0 to 33, ESM-2's tokens are 0 to 32"),
        (torch.tensor([[0, -1, 2]]), None, "input_ids are -1 to 2"),
        (torch.zeros(2, 3).int(), torch.ones(2, 4), r"attention_mask must be a tensor of shape \(2, 3\)"),
        (torch.zeros(2, 3).int(), [[1, 1, 1]] * 2, r"attention_mask must be a tensor of shape \(2, 3\)"),
        (torch.zeros(1, 3).int(), torch.tensor([[0.0, 0.0, -1e9]]), "1 for tokens and 0 for padding"),
        (
            torch.zeros(3, 3).int(),
            torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1]]),
            "row 2 has padding between",
        ),
        (torch.zeros(2, 3).int(), torch.tensor([[1, 1, 1], [0, 0, 0]]), "row 1 has no token"),
        (torch.zeros(2, 0).int(), None, "row 0 has no token"),
    ],
)
def test_tensors_that_do_not_fit(bare: EsmModel, input_ids: Any, attention_mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bare(input_ids, attention_mask)


def test_it_does_not_train(bare: EsmModel) -> None:
    refused: list[Callable[[], Any]] = [bare.train, bare.requires_grad_]
    for call in refused:
        with pytest.raises(NotImplementedError, match=r"inference only.*train with fair-esm or transformers"):
            call()
    assert not bare.eval().training and not any(part.training for part in bare.modules())
    assert bare.pooler is not None
    assert not any(parameter.requires_grad for parameter in bare.requires_grad_(False).parameters())
    assert not any(tensor.requires_grad for tensor in bare(torch.tensor([[BOS_ID, 5, 2]])).to_tuple())


# Moving


def test_the_dtype_is_chosen_when_loading(bare: EsmModel) -> None:
    assert bare.to("cpu") is bare and bare.float() is bare and bare.to(torch.float32) is bare
    with pytest.raises(ValueError, match=r"EsmModel\.from_pretrained\(\.\.\., dtype=torch\.float16\)"):
        bare.half()
    with pytest.raises(ValueError, match="device meta is not supported"):
        bare.to("meta")
    assert bare.device == torch.device("cpu") and bare.dtype == torch.float32


def test_attention_is_chosen_anew_where_another_serves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `.to("cuda")`, where `auto` is another backend."""
    model = EsmModel.from_pretrained(folder / "bare")
    input_ids = torch.tensor([[BOS_ID, 5, 6, 7, 2]])
    expected, before = model(input_ids).last_hidden_state, model.esm2
    assert model.to("cpu").esm2 is before  # with the hooks that were put into it
    asked = []

    def choose(name: str, *rest: Any) -> tuple[str, Any]:
        asked.append(name)
        return "another", packed_attention

    monkeypatch.setattr("esm_packed.transformers.select_backend", choose)
    assert model.to("cpu").esm2.attention_backend == "another" and asked == ["auto"]
    assert_close(model(input_ids).last_hidden_state, expected)
    assert select_backend("auto", model.device, model.esm2.precision_mode, 16)[0] == before.attention_backend
