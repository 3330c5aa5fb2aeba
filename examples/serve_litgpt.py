"""Serve a LitGPT checkpoint behind an OpenAI-style endpoint: LitGPT's own server, patched by one variable.

    python examples/serve_litgpt.py checkpoints/EleutherAI/pythia-160m            # serves until Ctrl-C
    python examples/serve_litgpt.py CHECKPOINT_DIR --ask "What do llamas eat?"     # asks once, and ends

It is no more than `UPCAST=1 litgpt serve CHECKPOINT_DIR --openai_spec true`, and a client of a few lines. LitGPT's
server listens on all addresses of the machine. Convert a checkpoint that is not float16 once, so that workers share its
memory: `python -m upcast convert CHECKPOINT_DIR`. Needs `pip install 'torch-upcast[litgpt]' litserve jinja2`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PATIENCE = 300.0  # seconds for the server to come up


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_DIR", help="a LitGPT checkpoint folder")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tokens", type=int, default=50, help="the longest answer")
    parser.add_argument("--ask", metavar="QUESTION", help="ask this, print the answer, and end")
    options = parser.parse_args()
    settings = ["--port", str(options.port), "--max_new_tokens", str(options.tokens), "--accelerator", "cpu"]
    server = subprocess.Popen(
        [sys.executable, "-m", "litgpt", "serve", str(options.checkpoint), "--openai_spec", "true", *settings],
        env={**os.environ, "UPCAST": "1"},
        start_new_session=True,  # its workers are ended with it
    )
    try:
        if options.ask is None:
            return server.wait()
        wait_for(server, options.port)
        print(ask(options.port, options.ask))
    except KeyboardInterrupt:
        pass
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    return 0


def wait_for(server: "subprocess.Popen[bytes]", port: int) -> None:
    """Return when the server has its model; its health check says so."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"the server did not answer within {PATIENCE:.0f} s")


def ask(port: int, question: str) -> str:
    """Return the answer to one question, asked as any client of OpenAI's protocol does."""
    content = {"model": "any", "messages": [{"role": "user", "content": question}]}
    address, headers = f"http://127.0.0.1:{port}/v1/chat/completions", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(content).encode(), headers)) as response:
        answer: dict[str, Any] = json.load(response)
    return str(answer["choices"][0]["message"]["content"])


if __name__ == "__main__":
    sys.exit(main())
