"""A real vLLM server on loopback, in its own environment (`make test-vllm` makes it)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch

PYTHON = os.environ.get("TRIMTAB_VLLM")  # of the environment that has vLLM


def make_policy(folder: Path) -> None:
    """A random Llama over 32 characters; vLLM's attention on a CPU takes heads of 32 and more."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab.rl.warmup import character_tokenizer

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    ids = dict(vocab_size=32, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, **heads, **ids, max_position_embeddings=256, initializer_range=0.2)
    )
    model.save_pretrained(folder)
    character_tokenizer("0123456789abcdef;", 32).save_pretrained(folder)


@contextlib.contextmanager
def serve(model: Path, *options: str, log: Path, dev: bool = True) -> Iterator[str]:
    """The address of a server that answers; ended with all its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON"))}
    environment |= {
        "VLLM_SERVER_DEV_MODE": str(int(dev)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it would take a core for itself
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # not `vllm serve`: its command asks for the version of a package `vllm`, and this is vllm-cpu
    arguments = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    arguments += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    arguments += ["--max-model-len", "256", "--max-num-seqs", "32", *options]
    with log.open("w") as output:
        process = subprocess.Popen(
            arguments, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(address, process, log)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"no answer from vLLM in 10 minutes: {log.read_text()[-4000:]}")
