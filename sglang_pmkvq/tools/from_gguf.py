"""A GGUF file as a folder that SGLang and transformers load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Token types of GGUF. Control tokens are special; unused ones only pad the vocabulary to the embedding's size.
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as transformers writes one, weights in bf16, into an existing folder.

    Holds the weights in memory once in bf16, and the largest tensor in float32.

    Raises:
        ValueError: the file's architecture or tokenizer is not one of those that ``models.MODELS`` has.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    fields = GGUFReader(gguf).fields
    metadata = {name: fields[name].contents() for name in fields if name.startswith("tokenizer.")}
    tokenizer = tokenizer_of(metadata)
    tokenizer.save_pretrained(folder)
    _rewrite_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    finally:
        logging.enable_progress_bar()
    # Chat models end a turn with one token and a document with another; a server must stop at both.
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    # Programs that know transformers 4 look for rope_theta at the top.
    theta = model.config.rope_parameters["rope_theta"]
    _rewrite_json(folder / "config.json", rope_theta=theta, _model_name_or_path=None)
    # safetensors makes files for their owner only, whatever the umask is.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def tokenizer_of(metadata: dict[str, Any]) -> Any:
    """A transformers tokenizer from the ``tokenizer.*`` metadata of a GGUF file.

    Made here rather than by transformers, whose conversion takes the wrong token for the end of a turn and leaves
    out <tool_call> and its like.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    kind = metadata["tokenizer.ggml.pre"]
    if metadata["tokenizer.ggml.model"] != "gpt2" or kind not in ("smollm", "qwen2"):
        raise ValueError(f"a tokenizer of kind {metadata['tokenizer.ggml.model']}, {kind} cannot be converted")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges))
    # The splits are those of the makers' own tokenizers; the GGUF file has only a name for them.
    if kind == "qwen2":
        made.normalizer = normalizers.NFC()
        split: Any = pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        )
    else:
        split = pre_tokenizers.Digits(individual_digits=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "qwen2")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    for i, token in enumerate(tokens):
        if types[i] in (CONTROL, USER_DEFINED):
            made.add_tokens([AddedToken(token, normalized=False, special=types[i] == CONTROL)])

    def named(role: str) -> str | None:
        number = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return None if number is None else tokens[number]

    # A program that finds a beginning may add it, where the file says that nothing is to be added.
    bos = named("bos") if metadata.get("tokenizer.ggml.add_bos_token", True) else None
    # One file doubles the braces of the example, and a model that does as it is told then calls tools in no JSON.
    template = metadata["tokenizer.chat_template"].replace('{{\\"name\\": ', '{\\"name\\": ')
    template = template.replace("<args-json-object>}}", "<args-json-object>}")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=bos,
        eos_token=named("eos"),
        pad_token=named("padding"),
        unk_token=named("unknown"),
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def _rewrite_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    content = {key: value for key, value in content.items() if key not in changes or value is not None}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
