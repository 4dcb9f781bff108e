"""What Prometheus reads of the endpoint, beside Serve's own metrics (latency, queue, replicas): Ray's metrics port.

The generators' busy share is `rate(gt_ray_generator_busy_s_total)` over their number.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Histogram

REQUESTS = Counter("gt_ray_requests", "Requests that were answered.", tag_keys=("route", "status"))
STAGE_MS = Histogram(
    "gt_ray_stage_ms",
    "Milliseconds of a stage of a generation: read, check, generate (queue included), answer.",
    boundaries=[1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 30000],
    tag_keys=("stage",),
)
BATCH_SIZE = Histogram(
    "gt_ray_batch_size", "Updates of one pass of a Grad-Transformer.", boundaries=[1, 2, 4, 8, 16, 32]
)
BUSY = Counter("gt_ray_generator_busy_s", "Seconds that generators have computed.")
