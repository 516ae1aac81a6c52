"""SGLang's server arguments with ours added: flags, early defaults, refusals.

The class must be importable by name: scheduler processes are spawned with an instance of it, unpickled before
any plugin is loaded there.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, Literal

from sglang_pmkvq.artifact import Calibration
from sglang_pmkvq.formats import KEY_CENTER_CHOICES, KEY_TRANSFORM_CHOICES, PAGE_SIZES, TIERS
from sglang_pmkvq.ledger.policy import POLICIES, PROTECTIONS, PolicyConfig
from sglang_pmkvq.serving import engine
from sglang_pmkvq.serving.calibration import check_model, load_for
from sglang_pmkvq.serving.config import PmkvqConfigError, check_context, check_flags
from sglang_pmkvq.serving.engine import A, Arg, ServerArgs
from sglang_pmkvq.serving.refusals import check_refusals
from sglang_pmkvq.serving.versions import check_installed

BACKEND = "pmkvq"
DEFAULT_PAGE_SIZE = PAGE_SIZES[0]


@dataclasses.dataclass
class PmkvqServerArgs(ServerArgs):
    """``ServerArgs`` plus ``--kv-quant`` and ``--pmkvq-*``; plain ``ServerArgs`` while ``kv_quant`` is none."""

    if TYPE_CHECKING:  # inherited fields that are assigned here
        page_size: int | None = None
        device: str | None = None

    kv_quant: A[
        Literal["none", "pmkvq"],
        Arg(
            help="KV cache quantization: pmkvq keeps pages at 16 bits while memory is free and shrinks them as it "
            "fills."
        ),
    ] = "none"
    pmkvq_final_bits: A[
        str | None,
        Arg(
            help="Lowest width that pages may reach: 8, 4, 2, a pair such as k4v2, or per layer "
            "0-3:8,4-7:k4v2. Default: what --pmkvq-calibration says, else 4."
        ),
    ] = None
    pmkvq_calibration: A[
        str | None,
        Arg(help="File written by `pmkvq calibrate`: final widths per layer, group size, what is done to keys."),
    ] = None
    pmkvq_pool_bytes: A[
        str | None,
        Arg(
            help="Bytes of the KV pool, everything included, e.g. 512MiB. Default: what SGLang would give its "
            "own pool."
        ),
    ] = None
    pmkvq_policy: A[
        str,
        Arg(
            help="Order of shrinking: oldest pages first, a whole layer group at once, or at once to the "
            "final width.",
            choices=list(POLICIES),
        ),
    ] = PolicyConfig.policy
    pmkvq_window: A[
        int, Arg(help="Recent tokens of a running request that shrink last (or never, see --pmkvq-protect).")
    ] = PolicyConfig.window_tokens
    pmkvq_sink_tokens: A[
        int, Arg(help="First tokens of a sequence that shrink last, rounded up to a page.")
    ] = PolicyConfig.sink_tokens
    pmkvq_protect: A[
        str,
        Arg(help="Sinks and window of running requests shrink last (soft) or never (hard).", choices=list(PROTECTIONS)),
    ] = PolicyConfig.protect
    pmkvq_group_size: A[
        int | None, Arg(help="Channels per scale and zero: 32, 64 or 128. Default min(head_dim, 128).")
    ] = None
    pmkvq_key_transform: A[
        str,
        Arg(
            help="What is done to keys before they are quantized, without a calibration: hadamard rotates them, and "
            "2-bit keys span the middle share of their range that suits a normal distribution. auto: what "
            "--pmkvq-calibration says, else hadamard for keys that end below 8 bits and for values that end at 2.",
            choices=list(KEY_TRANSFORM_CHOICES),
        ),
    ] = "auto"
    pmkvq_key_center: A[
        str,
        Arg(
            help="What is taken off keys before they are quantized, and added again where they are read: bias, the "
            "one that the model adds to them, if any; or none. auto: what --pmkvq-calibration says, else the bias, "
            "else means that are measured before the first page shrinks.",
            choices=list(KEY_CENTER_CHOICES),
        ),
    ] = "auto"
    pmkvq_min_active_bits: A[
        int,
        Arg(
            help="Evict cached pages before pages of running requests shrink below this width.",
            choices=list(TIERS),
        ),
    ] = PolicyConfig.min_active_bits
    pmkvq_timeline: A[
        str | None, Arg(help="Write bytes per tier over time to this file; `pmkvq report FILE` draws it.")
    ] = None
    pmkvq_allow_untested_sglang: A[
        bool, Arg(help="Try an SGLang version this plugin was not tested with.")
    ] = False
    # Which limits SGLang chose itself and we may lower; set once, before SGLang fills in its defaults.
    pmkvq_default_running: bool | None = None
    pmkvq_default_chunk: bool | None = None

    def __post_init__(self) -> None:
        if self.kv_quant != "pmkvq":
            refuse_lonely_flags(self)
            super().__post_init__()
            return
        calibration = before_resolution(self)
        super().__post_init__()
        after_resolution(self, calibration)


# What follows are functions, not methods: other versions of SGLang make the class in another way and resolve their
# arguments at another time.


def before_resolution(args: Any) -> Calibration | None:
    """Check what the user gave and choose what SGLang must not; returns the calibration that the flags name.

    Raises:
        PmkvqConfigError: one sentence that names the flag and the way out.
    """
    check_flags(args)
    check_refusals(args)
    calibration = load_for(args)
    check_environment(args)
    if args.pmkvq_default_running is None:
        args.pmkvq_default_running = args.max_running_requests is None
        args.pmkvq_default_chunk = args.chunked_prefill_size is None
    args.attention_backend = BACKEND
    if args.page_size is None:
        args.page_size = DEFAULT_PAGE_SIZE
    # No graphs on the CPU: the torch kernels read host-side plans, and a captured graph would replay a stale one. On
    # CUDA decode graphs stay as the user has them; prefill graphs, which would run a plan made for another batch, stay
    # off until shown safe.
    args.disable_prefill_cuda_graph = True
    if args.device == "cpu":
        args.disable_decode_cuda_graph = True
    return calibration


def after_resolution(args: Any, calibration: Calibration | None) -> None:
    """Check what SGLang made of the arguments, and the model.

    Raises:
        PmkvqConfigError: one sentence that names the flag and the way out.
    """
    check_refusals(args)
    if args.page_size not in PAGE_SIZES or args.attention_backend != BACKEND:
        raise PmkvqConfigError(
            "--kv-quant pmkvq: this model makes SGLang change "
            f"--page-size to {args.page_size} and --attention-backend to {args.attention_backend}; "
            "use --kv-quant none for it"
        )
    config = engine.model_config(args)
    check_context(args, config.context_len, config.num_hidden_layers)
    if calibration is not None:
        check_model(args, calibration)


def refuse_lonely_flags(args: Any) -> None:
    """Refuse a flag of ours without ``--kv-quant pmkvq``.

    Raises:
        PmkvqConfigError: names the first.
    """
    for name, default in engine.argument_fields(args).items():
        ours = name.startswith("pmkvq_") and not name.startswith("pmkvq_default")
        if ours and getattr(args, name) != default:
            flag = "--" + name.replace("_", "-")
            raise PmkvqConfigError(f"{flag} has no effect without --kv-quant pmkvq; add it or leave {flag} out")


def check_environment(args: Any) -> None:
    """Refuse an SGLang or a device that cannot serve; without a GPU the device becomes the CPU.

    Raises:
        PmkvqConfigError: one sentence that names the flag or variable and the way out.
    """
    import torch

    problem = check_installed()
    if problem and not (problem.version_only and args.pmkvq_allow_untested_sglang):
        raise PmkvqConfigError(f"--kv-quant pmkvq: {problem.text} (SGLang {engine.version()})")
    if args.device is None and not torch.cuda.is_available():
        args.device = "cpu"
    if args.device == "cpu" and os.environ.get("SGLANG_USE_CPU_ENGINE", "0") != "1":
        raise PmkvqConfigError(
            "--kv-quant pmkvq on CPU needs SGLANG_USE_CPU_ENGINE=1 in the environment before sglang is imported"
        )
    if args.device not in (None, "cpu", "cuda"):
        raise PmkvqConfigError(f"--device {args.device}: --kv-quant pmkvq runs on cuda and cpu")
