"""Tiny configurations of every architecture on the list, which the tests of all models go through."""

from dataclasses import dataclass

# Sizes shared by all: 4 heads of 8, so that a forward pass takes milliseconds.
BERT = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 70, "type_vocab_size": 2, "pad_token_id": 0, "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}  # fmt: skip
LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 70, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BART = {
    "vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 70,
    "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "dropout_rate": 0.0, "pad_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


@dataclass
class Tiny:
    """A tiny model. attention_dropout: the config's name of it. kind: "encoder", "decoder" or "seq2seq"."""

    model_class: str
    config_class: str
    config: dict
    kind: str = "encoder"
    attention_dropout: str = "attention_probs_dropout_prob"
    gain: float = 6.0  # on the initial weights


TINY = {
    "bert": Tiny("BertForMaskedLM", "BertConfig", BERT),
    "roberta": Tiny("RobertaForMaskedLM", "RobertaConfig", BERT),
    "xlm-roberta": Tiny("XLMRobertaForMaskedLM", "XLMRobertaConfig", BERT),
    "camembert": Tiny("CamembertForMaskedLM", "CamembertConfig", BERT),
    "electra": Tiny("ElectraForMaskedLM", "ElectraConfig", BERT | {"embedding_size": 24}),
    "albert": Tiny("AlbertForMaskedLM", "AlbertConfig", BERT | {"embedding_size": 24}),
    "distilbert": Tiny(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 70,
             "dropout": 0.0, "attention_dropout": 0.0},
        attention_dropout="attention_dropout",
    ),
    "gpt2": Tiny(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 70, "attn_pdrop": 0.0,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        "decoder",
        "attn_pdrop",
    ),
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", LLAMA, "decoder", "attention_dropout"),
    "t5": Tiny("T5ForConditionalGeneration", "T5Config", T5, "seq2seq", "dropout_rate", gain=1.0),
    "bart": Tiny("BartForConditionalGeneration", "BartConfig", BART, "seq2seq", "attention_dropout"),
}  # fmt: skip
