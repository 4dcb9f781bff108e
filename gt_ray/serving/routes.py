"""Routes of everything that is answered at once; what they return is what OpenAPI says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from pydantic import BaseModel, Field

from gt_ray.curation.jobs import SIDES, model_settings
from gt_ray.serving.answers import UPDATE_FILE, ZIP, Answer, media_type
from gt_ray.serving.checkpoints import Description, block_norms, private_fine_tune
from gt_ray.serving.problems import ProblemError, documented
from gt_ray.serving.service import Service, in_thread, stage
from gt_ray.serving.tokens import Caller
from gt_ray.serving.uploads import BINARY, FIELD, LONGEST_TEXT, MULTIPART
from gt_ray.updates.pooling import Pooling
from gt_ray.updates.update_files import largest_file

router = APIRouter()
ALWAYS = (401, 429, 503, 504)
UPLOAD = (*ALWAYS, 400, 404, 413, 415, 422)
FILE = {"type": "string", "format": "binary"}


async def service_of(request: Request) -> Service:
    """The service that the application was made for."""
    service: Service = request.app.state.service
    return service


async def admitted(request: Request) -> AsyncIterator[Caller]:
    """Dependency of every route but health and page: whose request it is."""
    service = await service_of(request)
    with service.admitted(request) as caller:
        yield caller


Serving = Annotated[Service, Depends(service_of)]
Admitted = Annotated[Caller, Depends(admitted)]
CheckpointName = Annotated[
    str | None, Query(description="name of a checkpoint; without it the first that reads updates of their root")
]
PoolingName = Annotated[Pooling, Query(description="how several updates become one")]
Accept = Annotated[str | None, Header(include_in_schema=False)]


def uploads(most: str, *fields: str) -> dict[str, Any]:
    """A request body of update files, for OpenAPI."""
    texts = {name: {"type": "string", "maxLength": LONGEST_TEXT} for name in fields}
    several = {
        "type": "object",
        "properties": {FIELD: {"type": "array", "items": FILE, "description": most}} | texts,
        "required": [FIELD, *fields],
    }
    content: dict[str, Any] = {MULTIPART: {"schema": several}}
    if not fields:
        content[BINARY] = {"schema": FILE}
    return {"requestBody": {"required": True, "content": content}}


ADAPTER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the LLM adapter: a zipped PEFT folder, or by `Accept` an update file",
        "content": {ZIP: {"schema": FILE}, UPDATE_FILE: {"schema": FILE}},
        "headers": {
            "Gt-Ray-Checkpoint": {"description": "name, version and SHA-256", "schema": {"type": "string"}},
            "Gt-Ray-Estimate": {
                "description": "JSON: distance from the shadows, out_of_range, and the error that they let expect",
                "schema": {"type": "string"},
            },
        },
    }
}


async def adapter(answer: Answer, accept: str | None) -> Response:
    """The answer that a client asks for."""
    kind = media_type(accept)
    with stage("answer"):
        content = await in_thread(answer.update_T_Ld.nbytes, answer.content, kind)
    return file(content, kind, answer.headers)


def file(content: bytes, kind: str, headers: dict[str, str]) -> Response:
    """An adapter or update file to be saved."""
    name = "adapter.zip" if kind == ZIP else "update.safetensors"
    return Response(content, 200, {**headers, "Content-Disposition": f'attachment; filename="{name}"'}, kind)


class Model(BaseModel):
    """One model of a pair."""

    model: str = Field(
        description="Hub id, or the name that its provider uses", examples=["Qwen/Qwen2.5-0.5B-Instruct"]
    )
    root: str = Field(description="hash of the root that updates are differences from", examples=["4b5eaaf0d470..."])
    dtype: str = Field(description="of its frozen weights in a fine-tune", examples=["bfloat16"])
    lora: dict[str, Any] = Field(
        description="kind, rank, alpha, target modules",
        examples=[{"kind": "lora", "rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "k_proj"]}],
    )
    blocks: int = Field(description="L", examples=[24])
    width: int = Field(description="d", examples=[5632])


class CheckpointInfo(BaseModel):
    """One Grad-Transformer."""

    name: str
    version: str
    sha256: str = Field(description="of its weights")
    tinylm: Model
    llm: Model
    fine_tune: dict[str, Any] = Field(description="how its shadows were fine-tuned; clients do best to do the same")
    private_fine_tune: dict[str, Any] | None = Field(description="the same for clients with --epsilon, if it says so")
    tasks: list[str] = Field(description="tasks of its shadows")
    samples: int = Field(description="rows of a shadow")
    shadow_norms: list[dict[str, Any]] = Field(description="block norms of the shadows' updates: low, median, high")
    examples: list[dict[str, str]] = Field(description="prompts to try")


class Limits(BaseModel):
    """What a request may be."""

    update_bytes: int
    body_bytes: int
    updates: int
    requests_per_minute: int
    time_limit_s: float


class Info(BaseModel):
    """What the service is."""

    service: str
    checkpoints: list[CheckpointInfo] = Field(description="the first is the default")
    poolings: list[str]
    limits: Limits
    keeps: bool = Field(description="whether it has rounds and kept updates")
    tries: bool = Field(description="whether it answers prompts with an update")
    tokens: bool = Field(description="whether it asks for a token")


class Checked(BaseModel):
    """What is known of an update."""

    checkpoint: str = Field(description="that reads it", examples=["demo"])
    fine_tune: dict[str, Any] = Field(examples=[{"steps": 30, "learning_rate": 0.02, "batch_size": 16}])
    samples: int = Field(description="private rows that it was made from", examples=[256])
    mechanism: dict[str, Any] = Field(examples=[{"name": "dp-sgd", "epsilon": 4.0, "delta": 1e-5}])
    norms: list[dict[str, Any]] = Field(
        description="norm of each block, and the shadows' 5 %, 50 % and 95 % quantile",
        examples=[[{"block": "model.layers.0.self_attn", "norm": 2.2, "low": 1.1, "median": 2.2, "high": 2.7}]],
    )


class Tried(BaseModel):
    """Answers of the LLM."""

    base: str = Field(description="as it is", examples=["#### 10"])
    updated: str = Field(description="with the update", examples=["7+7=14\n#### 14"])


@router.get("/v1/info", responses=documented(*ALWAYS))
async def info(service: Serving, _: Admitted) -> Info:
    """The pair, its checkpoints, limits, and how clients do best to fine-tune."""
    known, settings = await service.backend.checkpoints(), service.settings
    return Info(
        service="gt-ray",
        checkpoints=[_checkpoint(one) for one in known],
        poolings=list(Pooling.__args__),  # type: ignore[attr-defined]
        limits=Limits(
            update_bytes=max(largest_file(one.roots["tinylm"]) for one in known),
            body_bytes=int(settings.max_upload_mb * 1e6),
            updates=settings.max_updates,
            requests_per_minute=settings.requests_per_minute,
            time_limit_s=settings.time_limit_s,
        ),
        keeps=service.rounds is not None,
        tries=service.backend.trial is not None,
        tokens=settings.tokens is not None,
    )


def _checkpoint(one: Description) -> CheckpointInfo:
    models = {
        side: Model(
            model=one.roots[side].public_name,
            root=one.roots[side].hash,
            dtype=model_settings(one.config, side).dtype,
            lora=one.roots[side].lora.model_dump(mode="json"),
            blocks=one.roots[side].layout.L,
            width=one.roots[side].layout.d,
        )
        for side in SIDES
    }
    return CheckpointInfo(
        name=one.name,
        version=one.version,
        sha256=one.sha256,
        **models,
        fine_tune=one.config.pair.tinylm.fine_tune.model_dump(mode="json"),
        private_fine_tune=private_fine_tune(one.config),
        tasks=list(one.config.data.tasks),
        samples=one.config.curation.samples,
        shadow_norms=one.shadow_norms,
        examples=one.examples,
    )


@router.get(
    "/v1/roots/{hash}",
    responses={200: {"content": {BINARY: {"schema": FILE}}}, **documented(*ALWAYS, 404, 422)},
    response_class=Response,
)
async def root(
    service: Serving, _: Admitted, hash: Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="of a root")]
) -> Response:
    """A root file: the exact initial adapter that updates are differences from."""
    for one in await service.backend.checkpoints():
        for found in one.roots.values():
            if found.hash == hash:
                return file(replace(found, base_model=found.public_name).to_bytes(), BINARY, {})
    raise ProblemError(404, f"no checkpoint of this service has root {hash}; /v1/info lists them")


@router.post("/v1/updates:check", responses=documented(*UPLOAD), openapi_extra=uploads("one update file"))
async def check(service: Serving, _: Admitted, request: Request, checkpoint: CheckpointName = None) -> Checked:
    """What would be read of an update; generates nothing."""
    content, _fields = await service.received_one(request)
    parsed = await service.parsed([content], checkpoint)
    one, told = parsed.checkpoint, parsed.infos[0]
    shadows = {known["block"]: known for known in one.shadow_norms}
    norms = block_norms(parsed.updates_NLd[0], one.roots["tinylm"].layout)
    return Checked(
        checkpoint=one.name,
        **asdict(told),
        norms=[{"block": name, "norm": norm} | shadows.get(name, {}) for name, norm in norms],
    )


@router.post(
    "/v1/updates:generate",
    responses=ADAPTER | documented(*UPLOAD, 406),
    response_class=Response,
    openapi_extra=uploads("one or several update files, which are pooled"),
)
async def generate(
    service: Serving,
    _: Admitted,
    request: Request,
    pooling: PoolingName = "mean",
    checkpoint: CheckpointName = None,
    accept: Accept = None,
) -> Response:
    """The LLM adapter of one client, or of several together. Nothing is kept."""
    media_type(accept)
    contents, _fields = await service.received(request)
    return await adapter(await service.generated(await service.parsed(contents, checkpoint), pooling), accept)


@router.post("/v1/updates:try", responses=documented(*UPLOAD), openapi_extra=uploads("one update file", "prompt"))
async def try_prompt(service: Serving, _: Admitted, request: Request, checkpoint: CheckpointName = None) -> Tried:
    """What the LLM says to a prompt, as it is and with the update that is generated."""
    content, fields = await service.received_one(request)
    prompt = fields.get("prompt", "").replace("\r\n", "\n")  # forms of browsers end lines so
    if not prompt.strip():
        raise ProblemError(400, "there is no text part named 'prompt'")
    answer = await service.generated(await service.parsed([content], checkpoint), "mean")
    llm = answer.checkpoint.roots["llm"]
    base, updated = await service.backend.answers(llm.hash, prompt, answer.update_T_Ld)
    return Tried(base=base, updated=updated)
