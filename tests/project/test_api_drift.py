"""Every name, keyword and hook of transformers, peft, accelerate and huggingface_hub that we use is there.

A library that renames a hook does not fail: it just never calls ours again. These tests fail instead, on the oldest
and on the newest supported versions.
"""

import ast
import importlib
import inspect
from pathlib import Path

import nbformat
import peft
import pytest
import transformers

from glmhelpers.training import guards, progress, trainer, training_arguments
from thuglm import modeling_chatglm, tokenization_chatglm

PROJECT = Path(__file__).resolve().parents[2]
LIBRARIES = ("transformers", "peft", "accelerate", "huggingface_hub")


def sources():
    """Name and syntax tree of every module and of every notebook's code."""
    for folder in ("thuglm", "glmhelpers", "scripts", "benchmarks"):
        for path in sorted((PROJECT / folder).rglob("*.py")):
            yield path.relative_to(PROJECT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((PROJECT / "notebooks").rglob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        code = [line for cell in cells if cell.cell_type == "code" for line in cell.source.splitlines()]
        yield path.name, ast.parse("\n".join(line for line in code if not line.lstrip().startswith(("%", "!"))))


def imported_names():
    """(file, module, name, name used there) of everything imported from the libraries."""
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
                for alias in node.names:
                    yield file, node.module, alias.name, alias.asname or alias.name


def keyword_calls():
    """(file, line, module, dotted name, keyword) of every call of an imported name, methods of it included."""
    names = {(file, used): (module, name) for file, module, name, used in imported_names()}
    for file, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            first, _, rest = ast.unparse(node.func).partition(".")
            if (file, first) in names and rest.count(".") == 0:
                module, name = names[file, first]
                for keyword in node.keywords:
                    if keyword.arg:
                        yield file, node.lineno, module, f"{name}.{rest}".rstrip("."), keyword.arg


def accepts(call, keyword):
    parameters = inspect.signature(call).parameters
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_something_is_collected():
    assert len(list(imported_names())) > 20
    assert len(list(keyword_calls())) > 5


def test_every_imported_name_exists():
    missing = set()
    for file, module, name, _ in imported_names():
        found = importlib.import_module(module)
        if not hasattr(found, name) and importlib.util.find_spec(f"{module}.{name}") is None:
            missing.add(f"{file}: {module}.{name}")
    assert missing == set()


def test_every_keyword_is_accepted():
    refused = set()
    for file, line, module, dotted, keyword in keyword_calls():
        call = importlib.import_module(module)
        for part in dotted.split("."):
            call = getattr(call, part)
        if not accepts(call, keyword):
            refused.add(f"{file}:{line}: {dotted}({keyword}=)")
    assert refused == set()


# Hooks: methods that a library calls by name, because we inherit from its class.
HOOKS = {
    modeling_chatglm.ChatGLMForConditionalGeneration: (
        transformers.GenerationMixin,
        [
            "_prepare_position_ids_for_generation",
            "_expand_inputs_for_generation",
            "_update_finished_beams",
            "_check_early_stop_heuristic",
            "_prepare_cache_for_generation",
            "prepare_inputs_for_generation",
        ],
    ),
    modeling_chatglm.ChatGLMPreTrainedModel: (
        transformers.PreTrainedModel,
        ["_can_set_attn_implementation", "_init_weights", "_load_pretrained_model", "from_pretrained"],
    ),
    tokenization_chatglm.ChatGLMTokenizer: (
        transformers.PreTrainedTokenizer,
        [
            "_tokenize",
            "_convert_token_to_id",
            "_convert_id_to_token",
            "_decode",
            "convert_tokens_to_string",
            "build_inputs_with_special_tokens",
            "get_special_tokens_mask",
            "truncate_sequences",
        ],
    ),
    trainer.GLMTrainer: (
        transformers.Trainer,
        [
            "training_step",
            "evaluation_loop",
            "_get_num_items_in_batch",
            "_move_model_to_device",
            "_get_train_sampler",
            "_get_output_dir",
            "_save_checkpoint",
            "_save",
            "_load_from_checkpoint",
            "_save_rng_state",
            "_load_rng_state",
        ],
    ),
    progress.Watch: (transformers.TrainerCallback, ["on_train_begin", "on_log", "on_train_end"]),
    progress.EveryMinutes: (transformers.TrainerCallback, ["on_train_begin", "on_step_end", "on_save"]),
    guards.Guard: (transformers.TrainerCallback, ["on_pre_optimizer_step", "on_optimizer_step"]),
}
HOOK_CASES = [(ours, base, name) for ours, (base, names) in HOOKS.items() for name in names]


@pytest.mark.parametrize(("ours", "base", "name"), HOOK_CASES, ids=lambda case: getattr(case, "__name__", case))
def test_hook_still_exists_and_takes_what_the_library_passes(ours, base, name):
    theirs = getattr(base, name)
    assert getattr(ours, name) is not theirs, f"{ours.__name__} no longer overrides {name}: take it out of this list"
    mine = inspect.signature(getattr(ours, name)).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in mine):
        return
    known = {p.name for p in mine}
    required = {
        p.name
        for p in inspect.signature(theirs).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    assert required <= known | {"self"}, f"{base.__name__}.{name} passes {sorted(required - known)}"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (transformers.PreTrainedModel, "supports_gradient_checkpointing"),
        (transformers.PreTrainedModel, "_no_split_modules"),
        (transformers.PreTrainedModel, "_skip_keys_device_placement"),
        (transformers.PreTrainedModel, "_supports_sdpa"),
        (transformers.PreTrainedModel, "_keys_to_ignore_on_load_unexpected"),
        (transformers.PreTrainedModel, "_tied_weights_keys"),
        (transformers.PreTrainedModel, "gradient_checkpointing_enable"),
        (transformers.DynamicCache, "update"),
        (transformers.DynamicCache, "get_seq_length"),
        (transformers.DynamicCache, "get_mask_sizes"),
        (transformers.Trainer, "remove_callback"),
        (peft.PeftModel, "disable_adapter"),
        (peft.PeftModel, "get_base_model"),
        (peft.PeftModel, "save_pretrained"),
        (peft.LoraModel, "unload"),
        (peft.LoraConfig, "from_pretrained"),
    ],
    ids=lambda case: getattr(case, "__name__", case),
)
def test_attribute_that_we_set_or_call_exists(owner, name):
    assert hasattr(owner, name)


def test_training_arguments_take_our_settings(tmp_path):
    # Trainer reads these by name; an unknown one is a TypeError here.
    arguments = training_arguments(tmp_path, on_gpu=False)
    assert isinstance(arguments, transformers.TrainingArguments)


def test_generate_still_asks_the_model_for_its_masks():
    # Not inherited: generate looks the name up on the model, and uses a causal mask where it finds none.
    assert 'getattr(self, "create_masks_for_generate"' in inspect.getsource(transformers.generation.utils)


def test_lora_config_takes_our_keywords():
    wanted = ["r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "bias"]
    assert [name for name in wanted if not accepts(peft.LoraConfig, name)] == []
