"""The load format `serverless_llm` of vLLM.

vLLM finds `register` by the entry point group `vllm.general_plugins` and calls it in every process.
"""

from __future__ import annotations

LOAD_FORMAT = "serverless_llm"


def register() -> None:
    """Tells vLLM of the load format, and starts to read the model that is served. May be called again."""
    from . import _door, _prefetch

    _door.register(LOAD_FORMAT)
    # Its thread finds imported what it needs of vLLM: two threads that import the same at once may see halves.
    _prefetch.start(LOAD_FORMAT)
