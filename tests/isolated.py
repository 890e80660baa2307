"""Calls that may kill their process, or never end: each runs in a process of its own.

A server imports sasa once and forks for every call, which so takes milliseconds. It computes nothing itself, as threads
that exist do not survive a fork. Calls are text; names are :func:`attempt` and those of :data:`PRELUDE`.
"""

from __future__ import annotations

import ast
import atexit
import functools
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PRELUDE = """
import warnings
import numpy as np
import torch
from torch import nn
import sasa
from sasa import AttentionStem, RelativeSelfAttention, conversion_report, convert, local_attention
from sasa import local_attention_weights
"""
MEMORY = 2**31  # bytes that a call may ask for beyond what the server has
SECONDS = 20


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        value: of the last expression, as JSON has it; None after an error.
        error: the exception's class; None for none.
        message: the exception's.
        ended: how the process did if it did not end by itself: "SIGSEGV", "SIGALRM" after ``SECONDS``.
        megabytes: by which the process has grown at most.
    """

    value: object = None
    error: str | None = None
    message: str = ""
    ended: str | None = None
    megabytes: float = 0.0


@functools.cache
def _server() -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen([sys.executable, __file__], **pipes, text=True, env=environment)
    atexit.register(server.communicate)  # closes the pipe, at the end of which the server ends
    return server


def run(code: str) -> Outcome:
    """The outcome of statements and a last expression."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(code) + "\n")
    server.stdin.flush()
    return Outcome(**json.loads(server.stdout.readline()))


def attempts(setup: str, calls: Sequence[str]) -> list[dict]:
    """What :func:`attempt` says of each of the calls, which share a process unless one of them ends it.

    The end of the process counts as the call's error.
    """
    outcome = run(f"{setup}\n[{', '.join(f'attempt(lambda: {call})' for call in calls)}]")
    if outcome.ended is None:
        assert outcome.error is None, outcome
        assert isinstance(outcome.value, list)
        return outcome.value
    if len(calls) == 1:
        return [{"error": outcome.ended, "message": ""}]
    return [attempts(setup, [call])[0] for call in calls]


def attempt(call: Callable[[], object]) -> dict:
    """What a call returns, or the error that it raises, as JSON has them; for the code of a call."""
    try:
        return {"value": call()}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def _call(code: str, names: dict) -> dict:
    *statements, last = ast.parse(code).body
    assert isinstance(last, ast.Expr)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        exec(compile(ast.Module(statements, []), "<call>", "exec"), names)
        outcome = {"value": eval(compile(ast.Expression(last.value), "<call>", "eval"), names)}
    except BaseException as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return outcome | {"megabytes": grown / 2**10}


def _serve() -> None:
    names: dict = {"attempt": attempt}
    exec(PRELUDE, names)
    names["warnings"].simplefilter("error")
    names["warnings"].filterwarnings("ignore", "num_heads.*one channel wide")
    names["torch"].set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            limit = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(SECONDS)
            os.write(write, json.dumps(_call(json.loads(line), names)).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        outcome = json.loads(text) if text else {"ended": signal.Signals(-code).name if code < 0 else f"exit {code}"}
        print(json.dumps(outcome), flush=True)  # noqa: T201


if __name__ == "__main__":
    _serve()
