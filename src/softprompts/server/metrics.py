"""What Prometheus reads from ``/metrics``: vLLM's names where it has them, so that its dashboards work.

No label holds a name of a prompt or of a key: their number has no bound, and whoever reads metrics need not know them.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from softprompts.inference import EngineThread, PromptPool

__all__ = ["Metrics"]

_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class Metrics:
    """All metrics of one server.

    Args:
        thread: The engine.
        pool: Its prompts.
        model_name: Label of every metric.
    """

    def __init__(self, thread: EngineThread, pool: PromptPool, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Gauges(thread, pool, model_name))
        self._model = model_name
        self._first = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _SECONDS)
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Between two tokens.", _BETWEEN)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _SECONDS)
        labels = ("model_name", "finished_reason")
        self._success = Counter("vllm:request_success", "Outputs by how they ended.", labels, registry=self.registry)
        self._http = Counter("softprompts:http_requests", "HTTP answers.", ("route", "status"), registry=self.registry)

    def first_token(self, seconds: float) -> None:
        """An output began."""
        self._first.labels(self._model).observe(seconds)

    def next_token(self, seconds: float) -> None:
        """An output went on."""
        self._between.labels(self._model).observe(seconds)

    def finished(self, reason: str, seconds: float) -> None:
        """An output ended."""
        self._success.labels(self._model, reason).inc()
        self._whole.labels(self._model).observe(seconds)

    def answered(self, route: str, status: int) -> None:
        """An HTTP request was answered; ``route`` is a known one, never what the client wrote."""
        self._http.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ("model_name",), buckets=buckets, registry=self.registry)


class _Gauges(Collector):
    """Asks the engine and the pool when somebody looks."""

    def __init__(self, thread: EngineThread, pool: PromptPool, model_name: str) -> None:
        self._thread, self._pool, self._model = thread, pool, model_name

    def collect(self) -> Iterator[Metric]:
        engine, pool = self._thread.stats(), self._pool.stats()
        gauges = (
            ("vllm:num_requests_running", "Outputs that are computed.", engine.running),
            ("vllm:num_requests_waiting", "Outputs that wait.", engine.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the memory for keys and values, 0 to 1.", engine.cache_used),
            ("softprompts:prompts_known", "Prompts that can be asked for.", pool.known),
            ("softprompts:prompts_resident", "Prompts in memory.", pool.resident),
            ("softprompts:prompts_resident_bytes", "Their size.", pool.resident_bytes),
            ("softprompts:prompts_in_use", "Prompts of outputs that run or are about to.", pool.in_use),
        )
        counters = (
            ("vllm:prompt_tokens", "Tokens of inputs.", engine.input_tokens),
            ("vllm:generation_tokens", "Tokens that were generated.", engine.generated_tokens),
            ("vllm:num_preemptions", "Outputs that lost their place and were computed anew.", engine.preemptions),
            ("softprompts:engine_steps", "Forward passes.", engine.steps),
            ("softprompts:prompt_loads", "Prompts that were loaded.", pool.loads),
            ("softprompts:prompt_load_failures", "Prompts that could not be loaded.", pool.failures),
            ("softprompts:prompt_evictions", "Prompts that made room for others.", pool.evictions),
            ("softprompts:prompt_load_seconds", "Time that loading took.", pool.load_seconds),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, text, value in counters:
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
