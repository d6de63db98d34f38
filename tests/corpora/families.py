"""Tiny Hugging Face models: random weights, two layers, a handful of units.

A config is shrunk by the names of its fields (`SIZES`); what a family needs beyond that stands in
`SPECIAL`. Every dropout is set to zero, so that neither eager PyTorch nor a compiled step draws.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Batch = dict[str, torch.Tensor]

VOCAB, LENGTH, BATCH, IMAGE = 64, 16, 2, 32


class Unbuildable(Exception):
    """The family cannot run here in eager PyTorch either: a missing package, or no tiny config."""


@dataclass(frozen=True, order=True)
class Family:
    """One kind of head on one type of model."""

    kind: str
    type: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.type}"


_HEADS: dict[str, tuple[str, Any]] = {
    "causal": ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": ("AutoModelForMaskedLM", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "seq2seq": ("AutoModelForSeq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "image": (
        "AutoModelForImageClassification",
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "segment": (
        "AutoModelForSemanticSegmentation",
        auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    ),
    "audio": (
        "AutoModelForAudioClassification",
        auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    ),
    "ctc": ("AutoModelForCTC", auto.MODEL_FOR_CTC_MAPPING_NAMES),
    "speech": ("AutoModelForSpeechSeq2Seq", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
}


def families() -> list[Family]:
    """Every type that transformers has a head of these kinds for."""
    return [Family(kind, type_) for kind, (_, types) in _HEADS.items() for type_ in types]


# Field of a config -> tiny value; used where the config has the field and it is not None.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        (
            "hidden_size d_model n_embd embed_dim dim emb_dim embedding_size pooler_hidden_size "
            "input_embedding_size output_embedding_size word_embed_proj_dim embedding_dim "
            "attention_hidden_size lru_width output_hidden_size decoder_hidden_size "
            "fusion_hidden_size auxiliary_channels"
        ).split(),
        32,
    ),
    **dict.fromkeys(
        (
            "intermediate_size ffn_hidden_size n_inner encoder_ffn_dim decoder_ffn_dim ffn_dim "
            "d_ff dim_ff dff hidden_dim d_inner feed_forward_size intermediate_size_mlp "
            "dense_intermediate_size"
        ).split(),
        64,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
            "shared_intermediate_size moe_shared_expert_intermediate_size "
            "shared_experts_intermediate_size prefix_dense_intermediate_size"
        ).split(),
        32,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
            "num_encoder_layers num_decoder_layers num_blocks num_self_attends_per_block "
            "decoder_num_hidden_layers encoder_num_hidden_layers"
        ).split(),
        2,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads "
            "attention_heads num_encoder_attention_heads num_decoder_attention_heads num_heads "
            "swa_num_attention_heads encoder_num_attention_heads decoder_num_attention_heads"
        ).split(),
        4,
    ),
    **dict.fromkeys(
        (
            "num_key_value_heads swa_num_key_value_heads num_kv_heads encoder_num_key_value_heads "
            "decoder_num_key_value_heads num_key_value_attention_heads"
        ).split(),
        2,
    ),
    **dict.fromkeys(
        (
            "head_dim swa_head_dim kv_channels attention_head_size d_kv dim_head d_head v_head_dim "
            "qk_rope_head_dim qk_nope_head_dim index_head_dim rotary_dim linear_key_head_dim "
            "linear_value_head_dim linear_head_dim global_head_dim"
        ).split(),
        8,
    ),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys(
        "num_experts_per_tok moe_topk moe_k top_k_experts top_k num_experts_per_token".split(), 2
    ),
    **dict.fromkeys(
        "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group "
        "first_k_dense_replace num_dense_layers adapter_rank".split(),
        1,
    ),
    **dict.fromkeys(
        (
            "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions "
            "max_target_positions context_length max_encoder_position_embeddings "
            "max_decoder_position_embeddings original_max_position_embeddings"
        ).split(),
        64,
    ),
    **dict.fromkeys(
        (
            "sliding_window window_size local_attention attention_window_size sliding_window_size"
        ).split(),
        8,
    ),
    **dict.fromkeys(
        (
            "vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input"
        ).split(),
        VOCAB,
    ),
    **dict.fromkeys("kv_lora_rank q_lora_rank o_lora_rank".split(), 16),
    **dict.fromkeys("linear_num_key_heads linear_num_value_heads linear_num_heads".split(), 2),
    **dict.fromkeys("mamba_d_state state_size ssm_state_size".split(), 8),
    **dict.fromkeys("mamba_n_heads mamba_num_heads n_mamba_heads num_mamba_heads".split(), 4),
    **dict.fromkeys("mamba_chunk_size chunk_size".split(), 8),
    **dict.fromkeys("mamba_d_head mamba_head_dim mamba_headdim".split(), 16),
    "image_size": IMAGE,
    "patch_size": 8,
    "num_labels": 3,
    "type_vocab_size": 2,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "num_mel_bins": 16,
    "conv_dim": (32, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "tdnn_dim": (16, 16),
    "tdnn_kernel": (3, 3),
    "tdnn_dilation": (1, 1),
    "xvector_output_dim": 16,
    "mlp_layer_types": None,
    "layer_types": None,
    "stem_num_channels": 8,
    "index_topk": 8,
    "index_n_heads": 2,
    "block_size": 4,
    "num_codevectors_per_group": 8,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
}

_NO_NOISE = ("drop", "jitter", "mask_time_prob", "mask_feature_prob")


def tiny_config(type_: str) -> Any:
    """The type's config, shrunk.

    Raises:
        Unbuildable: where the type has no such config.
    """
    return _tiny(CONFIG_MAPPING[type_], SPECIAL.get(type_, {}))


def _tiny(cls: Any, special: Mapping[str, Any]) -> Any:
    fields = {f.name: _default(f) for f in dataclasses.fields(cls)}
    given = {name: v for name, d in fields.items() if (v := _shrunk(name, d)) is not d}
    for name, part in getattr(cls, "sub_configs", {}).items():
        if name not in special:
            type_ = getattr(part, "model_type", "")
            if not dataclasses.is_dataclass(part) or not type_:
                raise Unbuildable(f"{name} may be of any type")
            given[name] = _tiny(part, SPECIAL.get(type_, {}))
    return cls(**{**given, **special})


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else None


def _shrunk(name: str, default: Any) -> Any:
    if any(word in name for word in _NO_NOISE) and isinstance(default, (int, float, tuple, list)):
        if isinstance(default, (tuple, list)):
            return type(default)(0.0 for _ in default)
        return default if isinstance(default, bool) else 0.0
    if name.endswith("token_id") and isinstance(default, int):
        return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 3)
    if name == "apply_spec_augment":
        return False
    if name == "depths" and default is not None:
        return type(default)(1 for _ in default)
    if name in ("hidden_sizes", "embed_dims", "encoder_hidden_sizes") and default is not None:
        return type(default)(16 * (i + 1) for i, _ in enumerate(default))
    if name in SIZES and default is not None:
        value = SIZES[name]
        if isinstance(default, (tuple, list)) and not isinstance(value, (tuple, list)):
            return default if value is not None else None
        if isinstance(value, tuple) and not isinstance(default, (tuple, list)):
            return default
        return list(value) if isinstance(default, list) and value is not None else value
    return default


# Type -> what its config needs beyond the general recipe.
_MLA = {"num_key_value_heads": 4}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 "
            "youtu dots3_note_text"
        ).split(),
        _MLA,
    ),
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2},
    **dict.fromkeys("qwen3_next qwen3_5_text qwen3_5_moe_text".split(), _LINEAR),
    **dict.fromkeys(
        "t5 longt5 switch_transformers mt5 umt5".split(), {"decoder_start_token_id": 0}
    ),
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"n_groups": 1},
    "nemotron": {"num_key_value_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    **dict.fromkeys(
        "swin swinv2 donut-swin".split(), {"embed_dim": 24, "patch_size": 2, "window_size": 4}
    ),
    **dict.fromkeys("convnext convnextv2".split(), {"patch_size": 4}),
    **dict.fromkeys("pvt pvt_v2".split(), {"hidden_sizes": [16, 32, 80, 64]}),
    **dict.fromkeys("mobilenet_v1 mobilenet_v2".split(), {"image_size": 2 * IMAGE}),
    "cvt": {"depth": [1, 1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (4, 4)},
    "luke": {"entity_vocab_size": VOCAB, "entity_emb_size": 16},
    "roc_bert": {
        "pronunciation_vocab_size": VOCAB,
        "shape_vocab_size": VOCAB,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "led": {"attention_window": 8, "max_encoder_position_embeddings": 64},
    "longformer": {"attention_window": 8},
    "funnel": {"block_sizes": [1, 1]},
    "longcat_flash": {"zero_expert_num": 2, "qk_head_dim": 16},
}


def build(family: Family) -> tuple[torch.nn.Module, Batch]:
    """A model in training mode and a batch of keyword arguments.

    Raises:
        Unbuildable: where eager PyTorch cannot run the family here.
    """
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = tiny_config(family.type)
            config.use_cache = False
            if family.kind == "causal" and hasattr(config, "is_decoder"):
                config.is_decoder = True
            head = getattr(transformers, _HEADS[family.kind][0])
            model = head.from_config(config)
    except Unbuildable:
        raise
    except Exception as error:
        raise Unbuildable(f"{type(error).__name__}: {error}") from error
    no_dropout(model)
    batch = _BATCHES[family.kind](model.config)
    batch.update(EXTRA[family.type](model.config) if family.type in EXTRA else {})
    return model.train(), batch


def no_dropout(model: torch.nn.Module) -> None:
    """Also dropouts that no field of the config names."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):  # pyright: ignore
            module.p = 0.0


def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The loss that the model itself computes from its labels."""
    loss: torch.Tensor = model(**batch).loss
    return loss


def _tokens(config: Any, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, VOCAB, (BATCH, length), generator=generator)


def _causal(config: Any) -> Batch:
    ids = _tokens(config)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def _seq2seq(config: Any) -> Batch:
    return {**_causal(config), "labels": _tokens(config, 8)}


def _image(config: Any) -> Batch:
    size = getattr(config, "image_size", None)
    # Most convolutional nets have no size; their batch norms need more than two numbers a channel.
    side = size if isinstance(size, int) else size[0] if size else 2 * IMAGE
    batch = BATCH if side <= IMAGE else 2 * BATCH
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(batch, getattr(config, "num_channels", 3), side, side, generator=generator)
    return {"pixel_values": pixels, "labels": torch.arange(batch) % 2}


def _segment(config: Any) -> Batch:
    pixels = _image(config)["pixel_values"]
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 2, (len(pixels), *pixels.shape[-2:]), generator=generator)
    return {"pixel_values": pixels, "labels": labels}


def _wave(length: int = 400) -> torch.Tensor:
    return torch.randn(BATCH, length, generator=torch.Generator().manual_seed(1))


def _audio(config: Any) -> Batch:
    return {"input_values": _wave(), "labels": torch.tensor([0, 1])}


def _ctc(config: Any) -> Batch:
    return {"input_values": _wave(), "labels": _tokens(config, 4)}


def _speech(config: Any) -> Batch:
    frames = 2 * int(getattr(config, "max_source_positions", 64))
    mel = torch.randn(BATCH, 16, frames, generator=torch.Generator().manual_seed(1))
    return {"input_features": mel, "labels": _tokens(config, 8)}


_BATCHES: dict[str, Callable[[Any], Batch]] = {
    "causal": _causal,
    "masked": _causal,
    "seq2seq": _seq2seq,
    "image": _image,
    "segment": _segment,
    "audio": _audio,
    "ctc": _ctc,
    "speech": _speech,
}

# Type -> arguments beside those of its kind.
EXTRA: Mapping[str, Callable[[Any], Batch]] = {}
