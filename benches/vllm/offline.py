"""Loads a model into vLLM by each load format, one engine after another in one process, and compares what they say.

    python benches/vllm/offline.py MODEL [--formats auto,serverless_llm] [--quantization fp8] [--sleep 1,2] [--profile]
                                   [--tensor-parallel 2] [--pipeline-parallel 2] [--expert-parallel] [--extra JSON]

For each engine it prints a line of JSON: the seconds of its `load_weights` and of making it, and whether the first
tokens of two prompts, and a sum over every bit of each parameter and buffer, are those of the first engine. `--sleep`
lets the last engine sleep and wake at these levels (2: with `reload_weights`) and asks again; `--profile` shows where
Python's time of its `load_weights` went. With several ranks each has a process of its own, whose seconds are in its log
only. make_model.py makes a MODEL.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import pstats
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # `sums` is sent to the ranks

import torch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader  # noqa: E402

PROMPTS = [[1, 5, 9, 200, 300, 77], list(range(100, 140))]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--formats", default="auto,serverless_llm")
    parser.add_argument("--quantization")
    parser.add_argument("--sleep", default="", help="levels, by commas")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--pipeline-parallel", type=int, default=1)
    parser.add_argument("--expert-parallel", action="store_true")
    parser.add_argument("--extra", type=json.loads, help="serverless_llm's model_loader_extra_config")
    parser.add_argument("--memory", type=float, default=0.3, help="share of the device's memory for an engine")
    return parser.parse_args()


class Watch:
    """Times every loader's `load_weights`; serverless_llm's is the default loader's with another source of bytes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.profile: cProfile.Profile | None = None
        load_weights = DefaultModelLoader.load_weights

        def timed(loader: Any, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            if self.profile is not None:
                self.profile.enable()
            try:
                return load_weights(loader, *args, **kwargs)
            finally:
                if self.profile is not None:
                    self.profile.disable()
                self.seconds = time.perf_counter() - began

        DefaultModelLoader.load_weights = timed


def tokens(engine: LLM) -> list[list[int]]:
    """The first tokens after each prompt."""
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    answers = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def sums(model: torch.nn.Module) -> dict[str, tuple[list[int], int]]:
    """The shape of every parameter and buffer, and a sum over its bits that depends on their places."""
    step, found = 1 << 24, {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        words = flat.view(torch.int32) if flat.numel() % 4 == 0 and flat.data_ptr() % 4 == 0 else flat
        total = 0
        for begin in range(0, words.numel(), step):
            part = words[begin : begin + step].to(torch.int64)
            place = torch.arange(begin, begin + part.numel(), device=part.device) % 65521 + 1
            total += int((part * place).sum())
        found[name] = (list(tensor.shape), total)
    return found


def differences(found: list[dict[str, Any]], first: list[dict[str, Any]]) -> list[str]:
    """The names whose sums, or presence, differ in a rank."""
    pairs = zip(found, first, strict=True)
    names = [(name, own, other) for own, other in pairs for name in own.keys() | other.keys()]
    return sorted({name for name, own, other in names if own.get(name) != other.get(name)})


def sleep(engine: LLM, level: int) -> None:
    """Sleeps and wakes."""
    engine.sleep(level=level)
    if level == 1:
        engine.wake_up()
        return
    engine.wake_up(tags=["weights"])
    engine.collective_rpc("reload_weights")
    engine.wake_up(tags=["kv_cache"])


def main() -> None:
    args = parse_args()
    watch, first, first_sums, wrong = Watch(), None, None, 0
    formats = args.formats.split(",")
    levels = [int(level) for level in args.sleep.split(",") if level]
    for number, load_format in enumerate(formats):
        last = number == len(formats) - 1
        watch.profile = cProfile.Profile() if args.profile and last else None
        options: dict[str, Any] = {"enable_sleep_mode": True} if levels and last else {}
        if args.quantization:
            options["quantization"] = args.quantization
        if args.extra and load_format == "serverless_llm":
            options["model_loader_extra_config"] = args.extra
        began = time.perf_counter()
        engine = LLM(
            model=args.model,
            load_format=load_format,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=4,
            gpu_memory_utilization=args.memory,
            tensor_parallel_size=args.tensor_parallel,
            pipeline_parallel_size=args.pipeline_parallel,
            enable_expert_parallel=args.expert_parallel,
            disable_custom_all_reduce=args.tensor_parallel > 1,
            **options,
        )
        row: dict[str, Any] = {"format": load_format, "engine_s": round(time.perf_counter() - began, 2)}
        if args.tensor_parallel * args.pipeline_parallel == 1:
            row["load_weights_s"] = round(watch.seconds, 3)
        said = tokens(engine)
        first = said if first is None else first
        row["equal"] = said == first
        found = engine.apply_model(sums)
        first_sums = found if first_sums is None else first_sums
        different = differences(found, first_sums)
        row |= {"tensors": sum(map(len, found)), "tensors_equal": not different}
        if different:
            row["different"] = different[:20]
        for level in levels if last else []:
            sleep(engine, level)
            row[f"equal_after_sleep_{level}"] = tokens(engine) == first
            row[f"tensors_equal_after_sleep_{level}"] = not differences(engine.apply_model(sums), first_sums or [])
        wrong += sum(value is False for value in row.values())
        print(json.dumps(row), flush=True)
        if watch.profile is not None:
            pstats.Stats(watch.profile).sort_stats("tottime").print_stats(30)
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    raise SystemExit(wrong != 0)


if __name__ == "__main__":
    main()
