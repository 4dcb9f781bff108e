"""What a provider sets in a Serve config (serve_configs/): `args` of the application, `user_config` of deployments."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from gt_ray.config import Section


class ServeSettings(Section):
    """`args` of the application."""

    tokens: Path | None = Field(
        None, description="file of API tokens (`gt-ray tokens add`); none: no authentication, for loopback only"
    )
    state: Path | None = Field(
        None, description="SQLite file of rounds and kept updates; none: there are none, and nothing is ever kept"
    )
    keep_hours: float = Field(168, gt=0, description="hours after which rounds and kept updates are removed")
    max_kept: int = Field(100, ge=1, description="rounds and kept updates of one token")
    max_updates: int = Field(32, ge=1, description="update files of one request or round")
    max_upload_mb: float = Field(64, gt=0, description="size of one request's body, in MB")
    max_requests: int = Field(1000, ge=1, description="requests that one ingress replica holds at once; more get 503")
    max_held_mb: float = Field(
        1000, gt=0, description="bodies of the requests that one ingress replica holds at once, in MB; more get 503"
    )
    requests_per_minute: int = Field(600, ge=1, description="of one token at one ingress replica; more get 429")
    time_limit_s: float = Field(60, gt=0, description="seconds until a request is given up with 504")
    try_llm: bool = Field(
        False, description="load the default checkpoint's LLM, so that clients can try a prompt with their update"
    )


class CheckpointSettings(Section):
    """One Grad-Transformer."""

    run: Path = Field(description="run folder (`runs/<name>`), as the replicas see it")
    version: str = Field("1", description="change it when the run's files have changed, or they are not read again")


class GeneratorSettings(Section):
    """`user_config` of the Generator; a change is applied to running replicas."""

    checkpoints: dict[str, CheckpointSettings] = Field(min_length=1, description="by name; the first is the default")
