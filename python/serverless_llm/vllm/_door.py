"""What this package takes from vLLM. All that may differ from version to version is here.

Read in vLLM 0.17.1 to 0.33.0; `python/tests/test_vllm_door.py` compares it with the versions that it names.
"""

from __future__ import annotations

from typing import Any


def register_lazily(load_format: str) -> None:
    """Registers the loader. vLLM wants a class, which needs vLLM's own loader; importing that costs nothing here, since
    every process that comes here imports it."""
    from vllm.model_executor.model_loader import register_model_loader

    import vllm.model_executor.model_loader as model_loader

    from ._loader import ServerlessLLMLoader

    if model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(load_format) is not ServerlessLLMLoader:
        register_model_loader(load_format)(ServerlessLLMLoader)


def skips_expert(loader: Any, name: str) -> bool:
    """Whether expert parallelism leaves a tensor to other ranks."""
    experts = getattr(loader, "local_expert_ids", None)
    if experts is None:
        return False
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

    return bool(should_skip_weight(name, experts))


def left_empty(model: Any, loaded: set[str], written: set[int]) -> set[str]:
    """Parameters of unquantised linear layers and embeddings that the model does not tell of as loaded, and whose memory
    (`written` has the storages' addresses) nothing was written to.

    vLLM's own check passes over every layer that has a method of quantisation with something to do after the load, and
    an unquantised one has such a method too.
    """
    names = list(model.named_parameters(remove_duplicate=False))
    filled = {id(parameter) for name, parameter in names if name in loaded}
    kinds = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
    return {
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if type(getattr(module, "quant_method", None)).__name__ in kinds
        for own, parameter in module.named_parameters(recurse=False)
        if id(parameter) not in filled and parameter.untyped_storage().data_ptr() not in written
    }


def is_first_rank() -> bool:
    """Whether this process speaks for all ranks."""
    import torch

    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def ranks_here(vllm_config: Any) -> int:
    """Ranks that load the same checkpoint; more than one read it by the page cache, so that the disk gives it once."""
    parallel = getattr(vllm_config, "parallel_config", None)
    return int(getattr(parallel, "world_size", 1)) * int(getattr(parallel, "data_parallel_size", 1))
