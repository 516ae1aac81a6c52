"""What the model's keys are made of, from SGLang's terms to those of the coding."""

from __future__ import annotations

from sglang_pmkvq.kernels.rotary import ModelKeys, RotaryTable
from sglang_pmkvq.serving.engine import KeyFacts


def model_keys(facts: KeyFacts, head_dim: int) -> ModelKeys:
    """Bias, spread and rotary table of a model whose heads have ``head_dim`` channels."""
    table, problem = None, facts.problem
    if facts.cos is not None:
        try:
            table = RotaryTable.of(facts.cos, facts.sin, head_dim, facts.neox)
        except ValueError as error:
            problem = str(error)
    return ModelKeys(table, facts.bias, facts.spread, problem)
