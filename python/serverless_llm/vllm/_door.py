"""What this package takes from vLLM. All that may differ from version to version is here.

`python/tests/test_vllm_door.py` compares it with the versions that `python/tests/data/vllm_door.json` records.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from typing import Any

# The load format by which files that a model's own patterns name are pickled ones, unless they end as safetensors do.
PICKLED = "pt"


def register(load_format: str) -> None:
    """Registers the loader, once."""
    from vllm.model_executor import model_loader

    from ._loader import ServerlessLLMLoader

    if model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(load_format) is not ServerlessLLMLoader:
        model_loader.register_model_loader(load_format)(ServerlessLLMLoader)


def own_loader() -> Any:
    """vLLM's own loader, by which a model's files are found."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    return DefaultModelLoader(LoadConfig(load_format="safetensors"))


def folder_here(model: str, revision: str | None, cache: str | None = None) -> str:
    """The directory of a model: itself, or that of the Hugging Face cache, which may be another one than the default.
    Nothing is downloaded."""
    if os.path.isdir(model):
        return model
    from huggingface_hub import snapshot_download

    return str(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))


def folder_of(source: Any) -> str:
    """The directory, or repository id, that one of vLLM's sources names. Sources of 0.17.1 have no subfolder."""
    subfolder = getattr(source, "subfolder", None)
    return source.model_or_path if subfolder is None else os.path.join(source.model_or_path, subfolder)


def with_format(loader: Any, load_format: str) -> Any:
    """A copy of a loader of vLLM's that has another load format."""
    other = copy.copy(loader)
    other.load_config = copy.copy(loader.load_config)
    other.load_config.load_format = load_format
    return other


def files_of(loader: Any, source: Any) -> tuple[str, list[str], bool]:
    """The folder and the files of one of vLLM's sources, and whether they are safetensors: found or downloaded as by its
    load format `auto`, in the order in which it reads them. Pickled files are found only by patterns that the model
    itself gives.

    0.17.1 takes no subfolder; 0.32.0 and later give the index's name too. Later versions then drop shards of which the
    model wants no tensor; they stay in here, since the model passes over their tensors, and deferred ones are not read.
    """
    arguments = {
        "model_name_or_path": source.model_or_path,
        "subfolder": getattr(source, "subfolder", None),
        "revision": source.revision,
        "fall_back_to_pt": False,
        "allow_patterns_overrides": source.allow_patterns_overrides,
    }
    taken = inspect.signature(loader._prepare_weights).parameters
    given = {name: value for name, value in arguments.items() if name in taken}
    if source.allow_patterns_overrides is not None:
        found = with_format(loader, PICKLED)._prepare_weights(**given)
    else:
        try:
            # Where there are files of Mistral's own format, that is the one.
            found = with_format(loader, "mistral")._prepare_weights(**given)
        except RuntimeError:
            found = with_format(loader, "safetensors")._prepare_weights(**given)
    return found[0], sorted(found[1], key=_place), bool(found[2])


def _place(file: str) -> tuple[list[str | int], str]:
    """A file's place among others: by its name, in which numbers are numbers."""
    parts = re.split(r"(\d+)", os.path.basename(file))
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], file


def own_experts(loader: Any, checkpoint: Any) -> list[int] | None:
    """Places of the tensors that expert parallelism does not leave to other ranks; None where vLLM filters none. 0.17.1
    has no such filter."""
    experts = getattr(loader, "local_expert_ids", None)
    if experts is None:
        return None
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

    return [i for i, info in enumerate(checkpoint.tensors) if not should_skip_weight(info.name, experts)]


def left_empty(model: Any, loaded: set[str], written: set[int]) -> set[str]:
    """Parameters of unquantised linear layers and embeddings that the model does not tell of as loaded, and whose memory
    (`written` has the storages' addresses) nothing was written to.

    vLLM's own check passes over every layer that has a method of quantisation with something to do after the load, and
    an unquantised one has such a method too.
    """
    from .._accesses import storage_of

    names = list(model.named_parameters(remove_duplicate=False))
    filled = {id(parameter) for name, parameter in names if name in loaded}
    kinds = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
    return {
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if type(getattr(module, "quant_method", None)).__name__ in kinds
        for own, parameter in module.named_parameters(recurse=False)
        if id(parameter) not in filled and storage_of(parameter).data_ptr() not in written
    }


def ranks() -> int:
    """Ranks of this engine, which load one checkpoint. It is asked of torch: where weights are loaded again, vLLM gives
    the loader no configuration of the engine."""
    import torch

    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_first_rank() -> bool:
    """Whether this process speaks for all ranks."""
    import torch

    return ranks() == 1 or torch.distributed.get_rank() == 0
