"""Running a function in several processes that train together."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback

import torch

from pet_finetune import launchers, processes


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(count, function, *arguments, joins=True):
    """What the function gives in each of several processes, forked from this one; in their order.

    A process that ends without a result gives its exit status.
    """
    port, context = free_port(), multiprocessing.get_context("fork")
    pipes, children = [], []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        launch = launchers.Launch(rank, count, rank, "127.0.0.1", port, "torchrun")
        child = context.Process(target=_run, args=(launch, sender, function, arguments, joins))
        child.start()
        sender.close()
        pipes.append(receiver)
        children.append(child)
    results = [_answer(*pair, children) for pair in zip(pipes, children, strict=True)]
    for child in children:
        child.join(20)
        child.kill()
    return results


def _answer(receiver, child, children):
    """What a child gave; nobody waits for one that stands still when others have ended."""
    waited = 0
    while not receiver.poll(0.5):
        waited += any(other.exitcode for other in children)
        if waited > 60:  # half seconds; the machine may be busy
            child.kill()
            return "no answer"
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        child.join(20)
        return child.exitcode


def _run(launch, sender, function, arguments, joins):
    torch.set_num_threads(1)
    try:
        if joins:
            with processes.joined(launch, torch.device("cpu")):
                result = function(*arguments)
        else:
            result = function(launch, *arguments)
        sender.send_bytes(pickle.dumps(result))  # torch's own way needs the process to live on
    except Exception:  # noqa: BLE001 - whatever it is, the parent has to know
        traceback.print_exc()
        sender.close()
        os._exit(3)
    sender.close()
    os._exit(0)
