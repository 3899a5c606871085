"""Runs esm-cpp in its own environment (it needs numpy < 2) and answers requests on standard input.

A request is one line of JSON, and so is its answer; arrays are passed in .npz files named in the request.
Imports neither torch nor this package. `esm_cpp_client.py` is the other end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import esm_cpp
import numpy as np


def mean_embedding(model: Any, token_ids: np.ndarray) -> np.ndarray:
    """Mean of the last layer over the residues; `forward_scheduled` itself returns logits only."""
    _, hidden_states = model.forward_with_hidden_states(token_ids)
    return np.asarray(hidden_states[-1][1:-1].mean(0))


def main() -> None:
    # Output of the library must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    model: Any = esm_cpp.Model.load_from_safetensors(sys.argv[1])
    token_ids: list[np.ndarray] = []
    logits: list[np.ndarray] = []
    print(json.dumps({"isa": esm_cpp.current_isa(), "threads": model.num_threads}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "prepare":
            with np.load(request["path"]) as file:
                token_ids = [file[str(index)] for index in range(len(file.files))]
        elif request["do"] == "run":
            start = time.perf_counter()
            logits = model.forward_scheduled(token_ids)
            answer["seconds"] = time.perf_counter() - start
        elif request["do"] == "embeddings":
            means = [mean_embedding(model, ids) for ids in token_ids]
            np.savez(request["path"], **{str(index): mean for index, mean in enumerate(means)})
        elif request["do"] == "logits":
            np.savez(request["path"], **{str(index): array for index, array in enumerate(logits)})
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
