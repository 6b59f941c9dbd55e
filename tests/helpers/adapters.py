"""Adapters written by peft alone, and all of a base that a refusal must leave alone."""

import json

import torch
from peft import LoraConfig, get_peft_model

from tests.helpers.reference import fresh_model


def drawn(seed=0, r=4, **more):
    torch.manual_seed(seed)
    model = get_peft_model(
        fresh_model(), LoraConfig(r=r, task_type="CAUSAL_LM", **{"target_modules": ["query_key_value"], **more})
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model.eval()


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def state(model):
    """All that a refusal could leave changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return (
        {
            name: (type(module), module.training, sorted(vars(module)), [len(getattr(module, hook)) for hook in hooks])
            for name, module in model.named_modules()
        },
        {name: (parameter.requires_grad, parameter.data_ptr()) for name, parameter in model.named_parameters()},
        {name: tensor.data_ptr() for name, tensor in model.state_dict().items()},
        model.config.to_dict(),
    )
