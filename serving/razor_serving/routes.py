"""Read-only routes: the policy, what it holds, which heads retrieve, how many requests fit."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, Literal, get_args

import torch
from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as AnyHTTPException
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from razor_serving import schemas
from razor_serving.access import OUR_PREFIX
from razor_serving.reader import WAIT_SECONDS, EngineStopping, MemoryReader, Reading
from razor_vllm.config import KVPolicy, RazorConfig, config_of, profile_of
from razor_vllm.foreign import ForeignLayers
from razor_vllm.heads.profile import HeadProfile
from razor_vllm.partition import RankHeads, partition, pipeline_stages
from razor_vllm.plan import MemoryPlan, PoolSizes
from razor_vllm.policy import DENSE_TOKENS_KEY, REQUEST_KEY
from razor_vllm.report import Capacity, mix_memory, request_memory
from razor_vllm.turns import turn_of

logger = init_logger("vllm.razor")

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "Bad parameter"},
    401: {"model": ErrorResponse, "description": "No API key, where the server has one"},
    500: {"model": ErrorResponse, "description": "A fault of the server; its log has it"},
    503: {"model": ErrorResponse, "description": "The engine is gone, stopping, or in a step"},
}


class Guarded(APIRoute):
    """A route that distinguishes an engine that cannot answer from a fault of ours.

    vLLM's handlers would turn a `ValueError` of ours into a 400 for the client, without a
    line in the log.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handle(request)
            except (AnyHTTPException, RequestValidationError, VLLMValidationError):
                raise
            except EngineDeadError:
                raise HTTPException(503, "The engine is not running") from None
            except EngineStopping:
                raise HTTPException(503, "The server is shutting down") from None
            except TimeoutError:
                late = f"The engine is in a step that takes more than {WAIT_SECONDS:.0f} s"
                raise HTTPException(503, late, {"Retry-After": "10"}) from None
            except Exception as error:
                logger.exception("%s %s failed", request.method, request.url.path)
                told = f"{type(error).__name__} in the server; its log has the traceback"
                raise HTTPException(500, told) from error

        return guarded


router = APIRouter(prefix=OUR_PREFIX, tags=["razor"], responses=_ERRORS, route_class=Guarded)


class Service:
    """What the routes answer from.

    Args:
        engine_client: vLLM's, of an engine under the policy.
    """

    def __init__(self, engine_client: EngineClient) -> None:
        self.vllm_config: VllmConfig = engine_client.vllm_config
        config = config_of(self.vllm_config.additional_config)
        assert config is not None, "the policy was not asked for"
        self.config: RazorConfig = config
        self.profile: HeadProfile = profile_of(self.vllm_config.additional_config)
        self.reader = MemoryReader(engine_client)
        self._picture: bytes | None = None
        self._drawing = asyncio.Lock()

    def ranks(self) -> tuple[RankHeads, ...]:
        """Heads of every rank."""
        parallel = self.vllm_config.parallel_config
        stages = pipeline_stages(self.profile.num_layers, parallel.pipeline_parallel_size)
        return partition(self.profile, parallel.tensor_parallel_size, stages)

    async def memory(self, list_requests: bool = False) -> Reading:
        """The engines' figures, as `MemoryReader.read` gives them and raises."""
        return await self.reader.read(list_requests)

    async def plan(self) -> tuple[MemoryPlan, dict[str, Any]]:
        """The plan of the first engine's pools, and that engine's figures."""
        figures = (await self.memory()).engines[0]
        sizes = {pool["name"]: pool["block_size"] for pool in figures["pools"]}
        # With one kind of head there is one pool, and the other's size does not matter.
        one = next(iter(sizes.values()))
        blocks = PoolSizes(sizes.get("retrieval", one), sizes.get("local", one))
        dtype = getattr(torch, figures["dtype"])
        foreign = tuple(ForeignLayers(**layers) for layers in figures["foreign_layers"])
        plan = MemoryPlan(
            self.config,
            self.ranks()[0],
            dtype,
            blocks,
            figures["full_block_size"],
            foreign,
            figures["page_bytes"],
        )
        return plan, figures

    async def picture(self) -> bytes:
        """The head map as PNG; drawn once."""
        async with self._drawing:
            if self._picture is None:
                self._picture = await asyncio.to_thread(_draw, self.profile)
        return self._picture


def _draw(profile: HeadProfile) -> bytes:
    import matplotlib

    from razor_vllm.show import picture

    matplotlib.use("Agg")
    return picture(profile)


def _service(request: Request) -> Service:
    service: Service | None = getattr(request.app.state, "razor", None)
    if service is None:
        raise HTTPException(503, "This server has no engine under the policy razor")
    return service


ServiceOf = Annotated[Service, Depends(_service)]


@router.get("/policy", summary="The policy, the head profile in numbers, slots and pages")
async def get_policy(service: ServiceOf) -> schemas.Policy:
    """The policy as the engine runs it."""
    plan, figures = await service.plan()
    config, profile, model = service.config, service.profile, service.vllm_config.model_config
    padding = plan.padding_share()
    return schemas.Policy(
        model=str(model.served_model_name),
        config=schemas.PolicyConfig(
            window=config.window,
            window_ratio=config.window_ratio,
            sinks=config.sinks,
            prefill=config.prefill,
            first_turn_ends_with=list(turn_of(service.vllm_config.additional_config).marker),
            compensation=config.compensation,
        ),
        heads=schemas.HeadSummary(
            num_layers=profile.num_layers,
            num_kv_heads=profile.num_kv_heads,
            head_size=profile.head_size,
            num_retrieval_heads=profile.num_retrieval_heads,
            retrieval_share=profile.num_retrieval_heads / profile.num_heads,
            made_by=dict(profile.made_by),
        ),
        ranks=[_slots(number, rank) for number, rank in enumerate(service.ranks())],
        page=schemas.PageShape(
            bytes=figures["page_bytes"],
            retrieval_tokens=plan.blocks.retrieval,
            local_tokens=plan.blocks.local,
            retrieval_padding=padding[0],
            local_padding=padding[1],
            tables=plan.num_tables,
            hit_tokens=plan.hit_tokens,
        ),
        other_layers=[
            schemas.OtherLayers(
                kind=layers.kind,
                layers=layers.num_layers,
                groups=layers.num_groups(plan.page_bytes),
                tokens_per_page=None if layers.is_state else layers.block_size,
                layer_page_bytes=layers.page_bytes,
            )
            for layers in plan.foreign
        ],
        kv_dtype=figures["dtype"],
        max_model_len=model.max_model_len,
        per_request=schemas.RequestPolicies(
            field=f"vllm_xargs.{REQUEST_KEY}",
            accepted=list(get_args(KVPolicy)),
            dense_tokens_field=f"vllm_xargs.{DENSE_TOKENS_KEY}",
        ),
        longest=_length(plan, model.max_model_len, 1.0, _capacity(plan, figures)),
    )


def _slots(number: int, rank: RankHeads) -> schemas.RankSlots:
    return schemas.RankSlots(
        rank=number,
        layers=list(rank.layers),
        retrieval_slots=rank.retrieval_quota,
        local_slots=rank.local_quota,
        promoted=list(rank.promoted),
    )


@router.get("/memory", summary="Pages and bytes by pool and state, against the full policy")
async def get_memory(
    service: ServiceOf,
    requests: Annotated[bool, Query(description="List the requests that hold pages.")] = False,
) -> schemas.Memory:
    """What the pools hold now. Figures of an engine in a long step may be some seconds old."""
    reading = await service.memory(requests)
    return schemas.Memory(
        age_seconds=reading.age,
        engines=[_engine(i, figures, requests) for i, figures in enumerate(reading.engines)],
    )


def _engine(index: int, figures: dict[str, Any], list_requests: bool) -> schemas.EngineMemory:
    size = figures["page_bytes"]

    def amount(pages: int) -> schemas.Amount:
        return schemas.Amount(pages=pages, bytes=pages * size)

    pools = [
        schemas.PoolMemory(
            name=pool["name"],
            slots=pool["slots"],
            tokens_per_page=pool["block_size"],
            held=amount(pool["held"]),
            cached=amount(pool["cached"]),
            prefix_cache_hit_tokens=pool["prefix_cache_hit_tokens"],
        )
        for pool in figures["pools"]
    ]
    return schemas.EngineMemory(
        engine=index,
        page_bytes=size,
        total=amount(figures["pages"]),
        free=amount(figures["free"]),
        pools=pools,
        other_layers=schemas.OtherMemory(
            groups=figures["foreign"]["groups"],
            held=amount(figures["foreign"]["held"]),
            cached=amount(figures["foreign"]["cached"]),
        ),
        against_full=_against_full(figures),
        requests=schemas.Requests(
            running=figures["num_running"],
            waiting=figures["num_waiting"],
            holding_pages=figures["num_resident"],
            by_policy=figures["requests_by_policy"],
            preemptions=figures["preemptions"],
            dropped_tokens=figures["dropped_tokens"],
        ),
        integrity=schemas.Integrity(**figures["integrity"]),
        by_request=_requests(figures["requests"]) if list_requests else None,
    )


def _against_full(figures: dict[str, Any]) -> schemas.AgainstFull:
    held, full = figures["request_bytes"], figures["full_bytes"]
    return schemas.AgainstFull(
        bytes=held,
        full_policy_bytes=full,
        saved_bytes=full - held,
        kept_share=held / full if full else None,
        kept_share_by_layer=list(figures["layer_kept"]),
    )


def _requests(rows: Sequence[dict[str, Any]]) -> list[schemas.RequestMemory]:
    return [
        schemas.RequestMemory(
            full_policy_bytes=row["full_bytes"],
            **{name: value for name, value in row.items() if name != "full_bytes"},
        )
        for row in rows
    ]


@router.get(
    "/heads",
    summary="Which KV heads retrieve",
    response_model=schemas.Heads,
    responses={
        200: {"content": {"image/png": {}}, "description": "The map; a picture where asked for."},
        406: {"model": ErrorResponse, "description": "Neither JSON nor PNG is accepted"},
    },
)
async def get_heads(
    service: ServiceOf, accept: Annotated[str, Header(max_length=1024)] = "*/*"
) -> Response:
    """The head map as JSON, or as a picture where `Accept` prefers `image/png`."""
    form = preferred_form(accept)
    if form is None:
        raise HTTPException(406, "Accepted are application/json and image/png")
    if form == "image/png":
        return Response(await service.picture(), media_type="image/png", headers=_VARIES)
    profile = service.profile
    heads = schemas.Heads(
        num_layers=profile.num_layers,
        num_kv_heads=profile.num_kv_heads,
        other_layers=list(profile.other_layers),
        retrieval_heads=[list(row) for row in profile.retrieval_heads],
        scores={name: [list(row) for row in rows] for name, rows in profile.scores.items()},
    )
    return JSONResponse(heads.model_dump(), headers=_VARIES)


_VARIES = {"Vary": "Accept"}
Form = Literal["application/json", "image/png"]


def preferred_form(accept: str) -> Form | None:
    """The form that an `Accept` header prefers; JSON if it prefers neither."""
    wishes = [_wish(part) for part in accept.split(",") if part.strip()]
    best: Form | None = None
    best_quality = 0.0
    for form in get_args(Form):
        kind = form.split("/")[0]
        for pattern in (form, f"{kind}/*", "*/*"):  # the most specific one counts
            found = [quality for name, quality in wishes if name == pattern]
            if found:
                if max(found) > best_quality:
                    best, best_quality = form, max(found)
                break
    return best


def _wish(part: str) -> tuple[str, float]:
    """Media range and quality of one element; a quality that is not a number counts as 0."""
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            try:
                return name, min(max(float(value), 0.0), 1.0)
            except ValueError:
                return name, 0.0
    return name, 1.0


@router.post(
    "/estimate",
    summary="How many requests of given lengths fit",
    responses={413: {"model": ErrorResponse, "description": "The body is too large"}},
)
async def estimate(body: schemas.EstimateRequest, service: ServiceOf) -> schemas.Estimate:
    """Requests that fit at a time while they decode, under the policy and under stock vLLM."""
    longest = service.vllm_config.model_config.max_model_len
    for index, entry in enumerate(body.mix):
        if entry.tokens > longest:
            raise VLLMValidationError(
                f"tokens is {entry.tokens}; accepted are 1 to {longest}, the model's length",
                parameter=f"mix.{index}.tokens",
            )
    plan, figures = await service.plan()
    memory = body.kv_memory_bytes
    capacity = _capacity(plan, figures) if memory is None else Capacity.of(plan, memory)
    mix: dict[int, float] = {}
    for entry in body.mix:
        mix[entry.tokens] = mix.get(entry.tokens, 0.0) + entry.weight
    mean = mix_memory(plan, mix, capacity)
    return schemas.Estimate(
        kv_memory_bytes=capacity.pages * plan.page_bytes,
        mean_bytes=mean.held,
        mean_full_policy_bytes=mean.full,
        fit=mean.fit,
        fit_full_policy=mean.fit_full,
        lengths=[_length(plan, n, weight, capacity) for n, weight in sorted(mix.items())],
    )


def _capacity(plan: MemoryPlan, figures: dict[str, Any]) -> Capacity:
    """Of the engine's own memory."""
    return Capacity.of(plan, (figures["pages"] + 1) * plan.page_bytes)  # vLLM keeps one page


def _length(
    plan: MemoryPlan, num_tokens: int, weight: float, capacity: Capacity
) -> schemas.LengthMemory:
    memory = request_memory(plan, num_tokens, capacity)
    return schemas.LengthMemory(
        tokens=num_tokens,
        weight=weight,
        bytes=memory.held,
        full_policy_bytes=memory.full,
        prefill_bytes=memory.prefill,
        fit=memory.fit,
        fit_full_policy=memory.fit_full,
        waiting_bytes=memory.waiting,
        fit_waiting=memory.fit_waiting,
        fit_waiting_full_policy=memory.fit_waiting_full,
    )
