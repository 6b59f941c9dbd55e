"""Reading an adapter's files: what is allowed is listed, and the base must be theirs, before a model is touched.

    adapter_config.json --- every setting: free | plain value | refused by name -+
    adapter_model.safetensors --- pairs of lora_A and lora_B, finite numbers ----+--> AdapterFiles: load, merge, pack
                                  or one prefix (P-tuning v2), not to be merged  |
    course.json (ours; may be missing) --- template, base -----------------------+

LoRA adds (alpha / r) B A to a frozen matrix, and that is all this project adds. Many of peft's settings mean something
else: PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base before they train, DoRA scales it, aLoRA works on part of a
text. Such an adapter on the plain base gives another model without a word. So a setting that nobody here has looked at
is refused unless it is off (None, False, empty).
"""

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PrefixTuningConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from glmhelpers.cost_model.sizes import LORA_TARGETS
from glmhelpers.lora.attach import PREFIX, prefix_config
from glmhelpers.lora.fingerprint import base_difference
from glmhelpers.utils import files
from glmhelpers.utils.files import alone, current, finish
from glmhelpers.utils.folders import expanded

KEY = "adapter"
NOTE = "course.json"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG, TENSORS, NOTE)

FREE = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "megatron_core", "peft_type"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type", "ensure_weight_tying"),
    "merge_weights",  # peft 0.2
}
"""Settings that change nothing of what is added to the matrices for which there are tensors."""

CHECKED = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "use_rslora", "init_lora_weights", "bias"),
}
"""Settings with a rule of their own, see `check_config`."""

OF_A_PREFIX = {
    *("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules"),
    *("prefix_projection", "encoder_hidden_size", "init_weights"),
}
"""Settings of peft's PREFIX_TUNING; the base says the sizes, and the tensor is compared with it."""

HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` that leave the base as it is."""

NAME = re.compile(r"base_model\.model\.(?P<layer>[\w.]+)\.lora_(?P<side>[AB])\.weight")
LAYER = re.compile(rf"transformer\.layers\.\d+\.\w+\.({'|'.join(LORA_TARGETS)})")
"""The layers on which an adapter is handled: not the head, which may be one tensor with the embedding."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

LARGEST = 1e9
"""A larger rank or alpha is nonsense, and would not fit into memory or float32."""

PLAIN_NAME = re.compile(r"\^?[\w.]+")
"""Names of layers; a longer expression could take for ever to match."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as it lies on the disk, read and found sound.

    Attributes:
        name: of its folder, for messages.
        config: of adapter_config.json.
        tensors: name in the file -> matrix.
        note: of course.json; None if there is none.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    note: dict[str, Any] | None

    @property
    def is_prefix(self) -> bool:
        """Whether it is a learnt prefix (P-tuning v2), and no LoRA."""
        return self.config.get("peft_type") == "PREFIX_TUNING"

    def refuse_prefix(self) -> None:
        """Raise a ValueError if it is a learnt prefix: there is no matrix to which it could be added."""
        if self.is_prefix:
            raise ValueError(
                f"{self.name} is a learnt prefix (P-tuning v2): it is no part of the weights, so it cannot be merged. "
                "Use it with load_adapter, or pack it with export_adapter."
            )

    def peft_config(self, trainable: bool) -> LoraConfig | PrefixTuningConfig:
        """The settings for peft.

        Raises:
            ValueError: a prefix whose network is not in the files shall be trained on.
        """
        if not self.is_prefix:
            return self.lora_config(trainable)
        if trainable and self.config.get("prefix_projection"):
            raise ValueError(
                f"{self.name} holds what its prefix_projection made, not the network itself, as peft saves it: it "
                "cannot be trained on. Go on from a checkpoint of its training, or train one without projection."
            )
        return prefix_config(len(self.tensors[PREFIX]), inference_mode=not trainable)

    def layers(self) -> list[str]:
        """Names of the layers with an adapter, as in the base."""
        return sorted({match["layer"] for name in self.tensors if (match := NAME.fullmatch(name))})

    def scaling(self, layer: str) -> float:
        """By what B A is multiplied in a layer: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        patterns = self.config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), layer), self.config["lora_alpha"])
        rank = len(self.tensors[f"base_model.model.{layer}.lora_A.weight"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def lora_config(self, trainable: bool) -> LoraConfig:
        """The settings for peft. Targets given as an expression become the names of the layers that have tensors."""
        kept = {key: self.config[key] for key in CHECKED - {"bias", "init_lora_weights"} if self.config.get(key)}
        if not isinstance(kept["target_modules"], list) or self.config.get("exclude_modules"):
            kept = {key: value for key, value in kept.items() if not key.startswith("layers_")}
            kept["target_modules"] = self.layers()
        return LoraConfig(**kept, task_type="CAUSAL_LM", inference_mode=not trainable)

    def check_base(self, here: Mapping[str, Any], modules: Iterable[str]) -> None:
        """Refuse a base that is not the one of the note, or has other layers; say so where there is no note.

        Args:
            here: `base_note` of the base that the adapter shall go on.
            modules: names of that base's modules.

        Raises:
            ValueError: it was trained on another base, names the difference; or see `check_layers`.
        """
        if self.note is None:
            print(f"{self.name}/ has no {NOTE}: whether it belongs to this base and to which template was not checked")
        elif difference := base_difference(self.note["base"], here):
            raise ValueError(
                f"The adapter in {self.name}/ was trained on another base: {difference}. Load the base it was trained "
                "on, or train again."
            )
        if not self.is_prefix:
            self.check_layers(modules)
        elif (found := self.tensors[PREFIX].shape[1]) != (
            fits := 2 * here["sizes"]["num_layers"] * here["sizes"]["hidden_size"]
        ):
            raise ValueError(
                f"the prefix in {self.name} has {found:,} numbers for each of its keys, this base takes {fits:,} (keys "
                "and values of all blocks): it belongs to another model"
            )

    def check_layers(self, modules: Iterable[str]) -> None:
        """Refuse unless there are tensors for just the layers that the settings choose among a base's modules.

        Settings that choose by an expression are not asked: it could take for ever to match.

        Raises:
            ValueError: names the first layer that has no tensors, or tensors that have no layer.
        """
        layers, modules, config = set(self.layers()), set(modules), self.lora_config(trainable=False)
        chosen = {name for name in modules if check_target_module_exists(config, name)}
        if foreign := sorted(name for name in layers if name not in modules or not LAYER.fullmatch(name)):
            raise ValueError(
                f"the adapter {self.name} changes {foreign[0]}, which is no linear layer in a block of this base: it "
                "belongs to another model, or is not handled here; load it with peft itself"
            )
        if lacking := sorted(chosen - layers):
            raise ValueError(
                f"{self.name} lacks {2 * len(lacking)} of the adapter's {2 * len(chosen)} tensors, the first is "
                f"base_model.model.{lacking[0]}.lora_A.weight: it was not written whole, or its settings were changed"
            )
        if extra := sorted(layers - chosen):
            raise ValueError(
                f"{self.name} holds tensors for {extra[0]} (and {len(extra) - 1} more layers), which its "
                "target_modules or layers_to_transform leave out: its files do not belong together"
            )


def read_adapter(folder: str | Path) -> AdapterFiles:
    """Read and check the files of an adapter; nothing is put on a model.

    Raises:
        FileNotFoundError: there is no adapter in `folder`.
        ValueError: a file is damaged, a setting is not one that this project handles, or the tensors are not those of
            a LoRA adapter; names the file, the setting or the tensor.
    """
    folder = expanded(folder).absolute()
    with alone(folder / KEY):
        with suppress(OSError):  # a folder that cannot be written: `current` knows where the files are
            finish(folder, KEY)
        if not current(folder, KEY, TENSORS).is_file() and (folder / "adapter_model.bin").is_file():
            raise FileNotFoundError(
                f"{folder.name}/ has its tensors in adapter_model.bin, as peft of 2023 wrote them: import_2023(base, "
                f"{str(folder / 'adapter_model.bin')!r}) reads that file, save_adapter writes it in today's form."
            )
        if missing := [name for name in (CONFIG, TENSORS) if not current(folder, KEY, name).is_file()]:
            raise FileNotFoundError(f"{folder.name}/ lacks {', '.join(missing)}: run notebook 04, which saves one.")
        config = read_json(folder, CONFIG)
        prefix = config.get("peft_type") == "PREFIX_TUNING"
        (check_prefix_config if prefix else check_config)(config, f"{folder.name}/{CONFIG}")
        try:
            tensors = load_file(current(folder, KEY, TENSORS))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ValueError(damaged(folder / TENSORS, error)) from error
        note = read_json(folder, NOTE) if current(folder, KEY, NOTE).is_file() else None
    if note is not None:
        base = note.get("base")
        if not (isinstance(base, dict) and isinstance(note.get("template"), str)):
            raise ValueError(damaged(folder / NOTE, "it lacks the template or the base"))
        if not isinstance(base.get("fingerprint"), str):
            raise ValueError(damaged(folder / NOTE, "it lacks the base's fingerprint"))
        if not all(isinstance(base.get(key) or {}, dict) for key in ("sizes", "parts")):
            raise ValueError(damaged(folder / NOTE, "the base's sizes or parts are not listed by name"))
    (check_prefix if prefix else check_tensors)(tensors, config, f"{folder.name}/{TENSORS}")
    return AdapterFiles(folder.name, config, tensors, note)


def damaged(path: Path, reason: object) -> str:
    """The sentence about a file that cannot be read."""
    return f"{path.parent.name}/{path.name} is damaged ({reason}): save the adapter again, or copy it again."


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Settings by name from one of an adapter's files; a ValueError if it does not hold such."""
    try:
        found = files.read_json(current(folder, KEY, name))
    except ValueError as error:
        raise ValueError(damaged(folder / name, error)) from error
    if not isinstance(found, dict):
        raise ValueError(damaged(folder / name, f"it holds {type(found).__name__}, not settings by name"))
    return found


def is_number(value: Any, low: float = 0.0) -> bool:
    """Whether a setting is a number above `low` and below LARGEST; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low < value < LARGEST


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse settings that are not plain LoRA's.

    Raises:
        ValueError: names `where` they stand, the setting, its value, and what to do.
    """

    def refuse(key: str, advice: str) -> None:
        raise ValueError(f"{where} says {key}={config.get(key)!r}: {advice}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "only LORA and PREFIX_TUNING are handled here; load it with peft itself")
    other = "this changes more than adding (alpha / r) B A, and is not handled here; load it with peft itself"
    for key, value in config.items():
        if key not in FREE | CHECKED and value not in (None, False, 0, "", [], {}):
            default = LoraConfig.__dataclass_fields__.get(key)
            if default is None or value != default.default:
                refuse(key, other)
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool | str | None) or start not in HARMLESS_STARTS:
        refuse(
            "init_lora_weights",
            "the base was changed before training, so that the adapter fits no plain base; where it was made, peft's "
            "save_pretrained with path_initial_model_for_weight_conversion makes plain LoRA of it",
        )
    if config.get("bias", "none") != "none":
        refuse("bias", "trained biases are not handled here; load it with peft itself")
    if not isinstance(config.get("r"), int) or not is_number(config["r"]):
        refuse("r", "the rank must be a whole number from 1 on")
    if not is_number(config.get("lora_alpha")):
        refuse("lora_alpha", "it must be a number above 0, and below a billion")
    if not is_number(config.get("lora_dropout", 0.0), -1e-9) or config.get("lora_dropout", 0.0) >= 1:
        refuse("lora_dropout", "it must be a number from 0 on and below 1")
    if not isinstance(config.get("use_rslora", False), bool):
        refuse("use_rslora", "it must be true or false")
    for key, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(_is_plain, patterns)):
            refuse(key, "it must map names of layers to numbers; expressions are not handled here")
        if not all(is_number(value) and (not whole or isinstance(value, int)) for value in patterns.values()):
            refuse(key, "its values must be numbers above 0, and below a billion" + (", and whole" if whole else ""))
    targets = config.get("target_modules")
    if not (isinstance(targets, str) or (isinstance(targets, list) and targets and all(map(_is_plain, targets)))):
        refuse("target_modules", "it must be a list of names of layers")
    chosen, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    numbers = [chosen] if not isinstance(chosen, list) else chosen
    if chosen is not None and not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        refuse("layers_to_transform", "it must be a list of whole numbers")
    if pattern is not None and not all(map(_is_plain, pattern if isinstance(pattern, list) else [pattern])):
        refuse("layers_pattern", "it must be a name")


def check_prefix_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse settings that are not those of a plain learnt prefix.

    Raises:
        ValueError: names `where` they stand, the setting, its value, and what to do.
    """
    length, parts = config.get("num_virtual_tokens"), config.get("num_transformer_submodules")
    wrong = [key for key in config if key not in FREE | OF_A_PREFIX and config[key] not in (None, False, 0, "", [], {})]
    if not isinstance(length, int) or not is_number(length):
        wrong = ["num_virtual_tokens", *wrong]
    if parts not in (None, 1):
        wrong = ["num_transformer_submodules", *wrong]
    if wrong:
        raise ValueError(
            f"{where} says {wrong[0]}={config.get(wrong[0])!r}: that is no plain prefix of a decoder, and is not "
            "handled here; load it with peft itself"
        )


def check_prefix(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> None:
    """Refuse tensors that are not one matrix of finite numbers, with a row for each key.

    Raises:
        ValueError: names `where` it is, and what was found.
    """
    if set(tensors) != {PREFIX}:
        raise ValueError(
            f"{where} holds {', '.join(sorted(tensors)[:3]) or 'no tensor'}; a learnt prefix is one tensor, {PREFIX}: "
            "save it again with save_adapter"
        )
    prefix, rows = tensors[PREFIX], config["num_virtual_tokens"]
    if prefix.dtype not in FLOATS or prefix.dim() != 2 or len(prefix) != rows:
        raise ValueError(
            f"{where} holds {PREFIX} as {prefix.dtype} {list(prefix.shape)}; a matrix of floating point numbers with "
            f"num_virtual_tokens={rows} rows is needed: these files do not belong together"
        )
    if not prefix.float().isfinite().all():
        raise ValueError(f"{where}: {PREFIX} holds NaN or infinity: its training diverged. Take an earlier one.")


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and PLAIN_NAME.fullmatch(name) is not None


def check_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> None:
    """Refuse tensors that are not pairs of finite lora_A and lora_B of the settings' ranks.

    Raises:
        ValueError: names `where` they are, and the tensor.
    """
    ranks = config.get("rank_pattern") or {}
    if not tensors:
        raise ValueError(
            f"{where} holds no tensor: the training saved nothing. Train again, and save with save_adapter."
        )
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{where} holds {name}, which is no lora_A or lora_B: it is no plain LoRA adapter")
        if tensor.dtype not in FLOATS or tensor.dim() != 2:
            text = f"{where} holds {name} as {tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{text}: it must be a matrix of 16, 32 or 64 bit floating point numbers")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{where}: {name} holds NaN or infinity: its training diverged. Take an earlier one.")
        stem, side = name[: -len("A.weight")], match["side"]
        if (other := f"{stem}{'B' if side == 'A' else 'A'}.weight") not in tensors:
            raise ValueError(f"{where} holds {name} without {other.rpartition('.lora_')[2]}: it was not written whole")
        rank = ranks.get(get_pattern_key(list(ranks), match["layer"]), config["r"])
        if (found := tensor.shape[0 if side == "A" else 1]) != rank:
            raise ValueError(
                f"{where}: {name} has rank {found}, {CONFIG} says {rank}: these files do not belong together"
            )
