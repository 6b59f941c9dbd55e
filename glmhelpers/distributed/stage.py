"""One stage of the pipeline: a whole ChatGLM of which this process has a few blocks, and nothing else.

    build on "meta"     shapes without memory: free
    read                the tensors of this stage's parts, shard by shard, by their offsets
    attach LoRA         on all blocks, so that the random numbers are those of a model in one piece
    take away           other blocks ─► a module that lets hidden states pass; other parts ─► nothing

    rank 0   [embedding][0][1][2] .  .  .  .  ──► hidden [B, L, H] ──►  .  .  .  .  [3][4][5][norm][head]   rank 1

Mask, positions and rotary tables are made on each rank from ids that every rank has, so only hidden states travel.
Names stay those of the whole model: the adapters of all stages together are one adapter.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from glmhelpers.cost_model.placement import device_label, part_names
from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.devicemap.check import check_filled
from glmhelpers.devicemap.devices import to_device
from glmhelpers.distributed.plan import ProcessPlan, StageCut
from glmhelpers.lora.attach import check_adapter, lora_config, origin_of, quiet_peft
from glmhelpers.lora.layer import fuse_lora
from glmhelpers.training.pipeline import target_rows
from glmhelpers.utils.types import Model
from glmhelpers.weights.loading import load_parts
from thuglm.chunked_loss import chunked_cross_entropy


class Elsewhere(nn.Module):
    """In the place of a block that another rank has: hidden states pass unchanged."""

    def forward(self, hidden_states: Tensor, *others: Tensor | None, past_key_values=None) -> tuple[Tensor, None]:
        """[B, L, H] -> the same, and no attention weights."""
        return hidden_states, None


class StageModule(nn.Module):
    """What `torch.distributed.pipelining.PipelineStage` runs: ids or hidden states in, hidden states out.

    Args:
        model: from `build_stage`.
        cut: which stage it is.
    """

    def __init__(self, model: PeftModel, cut: StageCut):
        super().__init__()
        self.model, self.cut = model, cut

    def forward(self, given: Tensor, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L, H] after this stage's blocks (and the final norm on the last).

        Args:
            given: ids [B, L] on the first stage, hidden states [B, L, H] of the stage before on the others.
            ids, attention_mask: [B, L], the same on every stage.
        """
        net: Model = self.model.get_base_model().transformer
        embeds = None if self.cut.first else given
        return net(ids, attention_mask=attention_mask, inputs_embeds=embeds, use_cache=False).last_hidden_state

    def loss_sum(self, hidden: Tensor, labels: Tensor, chunk: int) -> Tensor:
        """Sum of the cross entropies of hidden states [B, L, H] against labels [B, L] (on the CPU), in chunks of rows.

        0, with a gradient of 0, if there is no label.
        """
        net: Model = self.model.get_base_model()
        chosen = target_rows(labels)
        targets = to_device(labels[:, 1:].reshape(-1)[chosen], hidden.device)
        rows = hidden[:, :-1].reshape(-1, hidden.shape[-1]).index_select(0, to_device(chosen, hidden.device))
        return chunked_cross_entropy(rows, net.lm_head.weight, targets, chunk)


def build_stage(
    folder: str | Path,
    plan: ProcessPlan,
    cut: StageCut,
    device: torch.device,
    dtype: torch.dtype,
    **adapter: Any,
) -> StageModule:
    """A stage with its weights and a fresh adapter, in training mode.

    Args:
        folder: the checkpoint; only the tensors of this stage are read.
        plan: for the blocks that are checkpointed.
        cut: one of `plan.stages`.
        device: where it goes.
        dtype: of the frozen weights.
        adapter: r, alpha, dropout, targets and seed, as for `make_stage`.

    Raises:
        FileNotFoundError, ValueError: see `load_model`.
        RuntimeError: see `make_stage`.
    """
    net, _ = load_parts(folder, {"": device_label(device)}, dtype, parts_of(plan, cut), progress=False)
    return make_stage(net, plan, cut, **adapter)


def parts_of(plan: ProcessPlan, cut: StageCut) -> set[str]:
    """Names of the parts whose tensors a stage holds; the head is the embedding's tensor."""
    embedding, *blocks, norm, _ = part_names(sum(plan.blocks))
    ends = {embedding} if cut.first or cut.last else set()
    return {blocks[block] for block in cut.blocks} | ends | ({norm} if cut.last else set())


def make_stage(
    net: Model,
    plan: ProcessPlan,
    cut: StageCut,
    *,
    r: int = 8,
    alpha: float = 32,
    dropout: float = 0.1,
    targets: tuple[str, ...] = ("query_key_value",),
    seed: int = 0,
) -> StageModule:
    """A stage of a model that has the parts of the stage on this rank's device, and the others on "meta".

    Args:
        net: a ChatGLM; it is changed.
        plan: for the blocks that are checkpointed.
        cut: one of `plan.stages`.
        r, alpha, dropout, targets, seed: as for `attach_lora`, with the same random numbers.

    Raises:
        RuntimeError: a part of this stage was left without memory.
    """
    torch.manual_seed(seed)
    with quiet_peft():
        model = get_peft_model(net, lora_config(r, alpha, dropout, targets))
    origin_of(model).starts_from = f"fresh, seed {seed}"
    for block in set(range(sum(plan.blocks))) - set(cut.blocks):
        net.transformer.layers[block] = Elsewhere()
    if not cut.first:
        net.transformer.word_embeddings = nn.Identity()
    if not cut.last:
        net.transformer.final_layernorm, net.lm_head = nn.Identity(), nn.Identity()
    fuse_lora(model)
    check_adapter(model)
    check_filled(net)
    checkpoint_only(model, plan.checkpointed)
    return StageModule(model.train(), cut)
