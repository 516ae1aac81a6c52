"""``pmkvq bench offline --codings`` on a small random model with a key bias."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks import codings
from sglang_pmkvq.tools import check
from tests.support.models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of Qwen2 whose keys have a bias of tens on a few channels, and a tokenizer of single letters."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = make_model(tmp_path_factory.mktemp("codings") / "model", "qwen2", layers=2, dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("k_proj.bias"):
            tensor[::17] = 60.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    words = {chr(97 + i): i for i in range(26)} | {"?": 26}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    letters = torch.randint(0, 26, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("".join(chr(97 + n) for n in letters))
    return path


def test_the_defaults_beat_what_they_replace(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "codings.json"
    argv = ["--model", str(model), "--text", str(text), "--tokens", "256", "--pieces", "1", "--out", str(out)]
    names = "fp8,4/plain,4/hadamard,4/centre,4,2,kivi-4"
    assert codings.main([*argv, "--methods", names]) == 0
    found = json.loads(out.read_text())
    rows = {row["key"]["method"]: row for row in found["rows"]}
    assert list(rows) == names.split(",") and all(row["positions"] == 256 - 160 - 1 for row in rows.values())
    assert rows["4"]["kl_mean"] * 5 < min(rows["4/plain"]["kl_mean"], rows["4/hadamard"]["kl_mean"])
    assert rows["4/centre"]["kl_mean"] < rows["4/plain"]["kl_mean"]
    assert rows["4"]["bits"] == 4.5 and rows["2"]["bits"] == 2.5 and rows["kivi-4"]["bits"] == 5.0
    assert "| 4/plain | 4.50 |" in codings.rows_table(found)
    # A second run measures nothing again.
    before = out.read_text()
    assert codings.main([*argv, "--methods", names]) == 0
    assert json.loads(out.read_text())["rows"] == json.loads(before)["rows"]


def test_an_unknown_way_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    argv = ["--model", str(model), "--text", str(text), "--tokens", "256", "--pieces", "1"]
    with pytest.raises(ValueError, match="expected one of /plain, /hadamard, /centre"):
        codings.main([*argv, "--methods", "4/other", "--out", str(tmp_path / "o.json")])


def test_check_says_which_flags_to_use(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status by the width asked for; the figures as JSON and as a picture."""
    settings = check.Settings(str(model), data=str(text), samples=1, seq_len=256, min_top1=0.75)
    out, picture = tmp_path / "check.json", tmp_path / "check.png"
    assert check.run(settings, out, picture) == 0
    said = capsys.readouterr().out
    assert "use --kv-quant pmkvq --pmkvq-final-bits" in said.splitlines()[-1]
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["16 bits", "fp8", "8", "4", "k4v2", "2"] and rows["16 bits"]["kl"] == 0
    assert picture.stat().st_size > 5000
    assert rows["8"]["worst"] and all("of layer" in worst for worst in rows["8"]["worst"])

    bad = check.Settings(
        str(model), data=str(text), samples=1, seq_len=256, min_top1=0.75, final_bits="4",
        key_transform="none", key_center="none",
    )
    assert check.run(bad, None, None) == 1
    assert "calibrate" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": "/nowhere.txt"}, "--data /nowhere.txt: no such file"),
        ({"final_bits": "5"}, "'5' is not a width"),
        ({"calibration": "/nowhere.safetensors"}, "no such calibration file"),
    ],
)
def test_check_refuses_before_it_loads_weights(change: dict[str, str], says: str, model: Path, text: Path) -> None:
    settings = check.Settings(**{"model": str(model), "data": str(text), **change})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=says):
        check.check(settings)
