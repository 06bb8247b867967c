"""The processes of one run: each hears at once when another one ends.

By collectives it does not. One in which a process is missing hangs until it times out, on GPUs after minutes,
and its error names an address at best.

So rank 0 keeps a connection to each other rank. The kernel closes it when a process ends, however that comes
about, and also when a machine gives no sign of life any more; no thread has to be scheduled for that, so that
a process which is busy for long is never taken for dead. Rank 0 tells the others. Who hears of a loss has
GRACE seconds to end in order (in a collective that fails), and is ended then.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.util import Finalize
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import get_int_from_env
from torch import distributed

from vtp.training.signals import immediate_signals

# Where torchrun, accelerate launch and MPI say how many processes they have started, as Accelerate reads it.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Of one collective, and of the start, until all processes are there. Not 10 minutes: Accelerate takes its own
# default for none given, and then PyTorch's, which depends on the backend, counts.
TIMEOUT = timedelta(minutes=15)
GRACE = 10.0  # seconds to end in order once another rank is gone
# A connection silent for IDLE seconds is probed every INTERVAL, PROBES times: then its machine is gone.
IDLE, INTERVAL, PROBES = 10, 5, 4
JOINING = 60.0  # seconds for all ranks to connect to rank 0, which all of them are about to do
NEWS = 2.0  # seconds in which the reason of an error comes, where it is another rank


class RankLostError(RuntimeError):
    """Another process of the run has ended; the message names it. `loss` says more."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(str(loss))
        self.loss = loss


@dataclass(frozen=True)
class Loss:
    """A process that ended before the run did.

    rank, who: which one, and its process and machine; why: the message that it ended with, or None if it said
    nothing, as one that is killed; status: what all processes of the run then exit with.
    """

    rank: int
    who: str
    why: str | None = None
    status: int = 1

    def __str__(self) -> str:
        name = f"rank {self.rank} ({self.who})"
        return f"{name} is gone without a word" if self.why is None else f"{name} failed: {self.why}"


def accelerator(precision: str = "no") -> Accelerator:
    """An Accelerator of this precision, for as many processes as were started; these then watch each other.

    Raises:
        ValueError: the machine cannot do that precision, or Accelerate does not see all of the processes,
            each of which would then train alone and write the same files.
        RankLostError: another process has ended already.
    """
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("config.precision: got 'fp16', expected 'no' or 'bf16' as there is no GPU")
    # Accelerate keeps one state per process and refuses a second precision. Stages may differ in it, and
    # nothing of a former stage still uses that state.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    started = get_int_from_env(WORLD_SIZES, 1)
    # Accelerate looks for several processes on a CPU only if told that there is nothing else.
    cpu = started > 1 and not torch.accelerator.is_available()
    limit = InitProcessGroupKwargs(timeout=TIMEOUT, init_method="vtp-env://")
    # While it waits for the others there is nothing to save, and it cannot be woken.
    with immediate_signals():
        made = Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=[limit])
    if made.num_processes != started:
        raise ValueError(
            f"WORLD_SIZE: {started} processes were started, but Accelerate sees {made.num_processes} on "
            f"{made.device}; expected the same number (unset WORLD_SIZE to train in one)"
        )
    _watch(made)
    return made


def begun_by_this_job(name: str) -> bool:
    """Whether this job has noted before that it has begun what is called `name`: it was restarted since.

    torchrun's agent starts all processes anew when one of them fails or a node joins, by the command as it
    was. What has begun is noted in the store of that agent, which lives as long as the job, so that what
    another job has left in a folder is none of it.

    Raises:
        ConnectionError: the agent is gone, and has left its processes behind.
    """
    store = _store_of_job()
    return store is not None and store.check([f"vtp/{name}"])


def note_begun(name: str) -> None:
    """Note for `begun_by_this_job`; nothing where torchrun has not started this process."""
    store = _store_of_job()
    if store is not None:
        store.set(f"vtp/{name}", "1")


def _rendezvous(url: str, timeout: timedelta = TIMEOUT, **rest: Any) -> Iterator[Any]:
    """PyTorch's "env://", in a part of the store that only this start of the processes uses.

    The store of torchrun's agent outlives a restart, with the addresses of the processes before: who reads
    one of them waits for it until the time is over. Each agent counts restarts by itself, so that the part
    can be named after them where there is one agent; with several TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes
    a store for each start.
    """
    store, *place = next(distributed.rendezvous("env://", timeout=timeout, **rest))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = distributed.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    yield store, *place


if distributed.is_available():
    distributed.register_rendezvous_handler("vtp-env", _rendezvous)


def _store_of_job() -> distributed.Store | None:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=GRACE))
    except distributed.DistError as error:
        raise ConnectionError(
            f"torchrun, which started this process, does not answer at {address}:{port} any more; expected "
            "it to live as long as its processes"
        ) from error


def blame(text: str, status: int, *, certain: bool) -> Loss | None:
    """The loss that an error of this process comes from; None if it is its own, as the others then hear.

    text, status: of the error, for the others. certain: whether it is known to be this one's own; one of a
    collective may come from the end of another rank, of which news are then waited for.
    """
    peers = _peers
    return None if peers is None else peers.blame(text, status, certain)


def rank() -> int | None:
    """That of this process; None where it is alone."""
    return None if _peers is None else _peers.rank


def exit_now(status: int) -> NoReturn:
    """End this process after an error, without what might wait for the other ranks."""
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


_peers: _Peers | None = None  # those of this process, from its first Accelerator to its end


def _watch(process: Accelerator) -> None:
    global _peers
    if process.num_processes > 1 and _peers is None:
        _peers = _Peers(process)
    if _peers is not None:
        _peers.check()


class _Peers:
    """The other processes, as far as this one hears of them: rank 0 of all, the others through rank 0."""

    def __init__(self, process: Accelerator) -> None:
        self.rank, self.world = process.process_index, process.num_processes
        self.who = f"process {os.getpid()} on {socket.gethostname()}"
        self.loss: Loss | None = None
        self._sending = threading.Lock()
        self._news = threading.Condition()  # of all that follows
        self._connections: dict[int, socket.socket] = {}
        self._finished: set[int] = set()
        self._connect(process)
        # Also in a process that multiprocessing has started, where nothing of atexit is called.
        Finalize(None, self._leave, exitpriority=0)
        if hasattr(os, "register_at_fork"):  # data workers outlive this process by seconds
            os.register_at_fork(after_in_child=self._forget)

    # -- connections

    def _connect(self, process: Accelerator) -> None:
        """Connections between rank 0 and each other one, and a thread that listens to each."""
        listener = _listener() if self.rank == 0 else None
        port, token = (listener.getsockname()[1], secrets.randbits(62)) if listener is not None else (0, 0)
        shared = torch.tensor([port, token], device=process.device)
        distributed.broadcast(shared, 0)
        port, token = shared.tolist()
        if listener is None:
            # The machine of rank 0 by the contract of this variable.
            address = os.environ.get("MASTER_ADDR", "127.0.0.1")
            connection = socket.create_connection((address, port), timeout=JOINING)
            hello = {"rank": self.rank, "who": self.who, "token": token}
            connection.sendall(json.dumps(hello).encode() + b"\n")
            messages = _messages(connection)
            answer = next(messages, None)
            if answer is None:
                raise ConnectionError("rank 0 ended before all ranks had connected to it")
            self._add(0, answer["who"], connection, messages)
        else:
            with listener:
                self._accept(listener, token)

    def _accept(self, listener: socket.socket, token: int) -> None:
        deadline = time.monotonic() + JOINING
        while len(self._connections) < self.world - 1:
            missing = sorted(set(range(1, self.world)) - self._connections.keys())
            listener.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                connection, _ = listener.accept()
            except TimeoutError as error:
                raise ConnectionError(
                    f"ranks {missing} did not connect to rank 0 within {JOINING:.0f} seconds, expected every "
                    "rank to reach any port of rank 0's machine"
                ) from error
            connection.settimeout(5.0)
            messages = _messages(connection)
            try:
                hello = next(messages)
                known = hello["token"] == token
            except (OSError, ValueError, KeyError, TypeError, StopIteration):
                known = False  # not one of ours
            if not known:
                connection.close()
                continue
            connection.sendall(json.dumps({"who": self.who}).encode() + b"\n")
            self._add(hello["rank"], hello["who"], connection, messages)

    def _add(self, other: int, who: str, connection: socket.socket, messages: Iterator[Any]) -> None:
        connection.settimeout(None)
        _probe_when_silent(connection)
        self._connections[other] = connection
        if self.loss is not None:  # of one that had connected before
            self._send(other, {"loss": asdict(self.loss)})
        threading.Thread(target=self._listen, args=(other, who, messages), daemon=True).start()

    def _listen(self, other: int, who: str, messages: Iterator[Any]) -> None:
        with suppress(OSError):  # reset, or no sign of life
            for message in messages:
                self._hear(other, message)
        if other not in self._finished:
            self._lose(Loss(other, who))

    def _hear(self, other: int, message: dict[str, Any]) -> None:
        if "loss" in message:
            self._lose(Loss(**message["loss"]))
            return
        with self._news:
            self._finished.add(other)  # the only other message

    def _send(self, other: int, message: dict[str, Any]) -> None:
        with suppress(OSError), self._sending:  # who is gone is heard of by reading
            self._connections[other].sendall(json.dumps(message).encode() + b"\n")

    def _forget(self) -> None:
        for connection in self._connections.values():
            connection.close()

    # -- losses

    def check(self) -> None:
        """Raises RankLostError if another rank has ended."""
        if self.loss is not None:
            raise RankLostError(self.loss)

    def _lose(self, loss: Loss) -> None:
        """Note the first loss; others follow from it."""
        with self._news:
            if self.loss is not None:
                return
            self.loss = loss
            self._news.notify_all()
        if self.rank == 0:
            for other in list(self._connections):  # some may be joining
                self._send(other, {"loss": asdict(loss)})
        if loss.rank != self.rank:
            threading.Thread(target=self._end, args=(loss,), daemon=True).start()

    def _end(self, loss: Loss) -> None:
        time.sleep(GRACE)
        if self.rank == 0 or loss.why is None:
            print(f"vtp: error: {loss}; rank {self.rank} ends too", file=sys.stderr)
        exit_now(loss.status)

    def blame(self, text: str, status: int, certain: bool) -> Loss | None:
        """See the function."""
        with self._news:
            if not certain:
                self._news.wait_for(lambda: self.loss is not None, NEWS)
            known = self.loss
        if known is None:
            own = Loss(self.rank, self.who, text, status)
            if self.rank == 0:
                self._lose(own)
            else:  # rank 0 says which of several was the first
                self._send(0, {"loss": asdict(own)})
                with self._news:
                    self._news.wait_for(lambda: self.loss is not None, NEWS)
            known = self.loss
        return None if known is None or known.rank == self.rank else known

    def _leave(self) -> None:
        """Tell the others that this process ends, and whether by an error that nobody has told them."""
        error = sys.exc_info()[1] or getattr(sys, "last_value", None)
        failed = error is not None and not (isinstance(error, SystemExit) and error.code in (None, 0))
        others = [0] if self.rank else list(self._connections)
        if failed and self.loss is None:
            message = {"loss": asdict(Loss(self.rank, self.who, f"{type(error).__name__}: {error}"))}
        else:
            message = {"finished": True}
        for other in others:
            self._send(other, message)


def _listener() -> socket.socket:
    """A socket at a free port of every address of this machine."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def _probe_when_silent(connection: socket.socket) -> None:
    """Have the kernel ask a silent machine whether it is there, so that the connection ends if it is not."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", IDLE), ("TCP_KEEPINTVL", INTERVAL), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, name):  # Linux has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # milliseconds; of what was sent and not confirmed
        limit = 1000 * (IDLE + INTERVAL * PROBES)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit)


def _messages(connection: socket.socket) -> Iterator[Any]:
    """What comes by a connection, one JSON text a line, until it ends.

    No file object: its socket would stay open in a fork, whatever the fork closes.
    """
    rest = b""
    while data := connection.recv(65536):
        *lines, rest = (rest + data).split(b"\n")
        yield from map(json.loads, lines)
