"""LoRA training with transformers' own Trainer, and the few things it does not do for a model on several GPUs.

    rows ─► batch on the CPU ─► micro-batches ─► GPU 0 ─► blocks ─► GPU 1 ─► blocks ─► head, loss
                                                                                         │
    lora_A, lora_B  (fp32, 3.7 million)  ◄──────────────── backward ◄────────────────────┘
    everything else (fp16, frozen)

`train` is one call that may be made again and again: a run that was stopped, by whatever, goes on from its last
complete checkpoint, with the numbers it would have had anyway; a run that is finished is read back.

    trainer             the Trainer, thinly subclassed       guards, memory_plan   what went wrong, and what to do
    checkpoint_manager  whole checkpoints, or none           progress              a line a step, a table at the end
"""

import traceback
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from glmhelpers.devicemap.captured import ON_CPU, Captured
from glmhelpers.devicemap.plan import Plan
from glmhelpers.lora.attach import (
    adapter_weights,
    bring_prefix_home,
    check_adapter,
    count_parameters,
    fill_adapter,
    not_a_number,
    origin_of,
)
from glmhelpers.tokens.collate import SAMPLING
from glmhelpers.training.checkpoint_manager import last_complete, read_state, start_run
from glmhelpers.training.guards import refuse_many_processes, refuse_rows, refuse_settings
from glmhelpers.training.memory_plan import explain_out_of_memory, out_of_memory, refuse_plan
from glmhelpers.training.progress import EveryMinutes, Watch, logged_losses
from glmhelpers.training.trainer import GLMTrainer
from glmhelpers.utils.files import alone
from glmhelpers.utils.folders import expanded


def training_arguments(output: Any, on_gpu: bool, **changes: Any) -> TrainingArguments:
    """`TrainingArguments` with the settings that the course does not discuss.

    Args:
        output: folder for checkpoints; each run gets a folder of its own in it.
        on_gpu: float16 base: gradients need a GradScaler (`fp16=True`).
        changes: any argument of `TrainingArguments`.

    Raises:
        RuntimeError: started as one of several processes, see `refuse_many_processes`.
    """
    refuse_many_processes()
    settings = {
        "output_dir": str(expanded(output)),
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 500,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "logging_strategy": "steps",
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "fp16": on_gpu,
        "use_cpu": not on_gpu,
        "label_names": ["labels"],
        "prediction_loss_only": True,
        "dataloader_pin_memory": on_gpu,
        "seed": 0,
        **SAMPLING,
        **changes,
    }
    return TrainingArguments(**settings)


def train(
    model: PeftModel,
    dataset: Any,
    collator: Any,
    args: TrainingArguments,
    eval_dataset: Any = None,
    *,
    plan: Plan | None = None,
    micro_batches: int = 1,
    in_flight: int | None = None,
    loss_chunk: int | None = None,
    cuda_graphs: bool | None = False,
    minutes: float = 10,
    watch: Watch | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict]:
    """Train, or go on with a run that was stopped; return its log: dicts with `step` and `loss` or `eval_loss`.

    Args:
        model: from `attach_lora`, on its devices.
        dataset: encoded rows.
        collator: makes a batch of some rows, see `RightPadCollator`.
        args: from `training_arguments`. Other settings, rows or another base make another run.
        eval_dataset: encoded rows for the evaluation loss.
        plan: applied where it is not yet (see `Plan.apply`); the next three are taken from it.
        micro_batches: parts into which each batch is cut: the same loss and gradients but for rounding, and for the
            dropout masks that are drawn. It makes no other run: a run that is finished is read back all the same.
        in_flight: how many of them are in memory at a time, as many as there are GPUs; None for all, as it is
            with a learnt prefix and with CUDA graphs. The same results but for rounding.
        loss_chunk: rows of logits alive at once; changes no result.
        cuda_graphs: record the kernels of each length of rows once, and start them with one call from then on (see
            `devicemap.captured`): short rows train faster where the host is the slower one. None: on GPUs, where the
            plan has room for them. What cannot be recorded runs without, and that is said. Like `micro_batches`, the
            same losses and gradients but for rounding and dropout's masks, as rows are padded to a few lengths.
        minutes: save a checkpoint whenever so many have passed, besides those of `args.save_steps`.
        watch: shows progress; by default one that prints a line for each logged step.
        callbacks: more of the Trainer's callbacks.

    Raises:
        TrainingStoppedError: the loss is no number or 0, every step is skipped, or a batch has no label
            (`NoLabelsError`, which is a ValueError too).
        ValueError: the plan is for another model, adapter or batch; nothing is trainable, there are no rows, or no
            number in the adapter; a setting that a run which is taken up again cannot honour.
        RuntimeError: adapters misplaced (see `check_adapter`), or one of several processes.
        OSError: errno EBUSY, the same run is trained by another process; ENOSPC, no room for a checkpoint.
        torch.OutOfMemoryError: of a GPU or of the host; says which, what was predicted and measured, and the nearest
            plan that fits.
    """
    refuse_many_processes()
    bring_prefix_home(model)
    check_adapter(model)
    if not count_parameters(model)[0]:
        raise ValueError(
            "No parameter of this model is trained: its adapter was loaded for use. load_adapter(..., trainable=True) "
            "loads one to train on with."
        )
    if plan is not None:
        refuse_plan(plan, model, args.per_device_train_batch_size)
        for change in plan.apply(model):
            print(f"[NOTE] the plan had not been applied: {change}")
        bring_prefix_home(model)
        micro_batches, in_flight, loss_chunk = plan.micro_batches, plan.setting.in_flight, plan.setting.loss_chunk
    refuse_settings(args)
    refuse_rows(dataset, "to train on")
    if eval_dataset is not None:
        refuse_rows(eval_dataset, "for evaluation")
    if name := not_a_number(model):
        raise ValueError(f"{name} holds NaN or infinity: load the base again, then attach or load the adapter")
    folder = start_run(model, dataset, args)
    with alone(folder, wait=False, doing="training in"):
        checkpoint = last_complete(folder)
        if checkpoint is not None:
            state = read_state(checkpoint)
            if state["global_step"] >= state["max_steps"]:
                print(
                    f"{folder.name} is finished: step {state['global_step']} of {state['max_steps']}, adapter read back"
                )
                fill_adapter(model, load_file(checkpoint / "adapter_model.safetensors"), checkpoint.name)
                if watch is not None:
                    watch.read_back(state)
                return logged_losses(state["log_history"])
            print(f"{folder.name} goes on from step {state['global_step']} of {state['max_steps']}")
        elif origin_of(model).starts_from.startswith("loaded") or any(
            weight.any() for name, weight in adapter_weights(model).items() if "lora_B" in name
        ):
            print(
                "this adapter is not fresh: the new run starts from what it has learnt (attach_lora makes a fresh one)"
            )
        watch = watch or Watch()
        captured = captured_for(model, cuda_graphs, plan)
        trainer = GLMTrainer(
            model,
            args,
            micro_batches=micro_batches,
            in_flight=in_flight,
            forward={} if loss_chunk is None else {"loss_chunk": loss_chunk},
            folder=folder,
            captured=captured,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            data_collator=collator,
            callbacks=[watch, EveryMinutes(minutes), *callbacks],
        )
        # The Trainer prints each log as a raw dict when its progress bar is off.
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.check_weights()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            message = explain_out_of_memory(trainer, str(error))
            let_go(error)
            raise torch.OutOfMemoryError(message) from None
        except KeyboardInterrupt as error:
            let_go(error)
            good = last_complete(folder, say=lambda _: None)
            where = f"go on from {good.name}" if good else "start again"
            said = f"stopped at step {trainer.state.global_step}; the same call will {where}"
            print(said)  # and below the traceback, where a reader of the notebook looks
            raise KeyboardInterrupt(said) from None
        finally:
            if captured is not None:
                captured.forget()
        return logged_losses(trainer.state.log_history)


def captured_for(model: PeftModel, cuda_graphs: bool | None, plan: Plan | None) -> Captured | None:
    """CUDA graphs for this training: as wished, else where all blocks are on GPUs and the plan has room for them."""
    captured = Captured(model)
    if cuda_graphs is not None:
        return captured if cuda_graphs else None
    reason, _ = captured.look()
    if not reason and plan is not None and not plan.graphs_fit:
        reason = "the plan leaves no room for them"
    if reason and reason != ON_CPU:
        captured.say_without(reason)
    return None if reason else captured


def let_go(error: BaseException) -> None:
    """Free the tensors of the step that failed or was stopped: a second try would find no room.

    The frames of the traceback hold them, and a notebook keeps the traceback.
    """
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
