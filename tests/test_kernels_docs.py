"""The example of docs/kernels.md runs as it is written there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from sglang_pmkvq.kernels.reference.attention import attention, read_sequence


def test_example_of_the_docs():
    text = (Path(__file__).resolve().parent.parent / "docs" / "kernels.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    query = "torch.randn(2, 8, 128).bfloat16()"
    assert query in code
    code = code.replace(f"decode.run({query}", f"decode.run(q := {query}")
    names: dict = {}
    exec(code, names)
    for r, (pages, n) in enumerate(zip(names["pages"].tolist(), names["lens"].tolist(), strict=True)):
        k, v = (read_sequence(names["storage"], side, 0, pages, n) for side in (0, 1))
        want, lse = attention(names["q"][r : r + 1], k, v, 128**-0.5)
        torch.testing.assert_close(names["out"][r].float(), want[0], rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(names["lse"][r], lse[0], rtol=1e-3, atol=1e-3)
