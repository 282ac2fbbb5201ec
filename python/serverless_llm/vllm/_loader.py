"""vLLM's loader of weights for the load format `serverless_llm`.

It is vLLM's own loader with another source of bytes: which files there are, which tensors a model wants, what is done
with them and what is missing at the end stays vLLM's business. Two roads lead into the parameters:

- deferred: vLLM is given tensors in mapped files, and its copies become ours (`serverless_llm.deferred`);
- staging: vLLM is given ordinary tensors on the device, a group at a time, the next one under way.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from .. import _native, _torch
from .._native import Checkpoint
from ..deferred import Deferred
from ..errors import FormatError, InvalidError, SllmError
from ..reports import LoadReport
from ..staging import Staged
from . import _door, _files
from ._options import Options
from ._progress import Bar

logger = init_logger("vllm.serverless_llm")


class ServerlessLLMLoader(DefaultModelLoader):
    """Loads a store, the original's layout or safetensors into vLLM's parameters."""

    counter_before_loading_weights: float

    def __init__(self, load_config: Any) -> None:
        self._options = Options.of(load_config.model_loader_extra_config)
        # vLLM's loader knows neither the format nor its options.
        plain = copy.copy(load_config)
        plain.load_format = "safetensors"
        plain.model_loader_extra_config = {}
        super().__init__(plain)
        self._road: Deferred | Staged | None = None
        self._bar = Bar(False)

    # --- which files ---

    def download_model(self, model_config: Any) -> None:
        if not _files.own_layout(model_config.model):
            _door.files_of(self, self.Source(model_config.model, model_config.revision))

    def _open(self, source: Any) -> list[Checkpoint] | None:
        checkpoints = _files.opened(self, source, lambda text: logger.warning("serverless_llm: %s", text))
        for checkpoint in checkpoints or ():
            self._check_source(checkpoint)
        return checkpoints

    def _check_source(self, checkpoint: Checkpoint) -> None:
        """A store of other weights than its source has now is not served."""
        try:
            checkpoint.check_source()
        except FormatError as e:
            if self._options.changed_source == "error":
                raise FormatError(f'{e}. The option "changed_source": "warn" goes on with the store') from e
            logger.warning("serverless_llm: %s", e)

    # --- the weights ---

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        start = time.perf_counter()
        reason = self._why_not_deferred(model, model_config)
        with Bar(self.load_config.use_tqdm_on_load and _door.is_first_rank()) as self._bar:
            if reason is None:
                with Deferred(_device(), self._load_options(), self._bar.show) as self._road:
                    self._load(model, model_config, start)
            else:
                logger.info("serverless_llm stages tensors on the device: %s", reason)
                self._road = self._staged()
                self._load(model, model_config, start)

    def track_weights_loading(
        self, model: nn.Module, loaded_weights: set[str] | None, *more: Any, **named: Any
    ) -> None:
        # What staging wrote is not seen: there only the names tell.
        written = self._road.written if isinstance(self._road, Deferred) else set()
        empty = _door.left_empty(model, loaded_weights, written) if loaded_weights is not None else set()
        super().track_weights_loading(model, loaded_weights, *more, **named)
        if empty:
            found = f"the checkpoint has nothing for these parameters: {', '.join(sorted(empty))}"
            if self._options.missing == "error":
                raise FormatError(f'{found}: is it complete? The option "missing": "warn" goes on without them')
            logger.warning("serverless_llm: %s", found)

    def _load(self, model: nn.Module, model_config: Any, start: float) -> None:
        road = self._road
        assert road is not None
        try:
            super().load_weights(model, model_config)
        finally:
            self._road = None
        self._tell(road, road.finish(), time.perf_counter() - start)

    def _why_not_deferred(self, model: nn.Module, model_config: Any) -> str | None:
        if self._options.road == "staging":
            return "it was asked for"
        if any(parameter.is_meta for parameter in model.parameters()):
            return "some parameters have no memory yet (online quantisation)"
        if self._options.road == "auto" and model_config.quantization == "torchao":
            return "torchao makes tensors of its own kind"
        return None

    def _load_options(self) -> dict[str, Any]:
        options = self._options.load()
        if options["direct"] is None and _door.ranks() > 1:
            # Other ranks want the same bytes: by the page cache the disk gives them once.
            options["direct"] = False
        return options

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if self.load_config.safetensors_load_strategy == "torchao":
            # vLLM's own iterator makes torchao's tensors of several stored ones.
            raise InvalidError("a checkpoint of torchao's own tensors: load it with --load-format safetensors")
        checkpoints = self._open(source)
        if self.counter_before_loading_weights == 0.0:
            self.counter_before_loading_weights = time.perf_counter()
        if checkpoints is None:
            names = " or ".join(source.allow_patterns_overrides)
            logger.info("serverless_llm leaves %s in %s to vLLM: pickled", names, _door.folder_of(source))
            theirs = _door.with_format(self, _door.PICKLED)
            return super(ServerlessLLMLoader, theirs)._get_weights_iterator(source)
        first = checkpoints[0]
        identity = f", identity {first.identity}" if first.identity else ""
        logger.info("serverless_llm reads %s (%s%s)", first.path, first.layout, identity)
        tensors = itertools.chain.from_iterable([self._tensors(checkpoint) for checkpoint in checkpoints])
        return ((source.prefix + name, tensor) for name, tensor in tensors)

    def _tensors(self, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
        # Without a load of ours vLLM reloads the weights by itself.
        road = self._road or self._staged()
        wanted = _door.own_experts(self, checkpoint)
        if wanted is None:
            self._bar.grow(checkpoint.total_bytes)
        else:
            infos = checkpoint.tensors
            self._bar.grow(sum(infos[i].nbytes for i in wanted))
        return road.tensors(checkpoint, wanted)

    def _staged(self) -> Staged:
        device = _torch.device_id(_device())
        return Staged(_torch, device, self._options.staging_bytes, self._load_options(), self._bar.show)

    def _tell(self, road: Deferred | Staged, reports: list[LoadReport], seconds: float) -> None:
        total = road.moved if isinstance(road, Deferred) else sum(report.bytes for report in reports)
        rate = total / 1e9 / max(seconds, 1e-9)
        engines = sorted({engine["engine"] for report in reports for engine in report.engines})
        logger.info(
            "serverless_llm loaded %.2f GB in %.2f s%s (%.1f GB/s%s) by %s, %s",
            total / 1e9,
            seconds,
            f", {road.waited_s:.2f} of them waiting for bytes" if isinstance(road, Deferred) else "",
            rate,
            _of_link(rate),
            " and ".join(engines) or "no engine",
            road.summary(),
        )
        if isinstance(road, Deferred):
            through = json.dumps(road.read_through)
            logger.debug("moved %d bytes straight, read through the mapped files: %s", road.moved, through)
        # Of several checkpoints, one after the other, the first that the server failed at.
        reasons = (report.fell_back for report in reports if report.fell_back is not None)
        if (reason := next(reasons, None)) is not None:
            logger.warning("serverless_llm: %s; files are read", reason)
        for report in reports:
            logger.debug("%s", report)


def _of_link(rate: float) -> str:
    """The part of the link's peak that a rate in GB/s is. The peak is measured once a boot, in some 30 ms."""
    if not _door.is_first_rank():
        return ""
    try:
        peak = _native.link_peak(_torch.device_id(_device()), rate)
    except SllmError as e:
        logger.debug("the peak of the link is not known: %s", e)
        return ""
    return "" if peak is None else f", {100 * rate / peak[0]:.0f} % of this link"


def _device() -> torch.device:
    """The device of this rank's parameters."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
