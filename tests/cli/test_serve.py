"""``softprompts serve``: what it refuses before anything is loaded, new keys, and a real process that ends well."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import httpx2 as httpx
import pytest
import yaml
from typer.testing import CliRunner

from softprompts.cli.main import build_app
from softprompts.server.auth import hash_key, load_keys


def run(*words):
    return CliRunner().invoke(build_app(["serve"]), ["serve", *words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "--keys"),
        (["--allow-loading"], "--keys FILE"),
        (["--log-level", "loud"], "debug, info, warning or error"),
        (["--keys", "nothing.yaml"], "--make-key"),
    ],
)
def test_what_cannot_be_is_refused_at_once(words, said):
    done = run(*words)
    assert done.exit_code == 2
    assert said in done.output


def test_a_new_key_fits_its_entry(tmp_path):
    done = run("--make-key", "team-a")
    assert done.exit_code == 0
    key = done.output.split("key, shown only now: ")[1].split()[0]
    entry = done.output[done.output.index("keys:\n") :]
    assert yaml.safe_load(entry)["keys"][0]["sha256"] == hash_key(key)
    path = tmp_path / "keys.yaml"
    path.write_text(entry)
    found = load_keys(path).find(key)
    assert found is not None
    assert found.name == "team-a"


@pytest.mark.slow
def test_a_process_answers_and_ends_at_sigterm():
    command = [sys.executable, "-m", "softprompts", "serve", "--model", "bundled", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = (json.loads(line) for line in process.stderr if line.startswith("{"))
        assert "thread" in next(line["plan"] for line in lines if line["message"] == "threads")
        url = next(line["url"] for line in lines if line["message"] == "listening")
        body = {"model": "bundled", "prompt": "The", "max_tokens": 3, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False)
        assert answer.json()["usage"]["completion_tokens"] == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
