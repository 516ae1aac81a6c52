"""SGLang's server arguments with ours added: flags, early defaults, refusals.

The class must be importable by name: scheduler processes are spawned with an instance of it, unpickled before
any plugin is loaded there.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Literal

from sglang.srt.arg_groups.arg_utils import A, Arg
from sglang.srt.server_args import ServerArgs

from sglang_pmkvq.calibration import check_model, load_for
from sglang_pmkvq.config import (
    DEFAULT_SINK_TOKENS,
    DEFAULT_WINDOW,
    PmkvqConfigError,
    check_context,
    check_flags,
)
from sglang_pmkvq.formats import PAGE_SIZES
from sglang_pmkvq.refusals import check_refusals

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
        Literal["age", "uniform", "static"],
        Arg(
            help="Order of shrinking: oldest pages first, a whole layer group at once, or at once to the "
            "final width."
        ),
    ] = "age"
    pmkvq_window: A[
        int, Arg(help="Recent tokens of a running request that shrink last (or never, see --pmkvq-protect).")
    ] = DEFAULT_WINDOW
    pmkvq_sink_tokens: A[
        int, Arg(help="First tokens of a sequence that shrink last, rounded up to a page.")
    ] = DEFAULT_SINK_TOKENS
    pmkvq_protect: A[
        Literal["soft", "hard"],
        Arg(help="Sinks and window of running requests shrink last (soft) or never (hard)."),
    ] = "soft"
    pmkvq_group_size: A[
        int | None, Arg(help="Channels per scale and zero: 32, 64 or 128. Default min(head_dim, 128).")
    ] = None
    pmkvq_key_transform: A[
        Literal["none", "hadamard"] | None,
        Arg(
            help="What is done to keys before they are quantized, without a calibration: hadamard rotates them, and "
            "2-bit keys span the middle share of their range that suits a normal distribution. Default: what "
            "--pmkvq-calibration says, else none.",
            choices=["none", "hadamard"],
        ),
    ] = None
    pmkvq_min_active_bits: A[
        int,
        Arg(
            help="Evict cached pages before pages of running requests shrink below this width.",
            choices=[16, 8, 4, 2],
        ),
    ] = 8
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
            self._refuse_lonely_flags()
            super().__post_init__()
            return
        check_flags(self)
        check_refusals(self)
        calibration = load_for(self)
        self._check_environment()
        if self.pmkvq_default_running is None:
            self.pmkvq_default_running = self.max_running_requests is None
            self.pmkvq_default_chunk = self.chunked_prefill_size is None
        self.attention_backend = BACKEND
        if self.page_size is None:
            self.page_size = DEFAULT_PAGE_SIZE
        self._disable_graphs()
        super().__post_init__()
        check_refusals(self)
        if self.page_size not in PAGE_SIZES or self.attention_backend != BACKEND:
            raise PmkvqConfigError(
                "--kv-quant pmkvq: this model makes SGLang change "
                f"--page-size to {self.page_size} and --attention-backend to {self.attention_backend}; "
                "use --kv-quant none for it"
            )
        config = self.get_model_config()
        check_context(self, config.context_len, config.num_hidden_layers)
        if calibration is not None:
            check_model(self, calibration)

    def _refuse_lonely_flags(self) -> None:
        for field in dataclasses.fields(PmkvqServerArgs):
            if (
                field.name.startswith("pmkvq_")
                and not field.name.startswith("pmkvq_default")
                and getattr(self, field.name) != field.default
            ):
                flag = "--" + field.name.replace("_", "-")
                raise PmkvqConfigError(
                    f"{flag} has no effect without --kv-quant pmkvq; add it or leave {flag} out"
                )

    def _disable_graphs(self) -> None:
        """No graphs on the CPU; on CUDA decode graphs stay as the user has them.

        The torch kernels read host-side plans, so a captured graph would replay a stale one. Prefill graphs would
        run a plan made for another batch; they stay off until shown safe.
        """
        self.disable_prefill_cuda_graph = True
        if self.device == "cpu":
            self.disable_decode_cuda_graph = True

    def _check_environment(self) -> None:
        import sglang
        import torch

        from sglang_pmkvq.plugin import check_installed

        problem = check_installed()
        if problem and not (problem.version_only and self.pmkvq_allow_untested_sglang):
            raise PmkvqConfigError(f"--kv-quant pmkvq: {problem.text} (SGLang {sglang.__version__})")
        if self.device is None and not torch.cuda.is_available():
            self.device = "cpu"
        if self.device == "cpu" and os.environ.get("SGLANG_USE_CPU_ENGINE", "0") != "1":
            raise PmkvqConfigError(
                "--kv-quant pmkvq on CPU needs SGLANG_USE_CPU_ENGINE=1 in the environment before sglang is imported"
            )
        if self.device not in (None, "cpu", "cuda"):
            raise PmkvqConfigError(f"--device {self.device}: --kv-quant pmkvq runs on cuda and cpu")
