"""Tiny models of the ``transformers`` library, made from configurations and so without any download.

Every function returns ``(model, kwargs)`` with a batch of two and ``use_cache=False`` where the model has a cache.
The library is imported only when a model is built.
"""

# Configurations take more keywords than their signatures declare.
# pyright: reportCallIssue=false

import functools
from collections.abc import Callable

import torch
import torch.nn as nn
from tests.surgery.zoo import stir

Built = tuple[nn.Module, dict]
HF: dict[str, Callable[[], Built]] = {}
BATCH, LENGTH, VOCABULARY = 2, 8, 64


def hugging(function: Callable[[], Built]) -> Callable[[], Built]:
    """Registers a model under the name of its function and makes its weights and inputs reproducible."""

    @functools.wraps(function)
    def build() -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = function()
            stir(model)
        return model, inputs

    HF[function.__name__] = build
    return build


def ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length))


def encoder_sizes() -> dict:
    return dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                max_position_embeddings=24, num_labels=3, initializer_range=0.2)  # fmt: skip


def decoder_sizes() -> dict:
    return dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, intermediate_size=48, max_position_embeddings=24, use_cache=False,
                initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip


def causal_inputs() -> dict:
    return {"input_ids": ids(), "use_cache": False}


def bert(attention: str) -> Built:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**encoder_sizes(), attn_implementation=attention))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    return model, {"input_ids": ids(), "attention_mask": mask}


@hugging
def bert_classifier() -> Built:
    return bert("sdpa")


@hugging
def bert_classifier_eager() -> Built:
    return bert("eager")


@hugging
def roberta_classifier() -> Built:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(**encoder_sizes(), pad_token_id=1, attn_implementation="sdpa")
    return RobertaForSequenceClassification(config), {"input_ids": ids()}


@hugging
def distilbert_classifier() -> Built:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48, num_labels=3,
                              max_position_embeddings=24, initializer_range=0.2,
                              attn_implementation="sdpa")  # fmt: skip
    return DistilBertForSequenceClassification(config), {"input_ids": ids()}


@hugging
def gpt2_lm() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=24, use_cache=False,
                        initializer_range=0.2, bos_token_id=1, eos_token_id=2,
                        attn_implementation="sdpa")  # fmt: skip
    return GPT2LMHeadModel(config), causal_inputs()


def llama(attention: str) -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**decoder_sizes(), attn_implementation=attention)), causal_inputs()


@hugging
def llama_lm() -> Built:
    return llama("sdpa")


@hugging
def llama_lm_eager() -> Built:
    return llama("eager")


@hugging
def qwen2_lm() -> Built:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**decoder_sizes(), attn_implementation="sdpa")), causal_inputs()


@hugging
def qwen3_lm() -> Built:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**decoder_sizes(), head_dim=12, tie_word_embeddings=True, attn_implementation="sdpa")
    return Qwen3ForCausalLM(config), causal_inputs()


@hugging
def mistral_lm() -> Built:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**decoder_sizes(), sliding_window=4, attn_implementation="sdpa")
    return MistralForCausalLM(config), causal_inputs()


@hugging
def t5_seq2seq() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2,
                      num_heads=4, feed_forward_proj="gated-gelu", use_cache=False, pad_token_id=0, eos_token_id=1,
                      decoder_start_token_id=0)  # fmt: skip
    inputs = {"input_ids": ids(), "decoder_input_ids": ids(6), "use_cache": False}
    return T5ForConditionalGeneration(config), inputs


@hugging
def vit_classifier() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16,
                       patch_size=4, num_labels=5, initializer_range=0.2, attn_implementation="sdpa")  # fmt: skip
    return ViTForImageClassification(config), {"pixel_values": torch.randn(BATCH, 3, 16, 16)}


@hugging
def whisper_seq2seq() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2,
                           encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=40,
                           num_mel_bins=16, max_source_positions=12, max_target_positions=16, use_cache=False,
                           pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
                           suppress_tokens=None, begin_suppress_tokens=None, init_std=0.2,
                           attn_implementation="sdpa")  # fmt: skip
    inputs = {"input_features": torch.randn(BATCH, 16, 24), "decoder_input_ids": ids(), "use_cache": False}
    return WhisperForConditionalGeneration(config), inputs
