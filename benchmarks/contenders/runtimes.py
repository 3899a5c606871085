"""transformers' EsmModel in inference runtimes for CPUs: OpenVINO and ONNX Runtime.

The model is converted once, before anything is timed, with dynamic shapes; it receives the batches of
`Transformers` with their attention masks.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from contenders.packages import Transformers, padded_inputs

_INPUTS = ("input_ids", "attention_mask")


class _LastHiddenState(torch.nn.Module):
    """Returns only the output that means are computed from."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return output.last_hidden_state  # type: ignore[no-any-return]


def _example() -> dict[str, torch.Tensor]:
    """Proteins of two lengths, so that the mask is traced as well."""
    return dict(zip(_INPUTS, padded_inputs(["MKTAYIAKQR", "MKT"]), strict=True))


class OpenVino(Transformers):
    """OpenVINO on the CPU: one stream, for latency, in FP32 or BF16."""

    def __init__(self, model_name: str, dtype: str, token_budget: int) -> None:
        openvino = importlib.import_module("openvino")
        super().__init__(model_name, "fp32", token_budget)
        wanted = {"fp32": "f32", "bf16": "bf16"}[dtype]
        with torch.no_grad():
            converted = openvino.convert_model(_LastHiddenState(self.model), example_input=_example())
        compiled = openvino.Core().compile_model(
            converted,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": wanted,
            },
        )
        self.model = compiled  # PyTorch's copy of the weights is not needed any more
        served = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if served != wanted:
            raise ImportError(f"OpenVINO computes in {served} on this processor")
        request = compiled.create_infer_request()

        def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            inputs = dict(zip(_INPUTS, (input_ids.numpy(), attention_mask.numpy()), strict=True))
            (states,) = request.infer(inputs, share_inputs=True, share_outputs=True).values()
            return SimpleNamespace(last_hidden_state=torch.from_numpy(states))

        self._forward = forward
        self.backend = "converted by OpenVINO, padded, sorted by length"


class OnnxRuntime(Transformers):
    """ONNX Runtime on the CPU in FP32: exported by torch, with the runtime's default optimizations."""

    def __init__(self, model_name: str, token_budget: int) -> None:
        onnxruntime = importlib.import_module("onnxruntime")
        importlib.import_module("onnxscript")  # required by torch's exporter
        super().__init__(model_name, "fp32", token_budget)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        shape = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.onnx"
            torch.onnx.export(
                _LastHiddenState(self.model).eval(),
                kwargs=_example(),
                f=path,
                input_names=_INPUTS,
                output_names=["last_hidden_state"],
                dynamic_shapes=dict.fromkeys(_INPUTS, shape),
                dynamo=True,
                verbose=False,
            )
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.model = session  # PyTorch's copy of the weights is not needed any more

        def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            inputs = dict(zip(_INPUTS, (input_ids.numpy(), attention_mask.numpy()), strict=True))
            (states,) = session.run(["last_hidden_state"], inputs)
            return SimpleNamespace(last_hidden_state=torch.from_numpy(states))

        self._forward = forward
        self.backend = "exported by torch, padded, sorted by length"
