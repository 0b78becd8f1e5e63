"""Small language models and what quantizes them."""

import contextlib

import pytest
import torch

from tests.torchvision_stub import import_torchvision

with contextlib.suppress(pytest.skip.Exception):
    import_torchvision()  # Transformers imports it where it is installed
transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(24).view(2, 12)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}


def make(kind="Llama", dtype=torch.float32, **settings):
    """A random causal language model whose vectors are not all ones or zeros."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, dtype=dtype).eval()
    for tensor in model.parameters():
        if tensor.dim() == 1:
            tensor.data += torch.randn_like(tensor) / 10
    return model


def entry(quant_dtype="int4", quant_scheme="symmetric", granularity=(1, 32), **settings):
    """A config entry for all linear layers but the head."""
    own = {"quant_dtype": quant_dtype, "quant_scheme": quant_scheme, **settings}
    if granularity is not None:
        own["granularity"] = granularity if isinstance(granularity, str) else list(granularity)
    return {"op_types": ["Linear"], "exclude_op_names": ["lm_head"], "target_names": ["weight"], **own}


def batches():
    return [{"input_ids": torch.randint(0, 64, (4, 16))} for _ in range(4)]


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits
