"""What cannot be served together with ``--kv-quant pmkvq``, why, and the way out; in one list. No SGLang, no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_pmkvq.formats import PAGE_SIZES
from sglang_pmkvq.serving.config import PmkvqConfigError


@dataclass(frozen=True)
class Refusal:
    """A combination that cannot be served.

    Attributes:
        flag: what the user typed, as it is spelled.
        reason: why it is refused.
        way_out: what to do instead.
        applies: predicate on the resolved server arguments.
    """

    flag: str
    reason: str
    way_out: str
    applies: Callable[[Any], bool]

    def sentence(self) -> str:
        return f"--kv-quant pmkvq cannot run with {self.flag}: {self.reason}; {self.way_out}."


def _on(name: str) -> Callable[[Any], bool]:
    return lambda args: bool(getattr(args, name, False))


def _more(name: str, limit: int = 1) -> Callable[[Any], bool]:
    return lambda args: (getattr(args, name, None) or limit) > limit


def _drop(flag: str) -> str:
    return f"leave {flag} out"


def _prefill_graphs(args: Any) -> bool:
    """Prefill graphs asked for by a flag that wins over our turning them off; before or after SGLang resolved it."""
    backends = [getattr(args, "cuda_graph_backend_prefill", None)]
    config = getattr(args, "cuda_graph_config", None)
    if isinstance(config, dict):
        backends.append((config.get("prefill") or {}).get("backend"))
    elif config is not None:
        backends.append(config.prefill.backend)
    return any(backend not in (None, "disabled") for backend in backends)


_RAW = "it moves raw 16-bit KV buffers, which this pool does not keep"

REFUSALS: tuple[Refusal, ...] = tuple(
    Refusal(flag, reason, way_out or _drop(flag.split()[0]), applies)
    for flag, reason, way_out, applies in (
        ("--enable-hierarchical-cache", _RAW, "", _on("enable_hierarchical_cache")),
        ("--enable-lmcache", _RAW, "", _on("enable_lmcache")),
        (
            "--disaggregation-decode-enable-offload-kvcache",
            _RAW,
            "",
            _on("disaggregation_decode_enable_offload_kvcache"),
        ),
        (
            "--disaggregation-mode",
            "prefill/decode disaggregation transfers raw KV buffers",
            "run prefill and decode in one server",
            lambda a: getattr(a, "disaggregation_mode", "null") not in (None, "null"),
        ),
        (
            "--speculative-algorithm",
            "a draft model's pool shares the logical ids and rolls pages back",
            "",
            lambda a: getattr(a, "speculative_algorithm", None) not in (None, "", "NONE"),
        ),
        ("--enable-hisparse", "sparse host pools are not supported", "", _on("enable_hisparse")),
        (
            "--enable-unified-memory",
            "it replaces the pool that this plugin provides",
            "",
            _on("enable_unified_memory"),
        ),
        (
            "--enable-page-major-kv-layout",
            "it replaces the pool that this plugin provides",
            "",
            _on("enable_page_major_kv_layout"),
        ),
        (
            "--prefill-only-disable-kv-cache",
            "there is no KV cache to quantize",
            "use --kv-quant none",
            _on("prefill_only_disable_kv_cache"),
        ),
        (
            "--dcp-size",
            "decode context parallelism splits pages over ranks",
            "use --dcp-size 1",
            _more("dcp_size"),
        ),
        (
            "--attn-cp-size",
            "context parallelism splits pages over ranks",
            "use --attn-cp-size 1",
            _more("attn_cp_size"),
        ),
        ("--enable-prefill-cp", "context parallelism splits pages over ranks", "", _on("enable_prefill_cp")),
        (
            "--enable-prefill-context-parallel",
            "context parallelism splits pages over ranks",
            "",
            _on("enable_prefill_context_parallel"),
        ),
        ("--enable-pdmux", "two streams would write one pool", "", _on("enable_pdmux")),
        (
            "--enable-two-batch-overlap",
            "two batches would share one plan",
            "",
            _on("enable_two_batch_overlap"),
        ),
        (
            "--enable-single-batch-overlap",
            "two streams would share one plan",
            "",
            _on("enable_single_batch_overlap"),
        ),
        ("--dllm-algorithm", "diffusion decoding rewrites pages", "", _on("dllm_algorithm")),
        (
            "--prefill-attention-backend",
            "prefill and decode read the same mixed-precision pages",
            "",
            lambda a: getattr(a, "prefill_attention_backend", None) not in (None, "pmkvq"),
        ),
        (
            "--decode-attention-backend",
            "prefill and decode read the same mixed-precision pages",
            "",
            lambda a: getattr(a, "decode_attention_backend", None) not in (None, "pmkvq"),
        ),
        (
            "--kv-cache-dtype other than auto or bf16",
            "pages are born in the model's own 16-bit dtype",
            "use --kv-cache-dtype auto and choose widths by --pmkvq-final-bits",
            lambda a: getattr(a, "kv_cache_dtype", "auto") not in ("auto", "bf16", "bfloat16"),
        ),
        ("--pp-size", "the byte budgets of pipeline stages differ", "use --pp-size 1", _more("pp_size")),
        (
            "--enable-dp-attention",
            "idle and padded batches need pools per rank",
            "use plain --dp-size",
            _on("enable_dp_attention"),
        ),
        (
            "--enable-streaming-session",
            "its slots hold KV outside the radix tree",
            "use --enable-session-radix-cache or plain prefix caching",
            _on("enable_streaming_session"),
        ),
        (
            "--enable-memory-saver",
            "the pool cannot be paused and resumed yet",
            "",
            _on("enable_memory_saver"),
        ),
        (
            "--enable-deterministic-inference",
            "precision depends on how full the pool is",
            "",
            _on("enable_deterministic_inference"),
        ),
        (
            "--rl-on-policy-target",
            "precision depends on how full the pool is",
            "",
            _on("rl_on_policy_target"),
        ),
        ("--enable-torch-compile", "the plan cannot be traced yet", "", _on("enable_torch_compile")),
        (
            "--kv-canary",
            "it reads raw 16-bit KV buffers",
            "",
            lambda a: getattr(a, "kv_canary", None) not in (None, "none", "off", False),
        ),
        (
            "--strip-thinking-cache",
            "it frees pages that a running request still lists",
            "",
            _on("strip_thinking_cache"),
        ),
        ("--encoder-only", "there is no KV cache to quantize", "use --kv-quant none", _on("encoder_only")),
        (
            "--is-embedding",
            "there is no decode to save memory for",
            "use --kv-quant none",
            _on("is_embedding"),
        ),
        ("--enable-mis", "it needs the flashinfer backend", "", _on("enable_mis")),
        (
            "--enable-dynamic-chunking",
            "the 16-bit reserve needs a fixed chunk",
            "",
            _on("enable_dynamic_chunking"),
        ),
        (
            "--enable-priority-scheduling without --disable-priority-preemption",
            "SGLang 0.5.15 forgets preempted requests if whoever they made way for is not admitted after all",
            "add --disable-priority-preemption",
            lambda a: bool(getattr(a, "enable_priority_scheduling", False))
            and not getattr(a, "disable_priority_preemption", False),
        ),
        (
            "--elastic-ep-backend",
            "ranks would not see the same allocator events",
            "",
            _on("elastic_ep_backend"),
        ),
        (
            "--chunked-prefill-size 0 or below",
            "one prefill would need an unbounded number of 16-bit pages",
            "give a positive --chunked-prefill-size",
            lambda a: getattr(a, "chunked_prefill_size", None) is not None and a.chunked_prefill_size <= 0,
        ),
        (
            "--page-size other than 16, 32 or 64",
            "pages are the unit of precision and their layouts are fixed",
            "use --page-size 16, 32 or 64",
            lambda a: getattr(a, "page_size", None) is not None and a.page_size not in PAGE_SIZES,
        ),
        (
            "--attention-backend other than pmkvq",
            "only this plugin's backend can read its pages",
            "leave --attention-backend out",
            lambda a: getattr(a, "attention_backend", None) not in (None, "pmkvq"),
        ),
        (
            "--radix-cache-backend",
            "another tree may replace pages of running requests where this plugin cannot see it",
            "",
            lambda a: getattr(a, "radix_cache_backend", None) is not None,
        ),
        (
            "--cuda-graph-backend-prefill or --cuda-graph-config with prefill graphs",
            "a prefill graph would run a plan made for another batch",
            "leave prefill graphs off",
            _prefill_graphs,
        ),
        (
            "SGLANG_USE_HND_KVCACHE=1",
            "16-bit pages are stored token-major (NHD)",
            "unset it",
            lambda a: _env_on("SGLANG_USE_HND_KVCACHE"),
        ),
        (
            "SGLANG_ENABLE_UNIFIED_RADIX_TREE=1",
            "this plugin is tested with the default radix tree only",
            "unset it",
            lambda a: _env_on("SGLANG_ENABLE_UNIFIED_RADIX_TREE"),
        ),
        (
            "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE=1",
            "it replaces pages of running requests where this plugin cannot see it",
            "unset it",
            lambda a: _env_on("SGLANG_EXPERIMENTAL_CPP_RADIX_TREE"),
        ),
    )
)


@dataclass(frozen=True)
class ModelRefusal:
    """A property of a model, or of one of its attention layers, that cannot be served.

    Attributes:
        what: the property.
        reason: why it is refused.
        applies: predicate on SGLang's ``ModelRunner``, or on its ``RadixAttention`` for a layer.
    """

    what: str
    reason: str
    applies: Callable[[Any], bool]

    def sentence(self, architectures: object) -> str:
        return f"--kv-quant pmkvq cannot serve {architectures}: {self.what}: {self.reason}; use --kv-quant none."


def _window(runner: Any) -> bool:
    """The model uses a sliding window."""
    hf = runner.model_config.hf_text_config
    return bool(getattr(hf, "sliding_window", None) and getattr(hf, "use_sliding_window", True))


def _sparse(runner: Any) -> bool:
    architectures = runner.model_config.hf_config.architectures or ()
    return any("Sparse" in name for name in architectures)


# Looked at before any memory is taken.
MODEL_REFUSALS: tuple[ModelRefusal, ...] = (
    ModelRefusal("multi-head latent attention", "there are no K and V pages", lambda r: bool(r.use_mla_backend)),
    ModelRefusal("sliding-window layers beside full ones", "they need two pools", lambda r: bool(r.is_hybrid_swa)),
    ModelRefusal("state-space layers", "they need a second pool", lambda r: r.mambaish_config is not None),
    ModelRefusal("encoder and decoder", "cross attention is not paged", lambda r: r.model_config.is_encoder_decoder),
    ModelRefusal(
        "keys and values of different head_dim",
        "a page has one layout for both",
        lambda r: r.model_config.head_dim != r.model_config.v_head_dim,
    ),
    ModelRefusal("a draft model", "its pool shares the logical ids", lambda r: bool(r.is_draft_worker)),
    ModelRefusal("a sliding window", "the kernels read all pages of a request", _window),
    ModelRefusal(
        "attention sinks", "the kernels know no learned sinks", lambda r: bool(r.model_config.has_attention_sinks)
    ),
    ModelRefusal("sparse attention", "its indexer keeps a pool of its own", _sparse),
    ModelRefusal(
        "another attention backend",
        "SGLang chose one for this model after the arguments were checked",
        lambda r: r.server_args.attention_backend != "pmkvq",
    ),
    ModelRefusal(
        "no prefill chunks",
        "SGLang turned them off for this model, and one prefill would need an unbounded number of 16-bit pages",
        lambda r: (r.server_args.chunked_prefill_size or 0) <= 0,
    ),
)

# Looked at once the model is there.
LAYER_REFUSALS: tuple[ModelRefusal, ...] = (
    ModelRefusal("cross attention", "its KV is not in the pool", lambda a: bool(a.is_cross_attention)),
    ModelRefusal(
        "attention that is not causal", "the kernels mask causally", lambda a: a.attn_type.value != "decoder"
    ),
    ModelRefusal(
        "a layer with a sliding window",
        "the kernels read all pages of a request",
        lambda a: a.sliding_window_size is not None and a.sliding_window_size > -1,
    ),
    ModelRefusal(
        "a layer with keys and values of different head_dim",
        "a page has one layout for both",
        lambda a: a.qk_head_dim != a.v_head_dim,
    ),
    ModelRefusal("chunked local attention", "the kernels read all pages of a request", lambda a: bool(a.use_irope)),
    ModelRefusal(
        "a softmax temperature that depends on the length",
        "the kernels have one scale",
        lambda a: a.xai_temperature_len > 0,
    ),
    ModelRefusal(
        "a logit cap that is not a tanh",
        "the kernels know cap * tanh(score / cap)",
        lambda a: a.logit_cap > 0 and a.logit_capping_method != "tanh",
    ),
)


def check_model_facts(subject: Any, refusals: tuple[ModelRefusal, ...], architectures: object) -> None:
    """Raise for the first of ``refusals`` that applies to ``subject``.

    Raises:
        PmkvqConfigError: one sentence that names the model, the property and the way out.
    """
    for refusal in refusals:
        if refusal.applies(subject):
            raise PmkvqConfigError(refusal.sentence(architectures))


def _env_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def check_refusals(args: Any) -> None:
    """Raise for the first refused combination in ``args``.

    Raises:
        PmkvqConfigError: one sentence that names the flag, the reason and the way out.
    """
    for refusal in REFUSALS:
        if refusal.applies(args):
            raise PmkvqConfigError(refusal.sentence())
