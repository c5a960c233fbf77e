"""Loads a checkpoint in transformers: `python transformers_client.py JOB.json RESULT.json`; runs where it is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file


@torch.no_grad()
def main(job: dict[str, Any]) -> dict[str, Any]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], output_loading_info=True, dtype=torch.bfloat16
    )
    experts = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if ".experts." in name}
    save_file(experts, job["experts"])
    logprobs = []
    for ids in job["ids"]:
        logits = model(torch.tensor([ids])).logits[0].float()
        logprobs.append(logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return {
        "version": transformers.__version__,
        "info": {key: sorted(map(str, value)) for key, value in info.items() if key.endswith("_keys")},
        "logprobs": logprobs,
    }


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        result = main(json.load(file))
    Path(sys.argv[2]).write_text(json.dumps(result))
