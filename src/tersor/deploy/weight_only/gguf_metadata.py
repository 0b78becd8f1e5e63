"""What a GGUF file says of a model beside its weights: its sizes, and its vocabulary."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from tersor.errors import InvalidValueError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""``model_type`` of Transformers -> the architecture in llama.cpp."""


def architecture_of(model: Any) -> str:
    """The architecture as GGUF calls it.

    Raises:
        InvalidValueError: it is none of those that are known, or has something that the file could not say.
    """
    config = model.config
    if config.model_type not in ARCHITECTURES or not type(model).__name__.endswith("ForCausalLM"):
        raise InvalidValueError(
            f"its tensors have no known names in GGUF: {type(model).__name__}",
            where="model_or_compressor",
            legal=[f"{name} for causal language modelling" for name in ARCHITECTURES],
            remedy="Use save_compressed_tensors.",
        )
    windows = [kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"]
    window = config.model_type == "mistral" and config.sliding_window is not None
    rope, _ = _rope(config)
    for wrong, what, remedy in (
        (windows or window, "attends in windows", "Set config.sliding_window = None if contexts stay shorter."),
        (rope != "default", f"scales its positions ({rope})", "Use save_compressed_tensors."),
        (config.hidden_act != "silu", f"has the activation {config.hidden_act}", "Use save_compressed_tensors."),
    ):
        if wrong:
            raise InvalidValueError(f"it {what}, which is not written to GGUF", where="config", remedy=remedy)
    return ARCHITECTURES[config.model_type]


def rows_in_order(name: str, config: Any, rows: int) -> Tensor | None:
    """In which order the file has the rows of a tensor; None where it is the model's.

    Llama's queries and keys are rotated in pairs of neighbours in llama.cpp, and in pairs of half a head's distance in
    Transformers.
    """
    if ARCHITECTURES[config.model_type] != "llama" or not (".attn_q." in name or ".attn_k." in name):
        return None
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def write_metadata(writer: Any, config: Any, kinds: Counter[str], tokenizer: Any, pre_tokenizer: str) -> None:
    """All that stands in front of the tensors.

    Args:
        writer: of the ``gguf`` package.
        config: of the model.
        kinds: how many tensors of each type follow.
        tokenizer: see :func:`tersor.deploy.weight_only.save_gguf`.
        pre_tokenizer: likewise.
    """
    import gguf  # here, because the package is optional

    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(getattr(config, "name_or_path", "") or config.model_type.capitalize())
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(_rope(config)[1])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    blocks = Counter({kind: count for kind, count in kinds.items() if kind.startswith("Q")})
    most = f"MOSTLY_{blocks.most_common(1)[0][0]}" if blocks else "ALL_F32"
    writer.add_file_type(gguf.LlamaFileType[most])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        _write_vocabulary(writer, tokenizer, pre_tokenizer, config.vocab_size)


def _rope(config: Any) -> tuple[str, float]:
    """How positions are scaled, and the base of their frequencies; Transformers 5 keeps both in one place."""
    said = getattr(config, "rope_parameters", None)
    if said is None:
        said = {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
    return said.get("rope_type", said.get("type", "default")), float(said["rope_theta"])


def _write_vocabulary(writer: Any, tokenizer: Any, pre_tokenizer: str, size: int) -> None:
    """A byte-level BPE vocabulary.

    Raises:
        InvalidValueError: the tokenizer is of another kind, or has more tokens than the model.
    """
    from gguf import TokenType  # here, because the package is optional

    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {}
    said = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    if content.get("model", {}).get("type") != "BPE" or '"ByteLevel"' not in said:
        raise InvalidValueError(
            f"{type(tokenizer).__name__} is no byte-level BPE tokenizer, and only those are written to GGUF",
            where="tokenizer",
            remedy="Leave it out; the file then holds no vocabulary.",
        )
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(vocabulary) >= size:
        raise InvalidValueError(f"has token {max(vocabulary)}, and the model {size} tokens", where="tokenizer")
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    kinds: list[int] = []
    for number in range(size):
        if number not in vocabulary:
            kind = TokenType.UNUSED
        elif number not in added:
            kind = TokenType.NORMAL
        else:
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        kinds.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list([vocabulary.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(kinds)
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("unk_token_id", writer.add_unk_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        number = getattr(tokenizer, name, None)
        if number is not None:
            add(number)
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)
