"""Times vLLM's start on one model, by load format and state of the page cache, each in a fresh server.

    python benches/vllm/ready.py MODEL OUT.json STATE:FORMAT... [--repeat 1] [--limit 600] [-- SERVER FLAGS]

STATE is `warm` (the files are in the page cache) or `cold` (the page cache was dropped; needs root). FORMAT is a load
format, such as `auto` or `serverless_llm`; `FORMAT,{"key": ...}` gives it an extra config. For each start it writes the
seconds until the server answers, those of them after its first line (what comes before are imports, in which no loader
has been called yet), those of the loader's own line and of vLLM's model loading, the first tokens, and the loader's
line; then the medians as Markdown. All starts get the same flags; caches of compiled code stay from start to
start. make_model.py makes a MODEL.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "peers"))
import cache  # noqa: E402

PORT = 8123
SERVE = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


def prepare(model: Path, state: str) -> None:
    """Puts the model's files into the page cache, or everything out of it."""
    files = [str(file) for file in sorted(model.iterdir())]
    if state == "warm":
        cache.set_state(files, "warm")
        return
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    share = cache.cached_share(files)
    if share > 0.001:
        raise RuntimeError(f"{model} should be cold, but {share:.1%} of it is in the page cache")


def ask(path: str, body: dict[str, Any] | None = None) -> Any:
    """The server's answer to one request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def wait_ready(server: subprocess.Popen[bytes], log: Path, limit: float) -> tuple[float | None, float | None]:
    """Seconds until the server answers, or None, and those of them after its first line."""
    start = time.perf_counter()
    first = None
    while (now := time.perf_counter() - start) < limit and server.poll() is None:
        if first is None and log.stat().st_size > 0:
            first = now
        try:
            ask("/v1/models")
            ready = time.perf_counter() - start
            return ready, None if first is None else ready - first
        except OSError:
            time.sleep(0.05)
    return None, None


def number(pattern: str, log: str) -> float | None:
    """The first number that a pattern finds in a log."""
    found = re.search(pattern, log)
    return float(found.group(1)) if found else None


def start(model: Path, state: str, form: str, flags: list[str], log: Path, limit: float) -> dict[str, Any]:
    """One start of the server."""
    prepare(model, state)
    load_format, _, extra = form.partition(",")
    more = ["--load-format", load_format, *(["--model-loader-extra-config", extra] if extra else [])]
    place = ["--host", "127.0.0.1", "--port", str(PORT), "--served-model-name", "m"]
    command = [*SERVE, str(model), *place, *flags, *more]
    with open(log, "wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        ready, after_first_line = wait_ready(server, log, limit)
        tokens = None
        if ready is not None:
            body = {"model": "m", "prompt": [1, 2, 3, 4], "max_tokens": 32, "temperature": 0, "logprobs": 0}
            choice = ask("/v1/completions", body | {"return_tokens_as_token_ids": True})["choices"][0]
            tokens = choice["logprobs"]["tokens"]
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    text = log.read_text(errors="replace")
    ours = re.search(r"serverless_llm loaded .*", text)
    return {
        "state": state,
        "format": form,
        "flags": " ".join(flags),
        "ready_s": ready,
        "after_first_line_s": after_first_line,
        "weights_s": number(r"Loading weights took ([0-9.]+)", text),
        "model_s": number(r"Model loading took .*? and ([0-9.]+)", text),
        "model_gib": number(r"Model loading took ([0-9.]+)", text),
        "tokens": tokens,
        "line": ours.group(0) if ours else None,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Medians by state and format of the starts that came to an answer."""
    lines = [
        "| state | load format | starts | ready s | after the first line s | weights s | model loading s | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = next((row["tokens"] for row in rows if row["tokens"]), None)
    for key in dict.fromkeys((row["state"], row["format"]) for row in rows):
        tried = [row for row in rows if (row["state"], row["format"]) == key]
        mine = [row for row in tried if row["ready_s"] is not None]

        def median(name: str, mine: list[dict[str, Any]] = mine) -> str:
            values = [row[name] for row in mine if row.get(name) is not None]
            return f"{statistics.median(values):.2f}" if values else "-"

        starts = str(len(mine)) if len(mine) == len(tried) else f"{len(mine)} of {len(tried)}"
        same = "none" if not mine else "equal" if all(row["tokens"] == first for row in mine) else "DIFFER"
        medians = [median(name) for name in ("ready_s", "after_first_line_s", "weights_s", "model_s")]
        cells = (*key, starts, *medians, same)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="+", metavar="STATE:FORMAT")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600, help="seconds that one start may take")
    arguments = sys.argv[1:]
    flags = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    options = parser.parse_args(arguments[: len(arguments) - len(flags) - bool(flags)])
    rows: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else []
    for round_ in range(options.repeat):
        for case in options.cases:
            state, _, form = case.partition(":")
            log = options.out.with_suffix(f".{len(rows)}.log")
            rows.append(start(options.model, state, form, flags, log, options.limit))
            options.out.write_text(json.dumps(rows, indent=1))
            shown = {name: value for name, value in rows[-1].items() if name != "tokens"}
            print(round_, json.dumps(shown), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
