"""Self-attention of BERT-like encoders, and the cross-attention that some of them add when they serve as decoders.

They go through Transformers' attention interface. Whether a module is causal comes with its mask. A model that behaves
like these is one line here.
"""

from hf_flash.registry import Behaviour, register

SELF = Behaviour("self-attention")
CROSS = Behaviour("cross-attention", is_cross=lambda module: True)

register(SELF, "bert.BertSelfAttention", "albert.AlbertAttention", "distilbert.DistilBertSelfAttention")
register(SELF, "roberta.RobertaSelfAttention", "xlm_roberta.XLMRobertaSelfAttention")
register(SELF, "camembert.CamembertSelfAttention", "electra.ElectraSelfAttention")

register(CROSS, "bert.BertCrossAttention", "electra.ElectraCrossAttention", "camembert.CamembertCrossAttention")
register(CROSS, "roberta.RobertaCrossAttention", "xlm_roberta.XLMRobertaCrossAttention")
