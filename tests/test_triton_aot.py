"""The Triton kernels compiled ahead of time for GPUs that are not there, and what the generated code holds."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks import kernels_aot
from benchmarks.kernels_aot import RESULTS, Config, configs, sample
from sglang_pmkvq.formats import steps_of
from sglang_pmkvq.kernels.device_plan import programs_per_sm

pytestmark = pytest.mark.slow

TABLE = json.loads(RESULTS.read_text())["kernels"]
NAME = {"ids": lambda config: config.name}


def tile_rows(config: Config) -> int:
    """Tokens per iteration, as ``token_tile`` has it."""
    return 64 if config.head_dim <= 128 and config.group_size >= config.head_dim else 32


def check_loads(config: Config, row: dict[str, int]) -> None:
    """Every side of every step is read as wide as it can be.

    That is 16 bytes per thread, with one exception: where V goes to the tensor cores through registers (decode, and
    extend before sm_90), packed V is copied to shared memory in pieces of 8, since Triton's pipeliner takes the vector
    of a layout made for 16-bit operands, 8 elements, of which each is a byte. Groups of 32 or 64 channels cut rows into
    pieces that are too short for 16 bytes in each thread.
    """
    n, threads = tile_rows(config), 128
    both = config.kernel == "extend" and config.arch >= 90
    steps = steps_of(*config.finals)
    sides = [side for pair in steps for side in enumerate(pair)]  # (0 for K or 1 for V, tier)
    wide = [config.head_dim * tier // 8 for side, tier in sides if tier == 16]
    if config.group_size == 128:
        wide += [
            config.head_dim * tier // 8
            for side, tier in sides
            if tier < 16 and (side == 0 or both)
        ]
    assert row["loads16"] >= sum(-(-n * width // (threads * 16)) for width in wide), "too few 16-byte loads"
    codes = [side for side, tier in sides if tier < 16]
    # Once before the loop and once in it.
    assert row["code_loads"] >= 2 * len(codes)
    if config.group_size == 128:
        of16 = len(codes) if both else codes.count(0)
        assert row["code_loads16"] >= 2 * of16, "a side's codes are not loaded 16 bytes at a time"
    assert row["code_bytes"] >= 8 or not codes


def check_row(config: Config, row: dict[str, int]) -> None:
    """What a row of the table must hold, whatever the numbers."""
    if config.kernel in ("decode", "extend"):
        assert row["mma"] > 0, "no tensor-core instruction"
        if config.head_dim >= 128:
            check_loads(config, row)
    else:
        assert row["spills"] == 0
    if config.kernel == "decode" and config.head_dim == 128:
        # To turn sums of values ptxas may keep one address for the end, outside the loops.
        aside = config.values != "none"
        assert row["spills"] <= 2 * aside and row["stack"] <= 8 * aside
    # No conversion per element where codes fit the mantissa: what remains is index arithmetic.
    if config.kernel == "decode" and config.dtype == "fp16":
        assert row["conversions"] < 8
    assert row["shared"] <= 99 * 1024


def check(config: Config) -> None:
    row = kernels_aot.measure(config)
    check_row(config, row)
    expected = TABLE[config.name]
    # ptxas makes machine code of slightly different length out of the same PTX, now and then; all else is exact.
    length = pytest.approx(expected["instructions"], rel=0.005)
    assert row == expected | {"instructions": length}, "the table is stale: python -m benchmarks.kernels --aot"


@pytest.mark.parametrize("config", list(sample()), **NAME)
def test_sample(config: Config) -> None:
    check(config)


@pytest.mark.full
@pytest.mark.parametrize("config", list(configs()), **NAME)
def test_whole_table(config: Config) -> None:
    check(config)


class NoDevice:
    """Stands in for a driver: names a target, and no kernel is ever loaded."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def test_a_run_binds_its_arguments_and_compiles_the_same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the launch itself: Triton's own call path, with a driver that has no device."""
    chosen = kernels_aot.launches(Config("decode", 90))
    chosen.pop("extend")  # the slowest to compile, and nothing about its call is its own
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice())
    for name, launch in chosen.items():
        compiled = launch.kernel.warmup(**launch.args, **launch.options, grid=launch.grid)
        assert compiled.asm["cubin"] == kernels_aot.compile_launch(launch, 90).asm["cubin"], name


@pytest.mark.parametrize("finals", [(2, 2), (8, 8)])
@pytest.mark.parametrize("transform,clip,center", [("scale", True, 0), ("hadamard", False, 0), ("none", False, 1)])
def test_the_quantizer_is_not_contracted_or_approximated(
    finals: tuple[int, int], transform: str, clip: bool, center: int
) -> None:
    """Bit-exact codes need correctly rounded divisions, no fused multiply-add and no flushed subnormals.

    But for a centre: its products are exact, and two of them are added, so there one in each sum may be fused.
    """
    config = Config("copy", 90, finals=finals, transform=transform, clip=clip, center=center)
    launch = kernels_aot.launches(config)["copy"]
    ptx = kernels_aot.compile_launch(launch, 90).asm["ptx"]
    assert "div.rn.f32" in ptx
    assert not any(word in ptx for word in ("div.full", "div.approx", "rcp.", ".ftz"))
    products, fused = ptx.count("mul.f32") + ptx.count("mul.rn.f32"), ptx.count("fma.")
    assert fused == 0 if not center else 0 < fused <= products


def test_table_is_complete_and_has_the_promised_properties() -> None:
    """Read from the committed table, so it holds for more than the sample that is compiled here."""
    known = {config.name: config for config in configs()}
    assert set(TABLE) == set(known)
    assert {config.name for config in sample()} <= set(known)
    for name, config in known.items():
        try:
            check_row(config, TABLE[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_a_narrow_load_of_one_side_is_seen() -> None:
    """The key codes of one step behind a pointer whose alignment Triton cannot know."""
    launch = kernels_aot.launches(Config("decode", 90, finals=(8, 8)))["decode"]
    bytes_at_one = torch.zeros(launch.args["k_codes"].numel() + 1, dtype=torch.uint8)[1:]
    odd = dataclasses.replace(launch, args=launch.args | {"k_codes": bytes_at_one})
    row = kernels_aot.describe(kernels_aot.compile_launch(odd, 90))
    with pytest.raises(AssertionError):
        check_loads(Config("decode", 90, finals=(8, 8)), row)


def test_decode_aims_at_as_many_programs_as_the_registers_allow() -> None:
    """Never more than run at once on any architecture, and in groups that reach 4 bits at head_dim 128 no fewer."""
    for config in configs():
        if config.kernel != "decode":
            continue
        registers = -(-TABLE[config.name]["registers"] // 8) * 8 * 128
        aimed = programs_per_sm(steps_of(*config.finals), config.head_dim)
        assert 65536 // registers >= aimed, config.name
        if (config.head_dim, config.group_size) == (128, 128) and set(config.finals) <= {2, 4, 16}:
            assert 65536 // registers == aimed, config.name
