"""Reading the model into the page cache while vLLM starts.

Between its start and the first weight vLLM imports and spawns for half a minute. The first process calls the plugin
when its own imports are done; what is imported after that is mostly cached, and the disk is idle. So the reading begins
there, in native threads, and pauses while others read. Where there is a store server, it is asked to read the model
instead. Which files are read is asked of what the loader asks.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .. import _native, errors, store, store_server
from .._native import Checkpoint
from ..reports import PrefetchReport
from . import _door, _files
from ._options import Options, is_truth

_VARIABLE = "SERVERLESS_LLM_PREFETCH"
# The process that reads ahead, for those that it starts: they inherit what names the model.
_READER = "_SERVERLESS_LLM_READER"

logger = logging.getLogger("vllm.serverless_llm")
_started = False


class Wanted(NamedTuple):
    """What to read: a model, its revision, the Hugging Face cache that it is in, or None for the default one, and the
    loader's options."""

    model: str
    revision: str | None
    cache: str | None
    options: Options


def start(load_format: str) -> None:
    """Starts reading the model that this command line serves, once, in the first process alone."""
    global _started
    if _started or multiprocessing.parent_process() is not None:
        return
    if os.environ.get(_READER) not in (None, "", str(os.getpid())):
        return
    found = wanted(sys.argv[1:], os.environ, load_format)
    if found is None:
        return
    _started = True
    os.environ[_READER] = str(os.getpid())
    arguments = found.model, found.revision, found.options.server, found.cache
    threading.Thread(target=_read, args=arguments, name="serverless_llm-prefetch", daemon=True).start()


def wanted(arguments: Sequence[str], environment: Mapping[str, str], load_format: str) -> Wanted | None:
    """What to read: the model that SERVERLESS_LLM_PREFETCH names, else what the command line serves by this load format.
    None where there is none, or where it is switched off."""
    served = (_value(arguments, "--load-format") or "").lower() == load_format
    extra = _value(arguments, "--model-loader-extra-config") if served else None  # else it is another loader's
    try:
        options = Options.of_command_line(extra, environment)
    except errors.InvalidError:
        return None  # the loader will say so
    if not options.prefetch:
        return None
    named = environment.get(_VARIABLE, "")
    if named and not is_truth(named):
        return Wanted(named, None, None, options)
    if not served:
        return None
    model = _value(arguments, "--model")
    if model is None and "serve" in arguments:
        after = arguments[arguments.index("serve") + 1 :]
        model = after[0] if after and not after[0].startswith("-") else None
    if model is None:
        return None
    return Wanted(model, _value(arguments, "--revision"), _value(arguments, "--download-dir"), options)


def _value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of a flag, as `--flag value` or `--flag=value`; the last one counts, as for vLLM."""
    value = None
    for i, argument in enumerate(arguments):
        name, equals, rest = argument.partition("=")
        if name.replace("_", "-") == flag:
            value = rest if equals else (arguments[i + 1] if i + 1 < len(arguments) else None)
    return value


def _read(
    model: str, revision: str | None, address: str | None, cache: str | None = None
) -> list[PrefetchReport]:
    """Has the files read that the loader will open; the reports of those that were read here."""
    reports: list[PrefetchReport] = []
    try:
        checkpoints = _chosen(model, revision, cache)
        if address is not None and _preload(checkpoints, address):
            return reports
        for checkpoint in checkpoints:
            reports.append(store.prefetch(checkpoint))
            if reports[-1].end == "loading":
                break
    except (errors.SllmError, OSError, RuntimeError, ValueError) as e:
        # A model that is yet to be downloaded, for instance. The loader tells real errors.
        logger.debug("serverless_llm does not read %s ahead: %s", model, e)
    if reports:
        logger.info(
            "serverless_llm read %.2f GB of %s ahead in %.1f s, %.1f s of them paused for others (%s)",
            sum(report.read_bytes for report in reports) / 1e9,
            model,
            sum(report.seconds for report in reports),
            sum(report.paused_s for report in reports),
            reports[-1].end,
        )
    return reports


def _chosen(model: str, revision: str | None, cache: str | None) -> list[Checkpoint]:
    """What the loader will open, where the model's own code does not name files."""
    loader = _door.own_loader()
    source = loader.Source(_door.folder_here(model, revision, cache), None)
    return _files.opened(loader, source, lambda text: logger.debug("%s", text)) or []


def _preload(checkpoints: list[Checkpoint], address: str) -> bool:
    """Has a store server read the model; whether it has."""
    if not checkpoints:
        return False
    path = os.path.realpath(checkpoints[0].path)
    try:
        client = store_server.StoreClient(None if address == "auto" else address)
        if not _is_whole(path, checkpoints):
            logger.debug("the store server at %s would read other files of %s than the loader", client.address, path)
            return False
        size = client.preload(path)
    except (errors.SllmError, OSError) as e:
        logger.debug("no store server reads %s ahead: %s", path, e)
        return False
    logger.info("serverless_llm: the store server at %s has %.2f GB of %s", client.address, size / 1e9, path)
    return True


def _is_whole(path: str, checkpoints: list[Checkpoint]) -> bool:
    """Whether the loader's checkpoints are what is found by their path alone, which is all that the server is told."""
    return len(checkpoints) == 1 and sorted(_native.open(path).files) == sorted(checkpoints[0].files)
