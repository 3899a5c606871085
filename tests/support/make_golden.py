"""Make `runners/golden/`: published outputs of ESM-2, cut to a few, and the demo model's, by fair-esm.

    python tests/support/make_golden.py GOLDENS

GOLDENS is a folder with the files that runners/golden/README.md names; without it only the demo's are made
again. Needs fair-esm 2.0.0.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import fair_esm_reference
import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from tokens import decode

from esm_packed.checkpoints.download import file_sha256
from esm_packed.checkpoints.formats import DEMO_FILE
from esm_packed.config import ESM2_MODELS
from esm_packed.runners.check import CASES_FILE, VALUES_FILE

Cases = list[dict[str, Any]]
Values = dict[str, npt.NDArray[np.float32]]

FASTPLMS_NAMES = {"8m": 6, "35m": 12, "150m": 30, "650m": 33, "3b": 36}
DEMO_SEQUENCES = (
    "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",
    "GIVEQCC<mask>SICSLYQLENYCN",
)
"""Human ubiquitin, and insulin's A chain with a masked residue."""


def model_of(num_layers: int) -> str:
    return next(name for name, config in ESM2_MODELS.items() if config.num_layers == num_layers)


def demo() -> tuple[dict[str, str], Cases, Values]:
    """Known hashes, cases and values of the demo model, by fair-esm in FP64."""
    model = fair_esm_reference.load(DEMO_FILE, torch.float64)
    cases: Cases = []
    values: Values = {}
    for number, sequence in enumerate(DEMO_SEQUENCES):
        (truth,) = fair_esm_reference.run(model, [sequence])
        outputs = [("mean", layer, truth["mean"][layer]) for layer in (0, 3, 5)]
        outputs.append(("tokens", 5, truth["representations"][5][:3, :3]))
        outputs.append(("logits", 5, truth["logits"][:3]))
        for output, layer, tensor in outputs:
            key = f"demo.{number}.{output}.{layer}"
            values[key] = tensor.float().numpy().copy()
            cases.append(case(key, sequence, output, layer, "fair-esm", 0.0))
    return {file_sha256(DEMO_FILE): "the file in this package"}, cases, values


def case(key: str, sequence: str, output: str, layer: int, source: str, tolerance: float) -> dict[str, Any]:
    return {
        "values": key,
        "sequence": sequence,
        "output": output,
        "layer": layer,
        "source": source,
        "tolerance": tolerance,
    }


def published(folder: Path) -> dict[str, tuple[dict[str, str], Cases, Values]]:
    """Of each published model its Hugging Face file's hash, cases and values."""
    models = {}
    for size, num_layers in FASTPLMS_NAMES.items():
        name = model_of(num_layers)
        about = json.loads((folder / "fastplms" / f"esm2_{size}.json").read_text())
        files = {
            file: digest.removeprefix("sha256:")
            for file, digest in about["checkpoint"]["files"].items()
            if digest.startswith("sha256:")
        }
        sha256 = next(iter(files.values()))
        if len(files) > 1:  # as `Checkpoint.sha256` joins them
            lines = "".join(f"{file} {digest}\n" for file, digest in sorted(files.items()))
            sha256 = hashlib.sha256(lines.encode()).hexdigest()

        tensors = load_file(folder / "fastplms" / f"esm2_{size}.safetensors")
        cases: Cases = []
        values: Values = {}
        tolerance = {"mean": 0.03, "logits": 0.05} if size != "3b" else {"mean": 0.07, "logits": 0.07}
        for row, mask in enumerate(tensors["residue_mask"]):
            sequence = decode(tensors["input__input_ids"][row][mask])
            outputs = {"mean": tensors["output__last_hidden_state"][row][mask].mean(0)}
            if row == 2:
                outputs["logits"] = tensors["output__logits"][row][: mask.sum() + 2]
            for output, array in outputs.items():
                key = f"{name}.{row}.{output}.{num_layers}"
                values[key] = array.astype(np.float32)
                cases.append(case(key, sequence, output, num_layers, "FastPLMs", tolerance[output]))
        models[name] = ({sha256: f"a file of {about['checkpoint']['repo_id']}"}, cases, values)

    name = model_of(6)
    published_slice = json.loads((folder / "misc" / "golden_slices.json").read_text())[
        "transformers_esm2_t6_8M_no_head"
    ]
    sequence = decode(published_slice["input_ids"][0][1:-1])
    key = f"{name}.transformers.tokens.6"
    array = np.array(published_slice["last_hidden_state[:, :3, :3]"], np.float32)
    tolerance = published_slice["atol_used_by_test"] / float(np.sqrt(np.mean(array**2)))
    models[name][2][key] = array
    models[name][1].append(case(key, sequence, "tokens", 6, "transformers", round(tolerance, 6)))

    name = model_of(33)
    deeprank = np.load(folder / "deeprank" / "1ATN_B_esm2_t33_650M.npz", allow_pickle=False)
    for layer in (0, 32, 33):
        key = f"{name}.deeprank.mean.{layer}"
        models[name][2][key] = deeprank[f"mean{layer}"]
        models[name][1].append(case(key, str(deeprank["sequence"]), "mean", layer, "DeepRank-GNN-esm", 2e-5))
    return models


def main(arguments: list[str]) -> None:
    stored = json.loads(CASES_FILE.read_text()) if CASES_FILE.exists() else {}
    values = load_file(VALUES_FILE) if VALUES_FILE.exists() else {}
    for name, (sha256, cases, arrays) in {
        "demo": demo(),
        **(published(Path(arguments[0])) if arguments else {}),
    }.items():
        stored[name] = {"sha256": sha256, "cases": cases}
        values |= arrays
    CASES_FILE.write_text(json.dumps(stored, indent=1) + "\n")
    save_file(values, VALUES_FILE)


if __name__ == "__main__":
    main(sys.argv[1:])
