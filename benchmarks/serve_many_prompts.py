"""Ten thousand prompts on disk: how long a server takes to start, and what the first request to a cold prompt costs.

    python benchmarks/serve_many_prompts.py --json many.json

Cold and warm requests are the same ones, one after the other, so their difference is the loading alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx2 as httpx
import torch

from softprompts.models import FrozenLM
from softprompts.pretraining import bundled_lm_path
from softprompts.prompts import prompt_from_table
from softprompts.storage import save_prompt


def make_library(folder: Path, count: int, length: int) -> None:
    """Save one prompt, and copy it: every directory is a prompt of its own to the server."""
    frozen = FrozenLM.load(bundled_lm_path())
    table_PD = torch.randn(length, frozen.geometry.width, generator=torch.Generator().manual_seed(0))
    save_prompt(prompt_from_table("embedding", frozen.geometry, table_PD), folder / "t0" / "p0", frozen=frozen)
    for number in range(1, count):
        place = folder / f"t{number % 100}" / f"p{number}"
        shutil.copytree(folder / "t0" / "p0", place)


def cpu_s(process: int) -> float:
    """Time of the processor that a process has used so far (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(folder: Path, threads: int) -> tuple[subprocess.Popen[str], str, tuple[float, float]]:
    """Start a server; returns it, its address and the seconds until it listens: by the clock, and of the processor."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "softprompts", "serve", "--model", "bundled", "--prompts", str(folder)]
    command += ["--port", "0", "--threads", str(threads), "--log-level", "info"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("{") and json.loads(line)["message"] == "listening":
            seconds = (time.perf_counter() - began, cpu_s(process.pid))
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
            return process, json.loads(line)["url"], seconds
    raise RuntimeError(f"the server ended with {process.wait()}")


def ask(client: httpx.Client, model: str) -> float:
    """Seconds of one request for one token."""
    began = time.perf_counter()
    body = {"model": model, "prompt": "The old house", "max_tokens": 1, "temperature": 0}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return time.perf_counter() - began


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--asked", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="softprompts-many-"))
    try:
        make_library(folder, args.prompts, args.length)
        (folder.parent / f"{folder.name}-empty").mkdir()
        empty, _, empty_s = start(folder.parent / f"{folder.name}-empty", args.threads)
        empty.terminate()
        empty.wait()
        process, url, start_s = start(folder, args.threads)
        cold, warm = [], []
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            for _ in range(5):
                ask(client, "bundled")
            for number in range(args.asked):
                number = number * (args.prompts // args.asked)
                name = f"t{number % 100}/p{number}"
                cold.append(ask(client, name))
                warm.append(ask(client, name))
            began = time.perf_counter()
            listed = len(client.get("/v1/models").json()["data"])
            list_s = time.perf_counter() - began
        process.send_signal(signal.SIGTERM)
        process.wait()
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(folder.parent / f"{folder.name}-empty", ignore_errors=True)
    extra = [one - other for one, other in zip(cold, warm, strict=True)]
    report = {
        "prompts": args.prompts,
        "length": args.length,
        "threads": args.threads,
        "start_s": start_s[0],
        "start_cpu_s": start_s[1],
        "start_without_prompts_s": empty_s[0],
        "start_without_prompts_cpu_s": empty_s[1],
        "listed": listed,
        "list_s": list_s,
        "cold_s": statistics.median(cold),
        "warm_s": statistics.median(warm),
        "extra_ms": 1000 * statistics.median(extra),
        "extra_p95_ms": 1000 * statistics.quantiles(extra, n=20)[18],
        "exit_code": process.returncode,
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
