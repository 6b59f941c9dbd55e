"""`transformers.Trainer`, told what a split ChatGLM needs. Everything else stays the Trainer's.

training_step     whole batch on the CPU ─► micro-batches ─► one backward, or one for each (`pipeline.run_step`)
evaluation_loop   the same cuts and the same chunked loss, a sum over labels, no logits
order of rows     from seed and epoch alone, so a resumed run sees the same rows
checkpoints       the Trainer's files, then a marker; random states of *all* GPUs; the strict way back
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from glmhelpers.devicemap.captured import Captured
from glmhelpers.devicemap.devices import first_device, own_streams, parameters_of, place_part, walk
from glmhelpers.lora.adapter import write_peft_files
from glmhelpers.lora.attach import adapter_weights, fill_adapter, not_a_number, prefix_encoder
from glmhelpers.training.checkpoint_manager import keep_last, last_complete, mark_complete, marker_facts, what_is_wrong
from glmhelpers.training.guards import Guard
from glmhelpers.training.pipeline import behind_prefix, run_step, split_batch, target_rows
from glmhelpers.utils.files import room_for
from glmhelpers.utils.folders import expanded
from glmhelpers.utils.types import Model

RANDOM_STATES = "rng_state_gpus.pth"


class SameOrderSampler(LengthGroupedSampler):
    """Rows of similar length together, in an order that depends on seed and epoch only.

    The original draws its order from the global random state, which a resumed run does not have at that moment.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int = 0):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class GLMTrainer(Trainer):
    """See the module.

    Args:
        model: a PeftModel on its devices.
        args: `TrainingArguments`.
        micro_batches: parts into which a batch is cut; in_flight: how many of them are in memory at a time, None: all.
        forward: more arguments of the model's forward, such as `loss_chunk`.
        folder: where checkpoints go.
        captured: the blocks as CUDA graphs, for the steps of training.
        others: as for `Trainer`.
    """

    model: Model

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        micro_batches: int = 1,
        in_flight: int | None = None,
        forward: Mapping[str, Any] | None = None,
        folder: str | Path | None = None,
        captured: Captured | None = None,
        **others: Any,
    ):
        # With a model on one GPU of several, the Trainer would copy it to all of them (DataParallel).
        args._n_gpu = min(args.n_gpu, 1)
        self.micro_batches, self.forward, self.captured = micro_batches, dict(forward or {}), captured
        self.in_flight = in_flight
        self.folder = expanded(folder or str(args.output_dir))
        self.batch_shape: tuple[int, ...] = (0, 0)
        self.unwrapped, self.work = None, 0
        super().__init__(model=model, args=args, **others)
        # A batch stays on the CPU until its labels are counted, or counting would wait for the GPU.
        self.accelerator.device_placement = False
        self.guard = Guard(lambda: last_complete(self.folder, say=lambda _: None))
        self.add_callback(self.guard)
        self.add_callback(_Resumed(self))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the Trainer's; for its length the model lets gradients go in a third of the time."""

        def zero_grad(set_to_none: bool = True) -> None:
            for weight in parameters_of(self.model):
                weight.grad = None

        self.model.__dict__["zero_grad"] = zero_grad
        try:
            return super().train(*args, **kwargs)
        finally:
            del self.model.__dict__["zero_grad"]

    # The step --------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        """Forward and backward of all micro-batches; the loss, on the device where the Trainer wants it."""
        if not all(module.training for module in walk(model)):
            model.train()
        self.batch_shape = tuple(inputs["input_ids"].shape)
        self.state.num_input_tokens_seen += count_tokens(inputs)
        if not len(target_rows(inputs["labels"])):
            step, rows = self.state.global_step + 1, self.batch_shape[0]
            self.guard.refuse_unlabelled(f"the batch of step {step}, {rows} rows, has")
        loss = run_step(
            self.bare(model),
            inputs,
            min(self.micro_batches, self.batch_shape[0]),
            num_items=num_items_in_batch,
            backward=self.accelerator.backward,
            captured=self.captured,
            in_flight=self.in_flight,
            **self.forward,
        )
        self.guard.see(loss)
        return loss.to(self.args.device)

    def bare(self, model: Model) -> Model:
        """The model without the autocast that accelerate wraps around it when a GradScaler is used.

        The base computes in its own dtype, in training as in evaluation and chat.
        """
        if model is not self.unwrapped or "_original_forward" in vars(model):
            self.unwrapped = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        return self.unwrapped

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the Trainer's, which counts all parameters again in each step."""
        tokens = inputs["input_ids"].numel()
        self.work = self.work or super().floating_point_ops(inputs) // tokens
        return self.work * tokens

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        trained = [weight for weight in parameters_of(model) if weight.grad is not None]
        return super()._clip_grad_norm(SimpleNamespace(parameters=lambda: trained))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> int:
        return sum(len(target_rows(batch["labels"])) for batch in batch_samples)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """The device map has placed the model, perhaps with its embedding on the CPU."""

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Mean loss over all labels of all rows: the same number for any batch size. Training's random state stays."""
        model = self.bare(self.model).eval()
        device = first_device(model)
        rows_at_once = max(1, -(-self.args.per_device_train_batch_size // self.micro_batches))
        total, labels, rows = torch.zeros((), dtype=torch.float64), 0, 0
        # In training's streams, or memory that the allocator keeps for them could not be used here.
        with torch.random.fork_rng(devices=[]), own_streams(model):
            called, before = behind_prefix(model)
            for batch in dataloader:
                rows += len(batch["labels"])
                self.batch_shape = tuple(batch["input_ids"].shape)
                if not len(target_rows(batch["labels"])):
                    continue  # adds nothing to either sum
                for part in split_batch(batch, -(-len(batch["labels"]) // rows_at_once)):
                    labels += len(part["target_rows"])
                    placed = {**place_part(model, part, device), "num_items_in_batch": 1, **before, **self.forward}
                    loss = called(**placed, use_cache=False, return_logits=False).loss
                    total = total.to(loss.device) + loss
        if not labels:
            self.guard.refuse_unlabelled(f"the {rows} rows for evaluation have")
        metrics = {f"{metric_key_prefix}_loss": total.item() / labels}
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=rows)

    # The order of the rows -------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) is LengthGroupedSampler:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return SameOrderSampler(sampler.batch_size, sampler.lengths, seed)
        return sampler

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial) -> str:
        return str(self.folder)

    def check_weights(self) -> None:
        """Stop if the adapter holds what is no number, before a checkpoint of it could take the place of a good one."""
        if name := not_a_number(self.model):
            self.guard.stop(
                f"after step {self.state.global_step}, {name} holds NaN or infinity",
                f"Lower the learning rate (it is {self.args.learning_rate:g}).",
            )

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        self.check_weights()
        target = self.folder / f"checkpoint-{self.state.global_step}"
        shutil.rmtree(target, ignore_errors=True)
        # The Trainer would delete older checkpoints before this one has its marker.
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with room_for(target):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        window = {"sum": self._tr_loss.item(), "logged": self._globalstep_last_logged}
        mark_complete(target, step=self.state.global_step, window=window)
        keep_last(self.folder, keep)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if prefix_encoder(self.model) is None:
            self.model.save_pretrained(output_dir, save_embedding_layers=False)
        else:  # peft would leave out the network of a prefix_projection
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
            weights = {name: weight.detach().cpu() for name, weight in adapter_weights(self.model).items()}
            write_peft_files(Path(str(output_dir)), self.model.active_peft_config, weights)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        fill_adapter(self.model, load_file(folder / "adapter_model.safetensors"), folder.name)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if torch.cuda.is_available():  # the Trainer keeps the first GPU's state only
            torch.save(torch.cuda.get_rng_state_all(), Path(output_dir) / RANDOM_STATES)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        states = Path(checkpoint or "") / RANDOM_STATES
        if checkpoint and states.is_file() and torch.cuda.is_available():
            states = torch.load(states, weights_only=True)
            if len(states) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(states)


class _Resumed(TrainerCallback):
    """Keeps the start of a run as checkpoint 0, and gives a resumed run the losses that were not logged yet."""

    def __init__(self, trainer: GLMTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Restore the sum of losses since the last log, or save checkpoint 0."""
        trainer = self.trainer
        start = trainer.folder / "checkpoint-0"
        if state.global_step == 0 and args.save_strategy != "no" and what_is_wrong(start):
            trainer._save_checkpoint(trainer.model, None)
        folder = trainer.folder / f"checkpoint-{state.global_step}"
        if state.global_step and folder.is_dir():
            window = marker_facts(folder)["window"]
            trainer._tr_loss += window["sum"]
            trainer._globalstep_last_logged = window["logged"]


def count_tokens(batch: Mapping[str, Tensor]) -> int:
    """Real tokens of a batch [B, L] on the CPU: those of its mask, or all."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
