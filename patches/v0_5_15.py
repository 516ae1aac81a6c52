"""Every place where SGLang 0.5.15 is changed or overridden, and why. Nothing else changes SGLang."""

from __future__ import annotations

from sglang_pmkvq.patches.base import Overrides, PatchSet, Target

_COMMON = "sglang.srt.mem_cache.common"
_MIXIN = "sglang.srt.model_executor.model_runner_kv_cache_mixin.ModelRunnerKVCacheMixin"
_POOL_STATS = "sglang.srt.managers.scheduler_components.pool_stats_observer.PoolStats"

_TARGETS = (
    Target(
        "sglang.srt.server_args.ServerArgs",
        "replace",
        "PmkvqServerArgs",
        (),
        "adds --kv-quant and --pmkvq-* flags",
    ),
    Target(
        "sglang.srt.model_executor.pool_configurator.create_memory_pool_configurator",
        "around",
        "create_configurator",
        ("mr",),
        "logical capacity comes from the byte budget of mixed-precision pages",
    ),
    Target(f"{_MIXIN}._init_pools", "around", "init_pools", ("self",), "builds our pool and allocator"),
    Target(
        "sglang.srt.model_executor.model_runner.ModelRunner.init_attention_backends",
        "after",
        "verify_backend",
        ("self",),
        "a server whose attention cannot read the pages must not start",
    ),
    Target(
        "sglang.srt.model_executor.runner.eager_runner.EagerRunner.__init__",
        "around",
        "size_eager_buffers",
        ("self", "model_runner"),
        "its buffers grow with the token count; ours is several times larger at equal bytes",
    ),
    Target(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        "before",
        "before_forward",
        (
            "self",
            "forward_batch",
            "skip_attn_backend_init",
            "pp_proxy_tensors",
            "reinit_attn_backend",
            "split_forward_count",
        ),
        "executes shrinks and table updates on the forward stream, ahead of the forward that needs them",
    ),
    Target(
        f"{_COMMON}.alloc_for_extend",
        "around",
        "alloc_for_batch",
        ("batch",),
        "tells the allocator whose pages",
    ),
    Target(
        f"{_COMMON}.alloc_for_decode",
        "around",
        "alloc_for_batch",
        ("batch", "token_per_req"),
        "tells the allocator whose pages",
    ),
    Target(
        f"{_COMMON}.release_kv_cache",
        "around",
        "release",
        ("req", "tree_cache", "is_insert"),
        "a request that ends no longer protects its pages",
    ),
    Target(
        "sglang.srt.mem_cache.radix_cache.RadixCache.cache_unfinished_req",
        "around",
        "cache_unfinished",
        ("self", "req", "chunked"),
        "the tree may replace pages of a running request by its own copies",
    ),
    Target(
        "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output",
        "around",
        "stream_output",
        ("self", "reqs", "return_logprob", "skip_req"),
        "requests that asked for their bits travel apart: in one message SGLang pads the others' meta_info",
    ),
    Target(
        "sglang.srt.models.utils.enable_fused_set_kv_buffer",
        "around",
        "fused_set_kv_buffer",
        ("forward_batch",),
        "fused writers address 16-bit buffers by token slot",
    ),
    Target(
        "sglang.srt.utils.common.support_triton",
        "around",
        "support_triton",
        ("backend",),
        "SGLang would launch Triton kernels on the CPU for a backend name it does not know",
    ),
    Target(
        f"{_POOL_STATS}.get_decode_usage_msg_parts",
        "after",
        "decode_usage",
        ("self",),
        "pages per tier in the periodic decode log",
    ),
    Target(
        f"{_POOL_STATS}.update_scheduler_stats",
        "after",
        "update_stats",
        ("self", "stats"),
        "Prometheus gauges follow SGLang's own metrics interval",
    ),
    Target(
        "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.__init__",
        "after",
        "metrics_init",
        (
            "self",
            "labels",
            "enable_lora",
            "enable_hierarchical_cache",
            "enable_streaming_session",
            "server_args",
        ),
        "our metrics carry SGLang's labels and appear on its /metrics",
    ),
    Target(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode",
        "around",
        "retract",
        ("self", "server_args"),
        "retractions are events of the timeline",
    ),
    Target(
        "sglang.srt.managers.tp_worker.TpModelWorker.get_worker_info",
        "after",
        "worker_info",
        ("self",),
        "the longest input that SGLang accepts is one that it can ever admit; others are refused with that number",
    ),
    Target(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "before",
        "validate_request",
        ("self", "obj", "input_ids"),
        "two requests that end stock's scheduler are refused: without a token, and with a key that is no string",
    ),
    Target(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        "after",
        "internal_state",
        ("self", "recv_req"),
        "/server_info shows what the flags resolved to",
    ),
)

_OVERRIDES = (
    Overrides(
        "sglang.srt.server_args.ServerArgs",
        "PmkvqServerArgs",
        {"__post_init__": ("self",)},
    ),
    Overrides(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator",
        "PmkvqPoolConfigurator",
        {
            "__init__": ("self", "mr"),
            "calculate_pool_sizes": ("self", "available_bytes", "page_size"),
            "calculate_pool_sizes_from_max_tokens": ("self", "max_total_num_tokens", "page_size"),
            "finalize_with_max_running_requests": ("self", "config"),
        },
    ),
    Overrides(
        "sglang.srt.mem_cache.memory_pool.KVCache",
        "MixedPrecisionTokenPool",
        {
            "__init__": (
                "self",
                "size",
                "page_size",
                "dtype",
                "layer_num",
                "device",
                "enable_memory_saver",
                "start_layer",
                "end_layer",
            ),
            "set_kv_buffer": ("self", "layer", "loc", "cache_k", "cache_v"),
            "get_key_buffer": ("self", "layer_id"),
            "get_value_buffer": ("self", "layer_id"),
            "get_kv_buffer": ("self", "layer_id"),
            "register_layer_transfer_counter": ("self", "layer_transfer_counter"),
            "get_cpu_copy": ("self", "indices", "mamba_indices"),
            "load_cpu_copy": ("self", "kv_cache_cpu", "indices", "mamba_indices"),
        },
    ),
    Overrides(
        "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator",
        "PmkvqAllocator",
        {
            "__init__": ("self", "size", "page_size", "dtype", "device", "kvcache", "need_sort"),
            "available_size": ("self",),
            "alloc": ("self", "need_size"),
            "alloc_extend": ("self", "args", "kwargs"),
            "alloc_decode": ("self", "args", "kwargs"),
            "free": ("self", "free_index"),
            "free_group_begin": ("self",),
            "free_group_end": ("self",),
            "clear": ("self",),
            "backup_state": ("self",),
            "restore_state": ("self", "state"),
        },
    ),
    Overrides(
        "sglang.srt.layers.attention.base_attn_backend.AttentionBackend",
        "PmkvqAttnBackend",
        {
            "init_cuda_graph_state": ("self", "max_bs", "max_num_tokens"),
            "init_forward_metadata": ("self", "forward_batch"),
            "init_forward_metadata_out_graph": ("self", "forward_batch", "in_capture"),
            "forward_decode": ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "kwargs"),
            "forward_extend": ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "kwargs"),
            "get_cuda_graph_seq_len_fill_value": ("self",),
            "support_triton": ("self",),
        },
    ),
)

PATCH_SET = PatchSet(("0.5.15.post1",), _TARGETS, _OVERRIDES)
