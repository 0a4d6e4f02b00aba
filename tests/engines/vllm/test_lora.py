"""Requests with an adapter are steered as a model is whose weights hold it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.engines.vllm.asked import prompt
from tests.engines.vllm.engine import answer_of
from tests.engines.vllm.models import BLOCKS, WIDTH

ENGINE = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
PARTS = ("self_attn.q_proj", "self_attn.v_proj")


def test_steered_requests_with_an_adapter(pair: Any, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    draw, tensors, weights = torch.Generator().manual_seed(0), {}, dict(pair.model.named_parameters())
    for name in (f"model.layers.{layer}.{part}" for layer in range(BLOCKS) for part in PARTS):
        down, up = (torch.randn(*shape, generator=draw) * 0.3 for shape in ((8, WIDTH), (WIDTH, 8)))
        tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        with torch.no_grad():
            weights[f"{name}.weight"] += up @ down
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**facts, "task_type": "CAUSAL_LM"}))
    # On CPUs this vLLM lays the adapter over the batch's other requests too, so here all have it.
    adapter = LoRARequest("adapter", 1, str(tmp_path))
    said = (None, "add-post*1", "off-attn*1", "turn-mlp[2:]*70", "late", "add-post@all*1 - off-post*0.5")
    asked = [(prompt(number, 9), one) for number, one in enumerate(said)]
    prompts = [{"prompt_token_ids": ids} for ids, _ in asked]
    params = [pair.params(one, 6) for _, one in asked]
    outputs = pair.llm.generate(prompts, params, lora_request=adapter, use_tqdm=False)
    pair.check(asked, [answer_of(output) for output in outputs])
