"""Serves a model by Ray Serve and vLLM, its weights loaded by this package: python examples/vllm/ray_serve.py MODEL

MODEL is a directory that every node has, or a repository id. Every node needs `pip install "ray[serve,llm]"` and this
package.
"""

from __future__ import annotations

import sys

from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def main() -> None:
    """Deploys, and serves until it is stopped."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    config = LLMConfig(
        model_loading_config={"model_id": "llm", "model_source": sys.argv[1]},
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 2}},
        engine_kwargs={
            "load_format": "serverless_llm",
            # Options go in here: Ray's workers do not get every environment variable.
            "model_loader_extra_config": {"road": "auto"},
        },
    )
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=True)


if __name__ == "__main__":
    main()
