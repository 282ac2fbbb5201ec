"""What this package takes from vLLM. All that may differ from version to version is here.

Read in vLLM 0.17.1 to 0.33.0; `python/tests/test_vllm_door.py` compares it with the versions that it names.
"""

from __future__ import annotations

from typing import Any


def register(load_format: str) -> None:
    """Registers the loader, once."""
    from vllm.model_executor import model_loader

    from ._loader import ServerlessLLMLoader

    if model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(load_format) is not ServerlessLLMLoader:
        model_loader.register_model_loader(load_format)(ServerlessLLMLoader)


def skips_expert(loader: Any, name: str) -> bool:
    """Whether expert parallelism leaves a tensor to other ranks."""
    experts = getattr(loader, "local_expert_ids", None)
    if experts is None:
        return False
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

    return bool(should_skip_weight(name, experts))


def is_first_rank() -> bool:
    """Whether this process speaks for all ranks."""
    import torch

    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def ranks_here(vllm_config: Any) -> int:
    """Ranks that load the same checkpoint; more than one read it by the page cache, so that the disk gives it once."""
    parallel = getattr(vllm_config, "parallel_config", None)
    return int(getattr(parallel, "world_size", 1)) * int(getattr(parallel, "data_parallel_size", 1))
