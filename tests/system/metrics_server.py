"""A server that loads first and forks then: each worker serves its metrics at a port of its own.

Says for each worker its number, process and port, and works until its standard input is closed.
"""

from __future__ import annotations

import os
import signal
import sys
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, Counter, make_wsgi_app
from prometheus_client.multiprocess import MultiProcessCollector

import precast
from precast import events
from precast.monitoring.prometheus import PrometheusCollector

REQUESTS = Counter("server_requests", "The server's own, by prometheus_client itself.")


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def serve(number: int, metrics: precast.MetricsCollector, collector: PrometheusCollector) -> None:
    for _ in range(number):
        metrics(events.CacheHit("key", "redis", 0.002, 100))
        REQUESTS.inc()
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    collector.register(registry)
    server = make_server("127.0.0.1", 0, make_wsgi_app(registry), handler_class=Quiet)
    sys.stdout.write(f"{number} {os.getpid()} {server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


def main() -> None:
    """Fork three workers, and end them when the input does."""
    metrics = precast.MetricsCollector()
    collector = PrometheusCollector(metrics, written_every_s=0.05)
    metrics(events.PieceCompiled("layer", "key", "aot_inductor", 3.0, 5000, 1))
    workers = []
    for number in (1, 2, 3):
        pid = os.fork()
        if pid == 0:
            serve(number, metrics, collector)
            os._exit(0)
        workers.append(pid)
    sys.stdin.read()
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
