"""The Triton kernels compiled ahead of time for GPUs that are not there, and what the generated code holds."""

from __future__ import annotations

import json

import pytest
import triton
from triton.backends.compiler import GPUTarget

from benchmarks import kernels_aot
from benchmarks.kernels_aot import RESULTS, Config, configs, sample

pytestmark = pytest.mark.slow

TABLE = json.loads(RESULTS.read_text())["kernels"]
NAME = {"ids": lambda config: config.name}


def check(config: Config) -> None:
    row = kernels_aot.measure(config)
    if config.kernel == "decode" and config.head_dim == 128:
        assert row["spills"] == 0 and row["stack"] == 0
    if config.kernel in ("decode", "extend"):
        assert row["mma"] > 0, "no tensor-core instruction"
        if config.head_dim >= 128:
            assert row["loads16"] > 0, "no 16-byte load"
    expected = TABLE.get(config.name, row)
    # ptxas makes machine code of slightly different length out of the same PTX, now and then; all else is exact.
    length = pytest.approx(expected["instructions"], rel=0.005)
    assert row == expected | {"instructions": length}, "the table is stale: python -m benchmarks.kernels_aot"


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
def test_the_quantizer_is_not_contracted_or_approximated(finals: tuple[int, int]) -> None:
    """Bit-exact codes need correctly rounded divisions, no fused multiply-add and no flushed subnormals."""
    launch = kernels_aot.launches(Config("copy", 90, finals=finals, key_scale=True, clip=True))["copy"]
    ptx = kernels_aot.compile_launch(launch, 90).asm["ptx"]
    assert "div.rn.f32" in ptx
    assert not any(word in ptx for word in ("fma.", "div.full", "div.approx", "rcp.", ".ftz"))


def test_table_has_the_promised_properties() -> None:
    """Read from the committed table, so it holds for more than the sample that is compiled here."""
    known = {config.name: config for config in configs()}
    assert {config.name for config in sample()} <= set(TABLE) <= set(known)
    for name, row in TABLE.items():
        config = known[name]
        if config.kernel in ("decode", "extend"):
            assert row["mma"] > 0, name
            assert row["loads16"] > 0 or config.head_dim < 128, name
        if config.kernel == "decode" and config.head_dim == 128:
            assert row["spills"] == 0 and row["stack"] == 0, name
        if config.kernel not in ("decode", "extend"):
            assert row["spills"] == 0, name
        # No conversion per element where codes fit the mantissa: what remains is index arithmetic.
        if config.kernel == "decode" and config.dtype == "fp16":
            assert row["conversions"] < 8, name
        assert row["shared"] <= 99 * 1024, name
