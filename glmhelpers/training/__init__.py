"""Training: LoRA on a model that is split between GPUs, in one process.

finetune.py  -->  trainer.py  -->  pipeline.py                   checkpoint_manager.py, guards.py, progress.py
train(...)        a step of        micro-batches, all GPUs       what keeps a run alive, and shows it
                  the Trainer      at work at once
"""

from glmhelpers.devicemap.activation_checkpointing import checkpoint_only
from glmhelpers.training.calibration import measure_machine
from glmhelpers.training.checkpoint_manager import run_settings
from glmhelpers.training.finetune import train, training_arguments
from glmhelpers.training.guards import TrainingStoppedError, refuse_many_processes
from glmhelpers.training.measure import measured_peaks, parameter_bytes, predict_case
from glmhelpers.training.memory_plan import predict_training
from glmhelpers.training.pipeline import run_step
from glmhelpers.training.progress import Watch
from glmhelpers.training.step_recorder import StepRecorder, idle_shares
from glmhelpers.training.trainer import GLMTrainer

__all__ = [
    "GLMTrainer",
    "StepRecorder",
    "TrainingStoppedError",
    "Watch",
    "checkpoint_only",
    "idle_shares",
    "measure_machine",
    "measured_peaks",
    "parameter_bytes",
    "predict_case",
    "predict_training",
    "refuse_many_processes",
    "run_settings",
    "run_step",
    "train",
    "training_arguments",
]
