"""Clusters of several nodes on this machine, for tests that break them."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

NO_DASHBOARD = {"include_dashboard": False}
SYSTEM_CONFIG = {
    # A node that is gone is missed after seconds instead of half a minute.
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    # On a busy machine a worker process takes longer than Ray's minute to start, and would be started again.
    "worker_register_timeout_seconds": 300,
}


class Nodes:
    """A Ray cluster on this machine: a head without CPUs for the driver, nodes of one CPU each for the work.

    Args:
        head: further arguments of the head's `ray start`.
    """

    def __init__(self, **head: Any) -> None:
        from ray.cluster_utils import Cluster

        arguments = {"num_cpus": 0, "_system_config": SYSTEM_CONFIG, **NO_DASHBOARD, **head}
        self.cluster = Cluster(initialize_head=True, head_node_args=arguments)

    def add(self) -> Any:
        """One more node."""
        return self.cluster.add_node(num_cpus=1)

    def kill(self, node: Any) -> None:
        """A node's processes are killed, without a word to the others."""
        self.cluster.remove_node(node, allow_graceful=False)

    def working(self) -> list[Any]:
        """All nodes but the head."""
        return list(self.cluster.worker_nodes)

    def set_size(self, n: int) -> None:
        """Add or remove nodes until there are `n`; a test may have left others."""
        while len(self.working()) > n:
            self.cluster.remove_node(self.working()[0])
        while len(self.working()) < n:
            self.add()

    @contextmanager
    def driver(self, setup: Callable[[], None] | None = None) -> Iterator[None]:
        """This process as a driver of the cluster.

        Args:
            setup: what every worker process calls before it works.
        """
        import ray

        environment = {"worker_process_setup_hook": setup} if setup else None
        ray.init(address=self.cluster.address, runtime_env=environment, log_to_driver=False, logging_level="ERROR")
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def private_cluster(**head: Any) -> Iterator[Nodes]:
    """A cluster that no other Ray program on this machine finds, or is found by."""
    folder = tempfile.mkdtemp(prefix="gt-ray-")  # short, since the paths of sockets may not be long
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        nodes = Nodes(**head)
        try:
            yield nodes
        finally:
            nodes.cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def workers_of(nodes: list[Any], name: str) -> list[psutil.Process]:
    """The processes on these nodes that Ray has given that name."""
    found = []
    for node in nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in raylet.children():
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:  # it has ended since
                continue
    return found


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
