"""A check in a process of its own, which may end it or never end."""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from . import check
from .networks import Network, networks

SECONDS = 120

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.zoo.check", "segmentation_models_pytorch", "monai.networks.nets"])


def alone(name: str, *steps: Callable[[Network], check.Result]) -> list[check.Result]:
    """The results of checks of a network, or their errors, in a process of their own."""
    receive, send = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_send, args=(send, name, [step.__name__ for step in steps]))
    process.start()
    send.close()
    try:
        return [_received(receive, process) for _ in steps]
    finally:
        process.kill()
        process.join()


def _received(connection: Connection, process: BaseProcess) -> check.Result:
    try:
        return connection.recv() if connection.poll(SECONDS) else {"error": f"takes more than {SECONDS} s"}
    except EOFError:
        process.join()
        return {"error": f"ends the process: {signal.Signals(-(process.exitcode or 0)).name}"}


def _send(connection: Connection, name: str, steps: list[str]) -> None:
    warnings.simplefilter("ignore")  # other people's
    torch.set_num_threads(1)
    for step in steps:
        try:
            connection.send(getattr(check, step)(networks()[name]))
        except check.RefusedError as error:
            connection.send({"refused": str(error)})
        except Exception as error:
            first = str(error).split("\n")[0].split(". ")[0]
            connection.send({"error": f"{type(error).__name__}: {first}"})
