"""Where one request's time went: spans in OpenTelemetry's form, W3C trace context, OTLP over HTTP.

    POST /digit     from its first byte to its answer; the caller's span is its parent
    ├── read        the body read
    ├── queue       waiting for a batch
    ├── decode      the inputs of that batch turned into tensors; where that is long work, or they are
    │               texts, before the queue, and reading is part of it
    ├── run         a batch in the network; linked to that batch
    └── answer      rows turned into an answer
    batch           of a trace of its own; linked to every traced request in it

Nothing of this is loaded unless `QUINTET_TRACE_URL` is set: then the doors and the batchers are
those of this module, which do what the plain ones do and take notes. Spans hold names and numbers,
never what was sent.
"""

import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.batcher import Batcher, Job, Ran
from service.data_plane import DataPlane
from service.errors import QuintetError
from service.grpc_api import GrpcDoor
from service.grpc_calls import Answered, Call, Tell
from service.http import Request, Response
from service.http2 import literal
from service.metrics import Board
from service.models.spec import Inputs, Sample
from service.rest import RestDoor
from service.version import VERSION

RESPONSE: Final = "traceresponse"
"""Tells callers which trace their request is in (W3C Trace Context, level 2)."""


class Turn(NamedTuple):
    """A batch that some of a job's samples ran in; moments by `time.perf_counter`.

    Attributes:
        batch: Its span.
        started: When it began; samples that were not made before, were made from then on.
        decoded: When they were, and the network began.
        ended: When the network had run.
    """

    batch: SpanContext
    started: float
    decoded: float
    ended: float


class Trace:
    """What is noted of one request until it is answered."""

    __slots__ = ("jobs", "offset_ns", "span", "started", "tracer")

    def __init__(self, tracer: "Tracer", span: Span, started: float, offset_ns: int) -> None:
        self.tracer = tracer
        self.span = span
        self.started = started
        self.offset_ns = offset_ns
        self.jobs: list[TracedJob] = []

    @property
    def is_recorded(self) -> bool:
        """Whether anybody will see it."""
        return self.span.is_recording()

    @property
    def id(self) -> str:
        """That of the trace, as the log's lines have it."""
        return f"{self.span.get_span_context().trace_id:032x}"

    @property
    def response(self) -> str:
        """The value of `traceresponse`."""
        context = self.span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


CURRENT: ContextVar[Trace | None] = ContextVar("trace", default=None)
"""That of the request that is being answered here."""


class Tracer:
    """Makes spans, and sends them."""

    def __init__(self, url: str, share: float) -> None:
        """Send spans to the OTLP receiver at `url`.

        Args:
            url: Of its HTTP door; `/v1/traces` is appended.
            share: Of the requests whose caller has not decided, those that are traced.
        """
        resource = Resource.create({"service.name": "quintet", "service.version": VERSION})
        processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{url.rstrip('/')}/v1/traces"))
        self._providers: list[TracerProvider] = []

        def tracer(sampler: Sampler) -> Any:
            provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
            provider.add_span_processor(processor)
            self._providers.append(provider)
            return provider.get_tracer("quintet", VERSION)

        self._requests = tracer(ParentBased(TraceIdRatioBased(share)))
        # Of batches those with a traced request in them, and those surely.
        self._batches = tracer(ALWAYS_ON)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, traceparent: bytes | None, tracestate: bytes | None) -> Trace:
        """Note that a request has come; both are the caller's headers of that name."""
        started = time.perf_counter()
        offset_ns = time.time_ns() - int(started * 1e9)
        carrier = {}
        if traceparent is not None:
            carrier["traceparent"] = traceparent.decode("latin-1")
        if tracestate is not None:
            carrier["tracestate"] = tracestate.decode("latin-1")
        span = self._requests.start_span(
            "request",
            context=self._propagator.extract(carrier, Context()),
            kind=SpanKind.SERVER,
            start_time=_ns(started, offset_ns),
        )
        return Trace(self, span, started, offset_ns)

    def end(
        self, trace: Trace, name: str, asked: tuple[str, str] | None, outcome: str, *, is_our_fault: bool
    ) -> None:
        """Note that it is answered; `name`, `outcome` and the model and version are of closed sets."""
        if not trace.is_recorded:
            return
        span, ended = trace.span, time.perf_counter()
        span.update_name(name)
        span.set_attribute("quintet.outcome", outcome)
        if asked is not None:
            span.set_attribute("quintet.model", asked[0])
            span.set_attribute("quintet.version", asked[1])
        if is_our_fault:
            span.set_status(Status(StatusCode.ERROR))
        for job in trace.jobs:
            # Inputs are decoded before they are queued, or with the batch that they run in.
            self._part(trace, "decode" if job.is_made else "read", trace.started, job.entered)
            if job.turns:
                # Who came decoded waits until the others of the batch are.
                first = job.turns[0]
                self._part(trace, "queue", job.entered, first.decoded if job.is_made else first.started)
                for turn in job.turns:
                    if not job.is_made:
                        self._part(trace, "decode", turn.started, turn.decoded)
                    self._part(trace, "run", turn.decoded, turn.ended, [Link(turn.batch)])
                self._part(trace, "answer", job.turns[-1].ended, ended)
            span.set_attribute("quintet.inputs", job.count)
        span.end(_ns(ended, trace.offset_ns))

    def _part(
        self, trace: Trace, name: str, started: float, ended: float, links: Sequence[Link] = ()
    ) -> None:
        parent = _within(trace.span)
        offset_ns = trace.offset_ns
        part = self._requests.start_span(
            name, context=parent, links=links, start_time=_ns(started, offset_ns)
        )
        part.end(_ns(max(started, ended), offset_ns))

    def batch(self, traces: Sequence[Trace], size: int, started: float, ended: float) -> SpanContext:
        """Note a batch that these requests had samples in."""
        offset_ns = traces[0].offset_ns
        span = self._batches.start_span(
            "batch",
            context=Context(),
            links=[Link(trace.span.get_span_context()) for trace in traces],
            attributes={"quintet.batch_size": size},
            start_time=_ns(started, offset_ns),
        )
        span.end(_ns(ended, offset_ns))
        context: SpanContext = span.get_span_context()
        return context

    def close(self) -> None:
        """Send what is left; blocks."""
        for provider in self._providers:
            provider.shutdown()


class TracedJob(Job):
    """A job that knows whose it is, and which batches it was in."""

    __slots__ = ("trace", "turns")

    def __init__(
        self,
        inputs: Sequence[Inputs],
        samples: list[Sample] | None,
        deadline: float | None,
        on_done: Callable[[Job], None],
    ) -> None:
        super().__init__(inputs, samples, deadline, on_done)
        self.turns: list[Turn] = []
        self.trace = CURRENT.get()
        if self.trace is not None:
            self.trace.jobs.append(self)


class TracedBatcher(Batcher):
    """A batcher that notes its batches."""

    job_type = TracedJob

    def _finish(self, ran: Ran) -> None:
        if not isinstance(ran.result, Exception):
            jobs = {id(job): job for job, _ in ran.batch if isinstance(job, TracedJob)}.values()
            traced = {id(job.trace): job.trace for job in jobs if job.trace and job.trace.is_recorded}
            if traced:
                decoded = ran.started + ran.prepare_seconds
                traces, ended = list(traced.values()), decoded + ran.seconds
                context = traces[0].tracer.batch(traces, len(ran.batch), ran.started, ended)
                for job in jobs:
                    job.turns.append(Turn(context, ran.started, decoded, ended))
        super()._finish(ran)


class TracedRestDoor(RestDoor):
    """The HTTP door, with a span for every request to a model or the protocol."""

    def __init__(self, plane: DataPlane, board: Board, tracer: Tracer) -> None:
        super().__init__(plane, board)
        self._tracer = tracer

    def question(self, request: Request) -> None:
        """None: every request has a span, which begins before its head is read."""

    async def answer(self, request: Request) -> Response | None:
        """The answer, which says in which trace it is."""
        if not self.takes(request.path):
            return await super().answer(request)
        headers = request.headers
        trace = self._tracer.begin(headers.get(b"traceparent"), headers.get(b"tracestate"))
        token = CURRENT.set(trace)
        response: Response | None = None
        try:
            with structlog.contextvars.bound_contextvars(trace_id=trace.id):
                response = await super().answer(request)
        finally:
            CURRENT.reset(token)
            loaded = request.asked
            asked = None if loaded is None else (loaded.room.name, loaded.version)
            is_machine = request.path.startswith("/v2/")
            # Never the path itself: strangers may ask for anything.
            place = f"/{loaded.room.name}" if loaded else "/v2" if is_machine else "/"
            name = f"{request.method} {'/v2/models' if is_machine and loaded else ''}{place}"
            status = 0 if response is None else response.status
            outcome = {0: "caller gone", 200: "ok"}.get(status, str(status))
            self._tracer.end(trace, name, asked, outcome, is_our_fault=status >= 500)
        if response is not None:
            response.headers += ((RESPONSE.encode(), trace.response.encode()),)
        return response


class TracedGrpcDoor(GrpcDoor):
    """The gRPC door, with a span for every inference request."""

    def __init__(self, plane: DataPlane, tracer: Tracer) -> None:
        super().__init__(plane)
        self._tracer = tracer

    def _ask(self, put: Callable[[Answered], Answered], call: Call, message: bytes, tell: Tell) -> None:
        """None: every request has a span, which begins before it is read."""

    async def _answered(self, call: Call, message: bytes) -> tuple[Any, Any, QuintetError | None]:
        headers = call.head.headers
        trace = self._tracer.begin(headers.get(b"traceparent"), headers.get(b"tracestate"))
        token = CURRENT.set(trace)
        asked, outcome, is_our_fault = None, "caller gone", False
        try:
            with structlog.contextvars.bound_contextvars(trace_id=trace.id):
                request, response, failure = await super()._answered(call, message)
            outcome = "ok" if failure is None else str(int(failure.status))
            is_our_fault = failure is not None and failure.status >= 500
            if response is not None:
                asked = (response.model_name, response.model_version)
        finally:
            CURRENT.reset(token)
            self._tracer.end(trace, "ModelInfer", asked, outcome, is_our_fault=is_our_fault)
        # A stream's requests have one end between them: it says the last one's.
        call.more = literal(RESPONSE.encode(), trace.response.encode())
        return request, response, failure


def _ns(seconds: float, offset_ns: int) -> int:
    """A moment by `time.perf_counter` in nanoseconds since 1970."""
    return int(seconds * 1e9) + offset_ns


def _within(span: Span) -> Context:
    return set_span_in_context(span, Context())
