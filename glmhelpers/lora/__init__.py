"""Adapters, LoRA or a learnt prefix: attach them, save and load them, prove what they learnt, take them away.

attach.py  -->  adapter.py      -->  proof.py                    merge.py, export.py
layer.py        save and load        six claims, each tried      without peft, or as one model
"""

from glmhelpers.lora.adapter import load_adapter, save_adapter
from glmhelpers.lora.adapters_2023 import import_2023, import_ptuning
from glmhelpers.lora.attach import attach_lora, attach_prefix, count_parameters, lora_b_norms
from glmhelpers.lora.export import export_adapter, export_merged
from glmhelpers.lora.fingerprint import base_checksum
from glmhelpers.lora.proof import MAY_LOSE, Proof, closeness, next_logits, prove, witness
from glmhelpers.lora.quantized import load_quantized, stored_bytes, why_not

__all__ = [
    "MAY_LOSE",
    "Proof",
    "attach_lora",
    "attach_prefix",
    "base_checksum",
    "closeness",
    "count_parameters",
    "export_adapter",
    "export_merged",
    "import_2023",
    "import_ptuning",
    "load_adapter",
    "load_quantized",
    "lora_b_norms",
    "next_logits",
    "prove",
    "save_adapter",
    "stored_bytes",
    "why_not",
    "witness",
]
