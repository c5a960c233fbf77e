"""Loads a checkpoint in vLLM, generates, and says what vLLM holds: `python vllm_client.py JOB.json RESULT.json`.

Runs in the environment of vLLM. Engine arguments are vLLM's defaults but for sizes, compilation (off) and
what the job says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from harness import PATCHES, Experts, LoadedTensors


def main(job: dict[str, Any]) -> dict[str, Any]:
    for name in job["patches"]:
        PATCHES[name]()
    LoadedTensors(Path(job["loaded"]))
    experts = Experts(plain=job["plain_experts"])

    import vllm

    sizes = {"max_model_len": 1024, "max_num_seqs": 8, "kv_cache_memory_bytes": 2**26}
    engine = vllm.LLM(job["model"], enforce_eager=True, **sizes, **job["engine"])
    parameters = vllm.SamplingParams(max_tokens=job["max_tokens"], temperature=0, logprobs=0, prompt_logprobs=0)
    outputs = engine.generate(job["prompts"], parameters)
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    return {
        "version": vllm.__version__,
        "outputs": [_output(output) for output in outputs],
        "cache": {
            "chosen": str(engine.llm_engine.vllm_config.cache_config.cache_dtype),
            "tensors": sorted({str(cache.dtype) for cache in runner.kv_caches}),
        },
        "layers": [_layer(layer.self_attn) for layer in runner.model.model.layers],
        "dtypes": {name: str(tensor.dtype) for name, tensor in runner.model.named_parameters()},
        "kernel_errors": experts.errors,
    }


def _output(output: Any) -> dict[str, Any]:
    prompt, generated = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    found = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    ids = [*prompt, *generated]
    # Of each token after the first, given those before it.
    logprobs = [entry[token].logprob for entry, token in zip(found, ids[1:], strict=True)]
    return {"ids": ids, "prompt": len(prompt), "logprobs": logprobs}


def _layer(attention: Any) -> dict[str, Any]:
    attn, scheme = attention.attn, attention.qkv_proj.scheme
    kernel = scheme.fp8_linear if hasattr(scheme, "fp8_linear") else scheme.linear_kernel
    return {
        "k_scale": attn._k_scale_float,
        "v_scale": attn._v_scale_float,
        "k_scale_tensor": attn._k_scale.tolist(),
        "v_scale_tensor": attn._v_scale.tolist(),
        "cache": attn.kv_cache_dtype,
        "scheme": type(scheme).__name__,
        "kernel": type(kernel).__name__,
        # The instructions that attention is computed with.
        "attention": attn.isa,
    }


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        result = main(json.load(file))
    Path(sys.argv[2]).write_text(json.dumps(result))
