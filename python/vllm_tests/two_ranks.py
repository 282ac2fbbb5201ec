"""Run by test_processes.py: models on two ranks, laid out in several ways.

Each argument is one way, as JSON: the paths of the model (`source`), of its `store` and of another model of its shape
(`other`), vLLM's `options`, and whether it `runs` here. What comes of it is a line of JSON.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

from conftest import start, tokens


def fill(worker: Any, load_format: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Run on a rank: loads a second model beside the one that runs. Hashes of its parameters before vLLM makes anything
    else of them, the bytes that the loader's sessions moved, and whether a loader of this rank reads past the page cache."""
    import copy
    import hashlib
    import logging

    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    moved = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            moved.extend(report.bytes for report in record.args or () if hasattr(report, "bytes"))

    config = copy.deepcopy(worker.vllm_config)
    config.compilation_config.static_forward_context.clear()
    config.load_config.load_format, config.load_config.model_loader_extra_config = load_format, extra
    logger, listener = logging.getLogger("vllm.serverless_llm"), Listener()
    logger.addHandler(listener)
    try:
        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(vllm_config=config, model_config=config.model_config)
            for parameter in model.parameters():
                parameter.data.fill_(7)
            loader = get_model_loader(config.load_config)
            loader.load_weights(model, config.model_config)
    finally:
        logger.removeHandler(listener)
    data = {name: p.detach().contiguous().flatten().view(torch.uint8).numpy() for name, p in model.named_parameters()}
    direct = loader._load_options()["direct"] if load_format == "serverless_llm" else None
    hashes = {name: hashlib.sha256(d).hexdigest() for name, d in data.items()}
    return {"moved": sum(moved), "direct": direct, "parameters": hashes}


def run(source: str, other: str, store: str, runs: bool, options: dict[str, Any]) -> dict[str, Any]:
    """What is loaded on each rank, by ways to load, and, where it runs, tokens: of each loader, and of weights that are
    loaded again."""
    found: dict[str, Any] = {}
    if runs:
        found["theirs"] = tokens(start(source, "auto", **options))
        end()
    llm = start(store, "serverless_llm", **options)
    if runs:
        found["ours"] = tokens(llm)
        for name, path in {"other": other, "again": source}.items():
            llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
            llm.reset_prefix_cache()
            found[name] = tokens(llm)
    else:
        llm.collective_rpc(_take, args=(source,))
    ours = "serverless_llm"
    ways = {"theirs": ("auto", {}), "deferred": (ours, {}), "staging": (ours, {"road": "staging"})}
    found["ranks"] = {name: llm.collective_rpc(fill, args=way) for name, way in ways.items()}
    del llm
    end()
    return found


def _take(worker: Any, path: str) -> None:
    worker.vllm_config.model_config.model = path


def end() -> None:
    """Ends the ranks of an engine that nobody holds."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    for text in sys.argv[1:]:
        print("FOUND", json.dumps(run(**json.loads(text))), flush=True)
