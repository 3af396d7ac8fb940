"""How vLLM runs here, in process and as a server: what was fastest on a few cores."""

from __future__ import annotations

import os
from typing import Any

BLOCK_SIZE = 32  # 128 by default, in which no soft prompt of the workload would fill a block; it warns below 32


def engine() -> dict[str, Any]:
    """Arguments of `vllm.LLM`, options of `vllm serve`."""
    return {
        "dtype": "float32",
        "enable_prompt_embeds": True,
        "enable_prefix_caching": True,
        "max_model_len": 1024,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,  # the whole prefill of 64 rows in few steps
        "block_size": int(os.environ.get("BENCH_VLLM_BLOCK_SIZE", BLOCK_SIZE)),
        "enforce_eager": bool(int(os.environ.get("BENCH_VLLM_EAGER", "0"))),
    }


def environment(threads: int) -> dict[str, str]:
    """Variables that are not set already."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {name: os.environ.get(name, value) for name, value in defaults.items()}
