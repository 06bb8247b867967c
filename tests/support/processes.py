"""Processes that start at once: forks of a server that has imported what takes seconds, and run nothing yet.

A fork of the test's own process would start as soon, but hangs where its parent has used threads before; a
process from scratch imports PyTorch again.
"""

import multiprocessing
from multiprocessing.context import ForkServerContext

# Nothing of the project. With timm comes Triton: the interpreter of kernels starts from scratch, as it has to
# set TRITON_INTERPRET before.
PRELOADED = ["torch", "torchvision", "timm"]


def forks() -> ForkServerContext:
    """The context whose processes are such forks. They have the environment of the first one's start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
