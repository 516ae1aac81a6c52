"""What cannot be served is refused at start, in one sentence, before a model is read or memory is taken."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig
from sglang.srt.server_args import ServerArgs

from benchmarks.harness.results import ROOT
from benchmarks.harness.servers import REASONER, ServerFailed, serve
from sglang_pmkvq.patches import base
from sglang_pmkvq.patches.v0_5_15 import PATCH_SET
from sglang_pmkvq.serving import runtime, versions
from sglang_pmkvq.serving.attention import PmkvqAttnBackend
from sglang_pmkvq.serving.config import PmkvqConfigError
from sglang_pmkvq.serving.configurator import PmkvqPoolConfigurator
from sglang_pmkvq.serving.engine import DefaultPoolConfigurator
from sglang_pmkvq.serving.install import verify_backend, verify_pools
from sglang_pmkvq.serving.pool import MixedPrecisionTokenPool
from sglang_pmkvq.serving.refusals import LAYER_REFUSALS, MODEL_REFUSALS, REFUSALS, check_model_facts
from sglang_pmkvq.serving.server_args import PmkvqServerArgs
from tests.support.models import make_model

# Constructing stops before the model is looked at, so this path is never opened.
NO_MODEL = "/nonexistent/model"

# A value of each refused flag, as SGLang's argument parser would hand it over.
REFUSED: dict[str, dict[str, Any]] = {
    "--enable-hierarchical-cache": {"enable_hierarchical_cache": True},
    "--enable-lmcache": {"enable_lmcache": True},
    "--disaggregation-decode-enable-offload-kvcache": {"disaggregation_decode_enable_offload_kvcache": True},
    "--disaggregation-mode": {"disaggregation_mode": "decode"},
    "--speculative-algorithm": {"speculative_algorithm": "NGRAM"},
    "--enable-hisparse": {"enable_hisparse": True},
    "--enable-unified-memory": {"enable_unified_memory": True},
    "--enable-page-major-kv-layout": {"enable_page_major_kv_layout": True},
    "--prefill-only-disable-kv-cache": {"prefill_only_disable_kv_cache": True},
    "--dcp-size": {"dcp_size": 2},
    "--attn-cp-size": {"attn_cp_size": 2},
    "--enable-prefill-cp": {"enable_prefill_cp": True},
    "--enable-prefill-context-parallel": {"enable_prefill_context_parallel": True},
    "--enable-pdmux": {"enable_pdmux": True},
    "--enable-two-batch-overlap": {"enable_two_batch_overlap": True},
    "--enable-single-batch-overlap": {"enable_single_batch_overlap": True},
    "--dllm-algorithm": {"dllm_algorithm": "LowConfidence"},
    "--prefill-attention-backend": {"prefill_attention_backend": "torch_native"},
    "--decode-attention-backend": {"decode_attention_backend": "torch_native"},
    "--kv-cache-dtype other than auto or bf16": {"kv_cache_dtype": "fp8_e4m3"},
    "--pp-size": {"pp_size": 2},
    "--enable-dp-attention": {"enable_dp_attention": True},
    "--enable-streaming-session": {"enable_streaming_session": True},
    "--enable-memory-saver": {"enable_memory_saver": True},
    "--enable-deterministic-inference": {"enable_deterministic_inference": True},
    "--rl-on-policy-target": {"rl_on_policy_target": "fsdp"},
    "--enable-torch-compile": {"enable_torch_compile": True},
    "--kv-canary": {"kv_canary": "log"},
    "--strip-thinking-cache": {"strip_thinking_cache": True},
    "--encoder-only": {"encoder_only": True},
    "--is-embedding": {"is_embedding": True},
    "--enable-mis": {"enable_mis": True},
    "--enable-dynamic-chunking": {"enable_dynamic_chunking": True},
    "--enable-priority-scheduling without --disable-priority-preemption": {"enable_priority_scheduling": True},
    "--elastic-ep-backend": {"elastic_ep_backend": "mooncake"},
    "--chunked-prefill-size 0 or below": {"chunked_prefill_size": -1},
    "--page-size other than 16, 32 or 64": {"page_size": 1},
    "--attention-backend other than pmkvq": {"attention_backend": "triton"},
    "--radix-cache-backend": {"radix_cache_backend": "mine"},
    "--cuda-graph-backend-prefill or --cuda-graph-config with prefill graphs": {"cuda_graph_backend_prefill": "full"},
}
REFUSED_ENVIRONMENT = {
    "SGLANG_USE_HND_KVCACHE=1": ("SGLANG_USE_HND_KVCACHE", "1"),
    "SGLANG_ENABLE_UNIFIED_RADIX_TREE=1": ("SGLANG_ENABLE_UNIFIED_RADIX_TREE", "true"),
    "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE=1": ("SGLANG_EXPERIMENTAL_CPP_RADIX_TREE", "1"),
}


def test_every_refusal_is_tried_here() -> None:
    assert [r.flag for r in REFUSALS] == [*REFUSED, *REFUSED_ENVIRONMENT]


@pytest.mark.parametrize("flag", REFUSED)
def test_refused_flag(flag: str) -> None:
    with pytest.raises(PmkvqConfigError) as error:
        PmkvqServerArgs(model_path=NO_MODEL, device="cpu", kv_quant="pmkvq", **REFUSED[flag])
    (refusal,) = [r for r in REFUSALS if r.flag == flag]
    assert str(error.value) == refusal.sentence()
    assert flag in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        {"prefill": {"backend": "breakable"}},
        CudaGraphConfig(prefill=PhaseConfig(backend="breakable")),
    ],
    ids=["json", "object"],
)
def test_prefill_graphs_in_a_graph_config(config: object) -> None:
    with pytest.raises(PmkvqConfigError, match="leave prefill graphs off"):
        PmkvqServerArgs(model_path=NO_MODEL, device="cpu", kv_quant="pmkvq", cuda_graph_config=config)


def test_decode_graphs_in_a_graph_config_are_no_prefill_graphs() -> None:
    config = {"decode": {"max_bs": 4}}
    args = PmkvqServerArgs(model_path=str(REASONER), device="cpu", kv_quant="pmkvq", cuda_graph_config=config)
    assert args.cuda_graph_config.prefill.backend == "disabled"


@pytest.mark.parametrize("flag", REFUSED_ENVIRONMENT)
def test_refused_environment(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*REFUSED_ENVIRONMENT[flag])
    with pytest.raises(PmkvqConfigError, match=re.escape(flag)):
        PmkvqServerArgs(model_path=NO_MODEL, device="cpu", kv_quant="pmkvq")


@pytest.mark.parametrize("flag", ["--enable-hierarchical-cache", "--page-size other than 16, 32 or 64"])
def test_refused_flags_are_fine_without_us(flag: str) -> None:
    """They get as far as the model, which is not there."""
    with pytest.raises(Exception, match="nonexistent"):
        PmkvqServerArgs(model_path=NO_MODEL, device="cpu", kv_quant="none", **REFUSED[flag])


LONELY = {
    "pmkvq_final_bits": "2",
    "pmkvq_calibration": "model.pmkvq.safetensors",
    "pmkvq_pool_bytes": "1GiB",
    "pmkvq_policy": "static",
    "pmkvq_window": 0,
    "pmkvq_sink_tokens": 0,
    "pmkvq_protect": "hard",
    "pmkvq_group_size": 32,
    "pmkvq_min_active_bits": 2,
    "pmkvq_key_transform": "hadamard",
    "pmkvq_key_center": "none",
    "pmkvq_timeline": "timeline.jsonl",
    "pmkvq_allow_untested_sglang": True,
}


def test_every_flag_of_ours_is_tried_alone() -> None:
    ours = {f.name for f in dataclasses.fields(PmkvqServerArgs)} - {f.name for f in dataclasses.fields(ServerArgs)}
    assert ours - set(LONELY) == {"kv_quant", "pmkvq_default_running", "pmkvq_default_chunk"}


@pytest.mark.parametrize("name", LONELY)
def test_our_flag_without_kv_quant(name: str) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(PmkvqConfigError, match=f"{flag} has no effect without --kv-quant pmkvq"):
        PmkvqServerArgs(model_path=NO_MODEL, device="cpu", **{name: LONELY[name]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pmkvq_final_bits", "3"),
        ("pmkvq_final_bits", "k4"),
        ("pmkvq_final_bits", ""),
        ("pmkvq_pool_bytes", "0"),
        ("pmkvq_pool_bytes", "many"),
        ("pmkvq_window", -1),
        ("pmkvq_sink_tokens", -1),
        ("pmkvq_policy", "lru"),
        ("pmkvq_protect", "yes"),
        ("pmkvq_group_size", 48),
        ("pmkvq_min_active_bits", 3),
        ("pmkvq_key_transform", "scale"),
        ("pmkvq_key_center", "mean"),
    ],
)
def test_bad_value(name: str, value: object) -> None:
    with pytest.raises(PmkvqConfigError) as error:
        PmkvqServerArgs(model_path=NO_MODEL, device="cpu", kv_quant="pmkvq", **{name: value})
    assert f"--{name.replace('_', '-')} {value}" in str(error.value)


@pytest.mark.parametrize("device", ["xpu", "npu"])
def test_other_devices(device: str) -> None:
    with pytest.raises(PmkvqConfigError, match=f"--device {device}"):
        PmkvqServerArgs(model_path=NO_MODEL, device=device, kv_quant="pmkvq")


def test_cpu_without_its_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE")
    with pytest.raises(PmkvqConfigError, match="needs SGLANG_USE_CPU_ENGINE=1"):
        PmkvqServerArgs(model_path=NO_MODEL, device="cpu", kv_quant="pmkvq")


def resolved(args: ServerArgs) -> dict[str, Any]:
    """Every resolved argument that SGLang itself has."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(ServerArgs)}


@pytest.mark.parametrize(
    "given", [{}, {"page_size": 64, "chunked_prefill_size": -1, "kv_cache_dtype": "fp8_e5m2"}], ids=["plain", "refused"]
)
def test_none_resolves_as_without_us(given: dict[str, Any]) -> None:
    """Also with flags that ``--kv-quant pmkvq`` refuses."""
    common = {"model_path": str(REASONER), "device": "cpu", "random_seed": 1, "port": 30123, "nccl_port": 30124}
    plain = resolved(ServerArgs(**common, **given))
    ours = PmkvqServerArgs(**common, **given)
    assert resolved(ours) == plain
    assert ours.kv_quant == "none"
    assert plain["page_size"] == given.get("page_size", 1)


def test_pmkvq_changes_only_what_it_says() -> None:
    common = {"model_path": str(REASONER), "device": "cpu", "random_seed": 1, "port": 30123, "nccl_port": 30124}
    plain = resolved(ServerArgs(**common))
    ours = resolved(PmkvqServerArgs(**common, kv_quant="pmkvq"))
    changed = {name for name in plain if ours[name] != plain[name]}
    assert ours["attention_backend"] == "pmkvq"
    assert ours["page_size"] == 16
    # SGLang reserves no memory for the graphs that are off, so its share of memory may be a little larger.
    assert changed <= {
        "mem_fraction_static",
        *("attention_backend", "prefill_attention_backend", "decode_attention_backend", "page_size"),
        *("disable_prefill_cuda_graph", "disable_decode_cuda_graph", "disable_cuda_graph", "cuda_graph_config"),
    }


def launch(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """``sglang.launch_server`` that must end by itself."""
    line = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(REASONER), "--device", "cpu", *args]
    return subprocess.run(line, capture_output=True, text=True, timeout=400, cwd=ROOT, env={**os.environ, **env})


@pytest.mark.slow
def test_refused_command_line() -> None:
    ended = launch("--kv-quant", "pmkvq", "--pp-size", "2")
    (refusal,) = [r for r in REFUSALS if r.flag == "--pp-size"]
    assert ended.returncode != 0
    assert refusal.sentence() in ended.stderr
    assert "Load weight" not in ended.stdout + ended.stderr


@pytest.mark.slow
def test_plugin_not_loaded() -> None:
    """Without the plugin the flag is unknown: nobody serves 16-bit pages believing that they are ours."""
    ended = launch("--kv-quant", "pmkvq", SGLANG_PLUGINS="another")
    assert ended.returncode != 0
    assert "unrecognized arguments: --kv-quant pmkvq" in ended.stderr


# One page of the bundled model at 16 bits: 6 layers, K and V, 16 tokens, 1 KV head of 128 channels.
PAGE_BYTES = 6 * 2 * 16 * 128 * 2


@pytest.mark.full
@pytest.mark.server
def test_pool_too_small_names_one_that_works(tmp_path: Path) -> None:
    """Two prefill chunks do not fit; the smallest pool of the message serves, one byte less does not."""
    args = ["--chunked-prefill-size", "256", "--max-running-requests", "4", "--pmkvq-pool-bytes"]
    with pytest.raises(ServerFailed) as error:
        with serve(REASONER, [*args, str(8 * PAGE_BYTES)], log_path=tmp_path / "small.log"):
            pass
    found = re.search(r"the smallest pool that works is (\d+) bytes", str(error.value))
    assert found, str(error.value)
    assert "--pmkvq-pool-bytes" in str(error.value)
    with serve(REASONER, [*args, found[1]], log_path=tmp_path / "least.log") as server:
        server.flush()  # SGLang's own warm-up request may still hold pages
        assert server.pool()["mapped_pages"] == 0
        answer = server.generate(text="t1=:7;", sampling_params={"max_new_tokens": 300, "ignore_eos": True})
        assert answer["meta_info"]["completion_tokens"] == 300


# -- models --------------------------------------------------------------------------------------------------


def runner(**changes: Any) -> SimpleNamespace:
    """What the checks read of SGLang's ``ModelRunner``, of a model that can be served."""
    text = SimpleNamespace(sliding_window=None)
    model = {
        "hf_config": SimpleNamespace(architectures=["LlamaForCausalLM"]),
        "hf_text_config": text,
        "is_encoder_decoder": False,
        "head_dim": 128,
        "v_head_dim": 128,
        "has_attention_sinks": False,
        "get_num_kv_heads": lambda size: 8,
    }
    args = {"attention_backend": "pmkvq", "chunked_prefill_size": 2048}
    facts: dict[str, Any] = {
        "use_mla_backend": False,
        "is_hybrid_swa": False,
        "mambaish_config": None,
        "is_draft_worker": False,
        "kv_cache_dtype": torch.bfloat16,
        "dtype": torch.bfloat16,
        "num_effective_layers": 32,
        "tp_rank": 0,
        "dp_rank": None,
    }
    for name, value in changes.items():
        owner = next((d for d in (model, args, facts) if name in d), None)
        assert owner is not None, name
        owner[name] = value
    return SimpleNamespace(
        **facts, model_config=SimpleNamespace(**model), server_args=SimpleNamespace(**args)
    )


REFUSED_MODELS: dict[str, dict[str, Any]] = {
    "multi-head latent attention": {"use_mla_backend": True},
    "sliding-window layers beside full ones": {"is_hybrid_swa": True},
    "state-space layers": {"mambaish_config": object()},
    "encoder and decoder": {"is_encoder_decoder": True},
    "keys and values of different head_dim": {"v_head_dim": 64},
    "a draft model": {"is_draft_worker": True},
    "a sliding window": {"hf_text_config": SimpleNamespace(sliding_window=4096)},
    "attention sinks": {"has_attention_sinks": True},
    "sparse attention": {"hf_config": SimpleNamespace(architectures=["MiniMaxM3SparseForCausalLM"])},
    "another attention backend": {"attention_backend": "triton"},
    "no prefill chunks": {"chunked_prefill_size": -1},
}


class CanBeServedError(Exception):
    """Nothing was refused: SGLang's own sizing would begin."""


@pytest.fixture
def _sizing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers import dp_attention

    def begin(self: Any, built: Any) -> None:
        raise CanBeServedError

    monkeypatch.setattr(DefaultPoolConfigurator, "__init__", begin)
    for name, value in (("rank", 0), ("size", 1)):
        monkeypatch.setattr(dp_attention, f"get_attention_tp_{name}", lambda value=value: value)


@pytest.mark.usefixtures("_sizing_begins")
def test_every_refused_model_is_tried_here() -> None:
    assert [r.what for r in MODEL_REFUSALS] == list(REFUSED_MODELS)
    unused = {"hf_text_config": SimpleNamespace(sliding_window=4096, use_sliding_window=False)}
    for changes in ({}, unused):
        with pytest.raises(CanBeServedError):
            PmkvqPoolConfigurator(runner(**changes))  # type: ignore[arg-type]


@pytest.mark.usefixtures("_sizing_begins")
@pytest.mark.parametrize("what", REFUSED_MODELS)
def test_refused_model(what: str) -> None:
    with pytest.raises(PmkvqConfigError, match=re.escape(what) + ".*; use --kv-quant none"):
        PmkvqPoolConfigurator(runner(**REFUSED_MODELS[what]))  # type: ignore[arg-type]


@pytest.mark.usefixtures("_sizing_begins")
@pytest.mark.parametrize(
    ("dtypes", "way_out"),
    [
        ({"kv_cache_dtype": torch.float32, "dtype": torch.float32}, "pass --dtype bfloat16"),
        ({"kv_cache_dtype": torch.float16}, "use --kv-cache-dtype auto"),
    ],
)
def test_refused_dtypes(dtypes: dict[str, Any], way_out: str) -> None:
    with pytest.raises(PmkvqConfigError, match=way_out):
        PmkvqPoolConfigurator(runner(**dtypes))  # type: ignore[arg-type]


def layer(**changes: Any) -> RadixAttention:
    """SGLang's own layer, as a Llama model builds it; attributes changed."""
    made = RadixAttention(8, 64, 0.125, 2, 0)
    for name, value in changes.items():
        assert hasattr(made, name)
        setattr(made, name, value)
    return made


REFUSED_LAYERS: dict[str, dict[str, Any]] = {
    "cross attention": {"is_cross_attention": True},
    "attention that is not causal": {"attn_type": AttentionType.DECODER_BIDIRECTIONAL},
    "a layer with a sliding window": {"sliding_window_size": 4096},
    "a layer with keys and values of different head_dim": {"v_head_dim": 128},
    "chunked local attention": {"use_irope": True},
    "a softmax temperature that depends on the length": {"xai_temperature_len": 1024},
    "a logit cap that is not a tanh": {"logit_cap": 30.0, "logit_capping_method": "other"},
}


def test_every_refused_layer_is_tried_here() -> None:
    assert [r.what for r in LAYER_REFUSALS] == list(REFUSED_LAYERS)
    check_model_facts(layer(), LAYER_REFUSALS, ["X"])
    check_model_facts(layer(logit_cap=30.0), LAYER_REFUSALS, ["X"])


@pytest.mark.parametrize("what", REFUSED_LAYERS)
def test_refused_layer(what: str) -> None:
    """The backend looks at every attention layer of the model when it is built."""
    model = torch.nn.Sequential(layer(), layer(**REFUSED_LAYERS[what]))
    pool = MixedPrecisionTokenPool.__new__(MixedPrecisionTokenPool)
    built = runner()
    built.model, built.token_to_kv_pool = model, pool
    with pytest.raises(PmkvqConfigError, match=re.escape(what) + ".*; use --kv-quant none"):
        PmkvqAttnBackend(built)  # type: ignore[arg-type]


@pytest.mark.parametrize("extra", [{"sinks": torch.ones(8)}, {"q_rope": torch.ones(1)}, {}])
def test_attention_arguments_that_the_kernels_ignore_are_refused(extra: dict[str, Any]) -> None:
    """Learned sinks, split RoPE parts, KV of another layer (``k`` is None)."""
    backend = PmkvqAttnBackend.__new__(PmkvqAttnBackend)
    backend._active_decode = []
    backend._extend = []
    q, k = torch.zeros(1, 512), None if not extra else torch.zeros(1, 128)
    for call in (backend.forward_decode, backend.forward_extend):
        with pytest.raises(PmkvqConfigError, match="use --kv-quant none"):
            call(q, k, k, layer(), None, **extra)  # type: ignore[arg-type]


def test_a_pool_or_backend_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="needs its own pool"):
        PmkvqAttnBackend(SimpleNamespace(token_to_kv_pool=object()))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="instead of this plugin's attention backend"):
        verify_backend(SimpleNamespace(attn_backend=object()))  # type: ignore[arg-type]
    monkeypatch.setattr(runtime, "_current", SimpleNamespace(pool=object(), allocator=object()))
    with pytest.raises(RuntimeError, match="instead of this plugin's pool and allocator"):
        verify_pools(SimpleNamespace(token_to_kv_pool=object(), token_to_kv_pool_allocator=object()))  # type: ignore[arg-type]


def test_a_hook_that_did_not_apply_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    paths = {target.path for target in versions.patch_set().targets}
    lost = sorted(paths)[0]
    pool, allocator = object(), object()
    monkeypatch.setattr(runtime, "_current", SimpleNamespace(pool=pool, allocator=allocator))
    monkeypatch.setattr(HookRegistry, "_patched", paths - {lost})
    with pytest.raises(RuntimeError, match=f"hooks did not apply: {re.escape(lost)}"):
        verify_pools(SimpleNamespace(token_to_kv_pool=pool, token_to_kv_pool_allocator=allocator))  # type: ignore[arg-type]


@pytest.mark.server
@pytest.mark.parametrize(
    ("model", "flags", "reason"),
    [
        ({"architecture": "mistral"}, (), "a sliding window"),
        pytest.param({"head_dim": 80}, (), "head_dim", marks=pytest.mark.full),
        pytest.param({}, ("--dtype", "float32"), "pass --dtype bfloat16", marks=pytest.mark.full),
    ],
    ids=["sliding window", "head_dim 80", "float32"],
)
def test_models_that_end_the_start(
    model: dict[str, Any], flags: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    made = make_model(tmp_path / "model", **model)
    if model.get("architecture") == "mistral":
        config = json.loads((made / "config.json").read_text())
        (made / "config.json").write_text(json.dumps({**config, "sliding_window": 64}))
    with pytest.raises(ServerFailed, match=reason):
        with serve(made, ["--skip-tokenizer-init", *flags]):
            pass


# -- restart with SGLANG_USE_CPU_ENGINE ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "orig", "server"),
    [
        (["/x/sglang/launch_server.py", "--kv-quant", "pmkvq"], ["python", "-m", "sglang.launch_server"], True),
        (["-m", "--kv-quant", "pmkvq"], ["python", "-m", "sglang.launch_server"], True),
        (["/x/bin/sglang", "serve", "--kv-quant", "pmkvq"], ["python", "/x/bin/sglang", "serve"], True),
        (["/x/bin/sglang", "generate", "--kv-quant", "pmkvq"], ["python", "/x/bin/sglang"], False),
        (["bench.py", "--kv-quant", "pmkvq"], ["python", "bench.py"], False),
        (["/x/mine/launch_server.py", "--kv-quant", "pmkvq"], ["python", "/x/mine/launch_server.py"], False),
    ],
)
def test_only_server_commands_are_started_again(
    argv: list[str], orig: list[str], server: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_pmkvq.serving import plugin

    restarted: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig)
    monkeypatch.setattr(os, "execve", lambda path, args, env: restarted.append(args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    plugin.ensure_cpu_engine()
    assert bool(restarted) == server


# -- hook fingerprints ---------------------------------------------------------------------------------------


def changed(where: str, **fields: Any) -> base.Target:
    (target,) = [t for t in PATCH_SET.targets if t.path.endswith(where)]
    return dataclasses.replace(target, **fields)


def test_hook_targets_are_as_we_know_them() -> None:
    assert [base.check(t) for t in PATCH_SET.targets] == [None] * len(PATCH_SET.targets)
    assert list(PATCH_SET.broken()) == []


def test_changed_parameters_are_reported() -> None:
    report = base.check(changed("common.alloc_for_decode", parameters=("batch", "token_per_req", "new")))
    assert report is not None
    assert "parameters changed" in report
    assert "'new'" in report


def test_missing_function_is_reported() -> None:
    report = base.check(changed("common.alloc_for_decode", path="sglang.srt.mem_cache.common.alloc_for_nobody"))
    assert report is not None
    assert report.startswith("not found")


def test_class_in_place_of_a_function_is_reported() -> None:
    report = base.check(changed("common.alloc_for_decode", path="sglang.srt.server_args.ServerArgs"))
    assert report == "is a class, but the hook expects a function"


def test_changed_sglang_refuses_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = changed("common.release_kv_cache", parameters=("req",))
    monkeypatch.setattr(versions, "patch_set", lambda: base.PatchSet(PATCH_SET.versions, (wrong,), ()))
    versions.check_installed.cache_clear()
    try:
        with pytest.raises(PmkvqConfigError, match="release_kv_cache .*parameters changed"):
            PmkvqServerArgs(model_path=NO_MODEL, device="cpu", kv_quant="pmkvq", pmkvq_allow_untested_sglang=True)
    finally:
        versions.check_installed.cache_clear()


def test_unknown_version_needs_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang

    monkeypatch.setattr(sglang, "__version__", "9.9.9")
    versions.check_installed.cache_clear()
    try:
        with pytest.raises(PmkvqConfigError, match="untested SGLang version.*--pmkvq-allow-untested-sglang"):
            PmkvqServerArgs(model_path=NO_MODEL, device="cpu", kv_quant="pmkvq")
        args = {"model_path": str(REASONER), "device": "cpu", "kv_quant": "pmkvq"}
        assert PmkvqServerArgs(**args, pmkvq_allow_untested_sglang=True).attention_backend == "pmkvq"
    finally:
        versions.check_installed.cache_clear()
