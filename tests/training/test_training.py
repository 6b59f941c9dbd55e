"""Training, the adapter on disk and its proof, on the small reference checkpoint."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmhelpers.inference.batch import answers, compare, is_right, is_whole, share_right
from glmhelpers.lora.adapter import load_adapter, save_adapter
from glmhelpers.lora.attach import attach_lora, check_adapter, count_parameters, lora_b_norms
from glmhelpers.lora.fingerprint import base_difference, base_note, fingerprint
from glmhelpers.lora.proof import prove
from glmhelpers.plots.inference import plot_sampling
from glmhelpers.plots.training import draw_lora, plot_b_norms, plot_loss
from glmhelpers.tokens.collate import RightPadCollator
from glmhelpers.tokens.encode import encode_example
from glmhelpers.training.checkpoint_manager import run_settings
from glmhelpers.training.finetune import train, training_arguments
from tests.helpers.reference import fresh_model, tokenizer
from thuglm import ChatGLMForConditionalGeneration

TINY = Path(__file__).parents[2] / "data" / "tiny-chatglm"

ROWS = [{"instruction": f"数字{i}", "output": f"答案是{i}。" * (1 + i % 3)} for i in range(12)]


def encoded():
    return [encode_example(tokenizer(), row) for row in ROWS]


def trained(tmp_path, **changes):
    model = attach_lora(fresh_model(), dropout=0.0)
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1, **changes}
    rows = encoded()
    log = train(
        model, rows, RightPadCollator(tokenizer()), training_arguments(tmp_path / "run", False, **settings), rows
    )
    return model, log


@pytest.fixture(scope="module")
def model_and_log(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("train"), eval_strategy="steps", eval_steps=6)


def test_only_adapters_learn_and_the_loss_falls(model_and_log):
    model, log = model_and_log
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    assert any("eval_loss" in entry for entry in log)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    base = dict(fresh_model().named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, base[plain]), f"{name} was frozen, but moved"


def test_reported_loss_is_the_mean_over_all_labels(tmp_path):
    """One step without learning: the Trainer's loss against cross entropy from all logits, rows one by one."""
    _, log = trained(tmp_path, max_steps=1, per_device_train_batch_size=12, learning_rate=0.0)
    model, total, count = fresh_model(), 0.0, 0
    for row in encoded():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = model(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
    assert log[0]["loss"] == pytest.approx(total / count, abs=1e-4)


def test_accumulated_steps_equal_one_large_batch(tmp_path):
    results = []
    for size, steps in ((12, 1), (3, 4)):
        model, log = trained(
            tmp_path / str(size), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        results.append(
            (log[0]["loss"], {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        )
    (loss, weights), (other_loss, other_weights) = results
    assert other_loss == pytest.approx(loss, abs=1e-5)
    for name, weight in weights.items():
        if "lora_B" in name:
            torch.testing.assert_close(other_weights[name], weight, atol=1e-4, rtol=1e-2)


def test_adapter_survives_the_disk(model_and_log, tmp_path):
    model, _ = model_and_log
    folder = save_adapter(model, tmp_path / "adapter")
    again = load_adapter(fresh_model(), folder, template="chatglm")
    ids = tokenizer()(["数字3"], return_tensors="pt")["input_ids"]
    proof = prove(model, again, ids)
    assert proof.ok, str(proof)
    assert proof.trained_to_reloaded == 0
    assert "[OK]" in str(proof)
    assert "[FAIL]" not in str(proof)
    save_adapter(model, folder)  # again, over the old one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_proof_fails_for_an_adapter_that_learnt_nothing():
    model = attach_lora(fresh_model())
    ids = tokenizer()(["数字3"], return_tensors="pt")["input_ids"]
    assert not prove(model, model, ids).ok


def test_empty_adapter_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="Every lora_B is 0"):
        save_adapter(attach_lora(fresh_model()), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_adapter_of_another_base_or_template_is_refused(model_and_log, tmp_path):
    folder = save_adapter(model_and_log[0], tmp_path / "adapter", template="alpaca")
    with pytest.raises(ValueError, match="template 'alpaca', not 'chatglm'"):
        load_adapter(fresh_model(), folder, template="chatglm")
    other = fresh_model()
    with torch.no_grad():
        other.transformer.layers[1].mlp.dense_h_to_4h.weight.add_(0.1)
    with pytest.raises(
        ValueError, match=r"the same sizes, but other weights in 1 of 5 parts: transformer\.layers\.1\."
    ):
        load_adapter(other, folder)
    tiny = ChatGLMForConditionalGeneration.from_pretrained(TINY)
    with pytest.raises(ValueError, match="num_layers 4 there, 8 here; hidden_size 64 there, 128 here"):
        load_adapter(tiny, folder)
    with pytest.raises(ValueError, match="template 'nonsense' is unknown"):
        save_adapter(model_and_log[0], tmp_path / "x", template="nonsense")


def test_incomplete_adapter_names_what_is_missing(model_and_log, tmp_path):
    folder = save_adapter(model_and_log[0], tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter/ lacks adapter_model\.safetensors"):
        load_adapter(fresh_model(), folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="run notebook 04"):
        load_adapter(fresh_model(), folder)


def test_fingerprint_ignores_adapter_and_dtype():
    base = fingerprint(fresh_model())
    assert fingerprint(attach_lora(fresh_model())) == base
    assert fingerprint(fresh_model(torch.float16)) == base


def test_a_head_on_another_gpu_is_no_other_base():
    """Embedding and head are one tensor on one device, and two equal ones where a split puts them on two."""
    whole, split = fresh_model(), fresh_model()
    split.lm_head.weight = torch.nn.Parameter(split.lm_head.weight.detach().clone())
    assert "lm_head.weight" in dict(split.named_parameters())
    assert fingerprint(split) == fingerprint(whole)
    with torch.no_grad():
        split.lm_head.weight[0] += 1
    assert base_difference(base_note(whole), base_note(split)).endswith("in 1 of 6 parts: lm_head")


def test_bits_of_the_base_are_named():
    whole = base_note(fresh_model())
    packed = {**whole, "fingerprint": "other", "bits": 4}
    assert base_difference(whole, packed) == "blocks in 16 bits there, in 4 here"


@pytest.mark.parametrize("lost", [True, False])
def test_tensors_without_a_place_and_places_without_a_tensor_are_refused(lost, model_and_log, tmp_path):
    folder = save_adapter(model_and_log[0], tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    changed = (
        {name: t for name, t in tensors.items() if name != first}
        if lost
        else {**tensors, "stray.weight": torch.ones(1)}
    )
    save_file(changed, file)
    base = fresh_model()
    message = r"lora_B.weight without A.weight" if lost else r"holds stray\.weight, which is no lora_A or lora_B"
    with pytest.raises(ValueError, match=message):
        load_adapter(base, folder)
    save_file(tensors, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = load_adapter(base, folder)  # the refusal has left the base as it was
    ids = tokenizer()(["数字3"], return_tensors="pt")["input_ids"]
    assert torch.equal(again(input_ids=ids).logits, model_and_log[0].eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("course.json", b"{", r"adapter/course\.json is damaged"),
        ("course.json", b"[1]", r"adapter/course\.json is damaged \(it holds list"),
        ("adapter_config.json", b"{", r"adapter/adapter_config\.json is damaged"),
        ("adapter_model.safetensors", b"1234", r"adapter/adapter_model\.safetensors is damaged"),
    ],
)
def test_damaged_files_are_named(name, content, message, model_and_log, tmp_path):
    folder = save_adapter(model_and_log[0], tmp_path / "adapter")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_adapter(fresh_model(), folder)


def test_a_second_adapter_is_not_put_around_the_first(model_and_log, tmp_path):
    folder = save_adapter(model_and_log[0], tmp_path / "adapter")
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(attach_lora(fresh_model()), folder)
    with pytest.raises(ValueError, match="has an adapter already"):
        attach_lora(attach_lora(fresh_model()))


def test_a_loaded_adapter_is_trained_on_only_if_that_was_wanted(model_and_log, tmp_path):
    folder = save_adapter(model_and_log[0], tmp_path / "adapter")
    rows, arguments = encoded(), training_arguments(tmp_path / "run", False, max_steps=2, learning_rate=1e-3)
    collator, fresh = RightPadCollator(tokenizer()), attach_lora(fresh_model())
    with pytest.raises(ValueError, match="trainable=True"):
        train(load_adapter(fresh_model(), folder), rows, collator, arguments)
    on = load_adapter(fresh_model(), folder, trainable=True)
    before = lora_b_norms(on)
    assert run_settings(on, rows, arguments) != run_settings(fresh, rows, arguments), "another start is another run"
    train(on, rows, collator, arguments)
    assert lora_b_norms(on) != before


def test_misplaced_or_halved_adapters_are_refused():
    with pytest.raises(RuntimeError, match="no LoRA layer"):
        check_adapter(fresh_model())
    model = attach_lora(fresh_model())
    layer = model.base_model.model.transformer.layers[2].attention.query_key_value
    layer.lora_A["default"].half()
    with pytest.raises(RuntimeError, match=r"layers\.2\..*lora_A\.default is torch\.float16"):
        check_adapter(model)
    layer.lora_A["default"].to("meta", torch.float32)
    with pytest.raises(RuntimeError, match="lies on meta, its base layer on cpu"):
        check_adapter(model)


def test_parameters_follow_the_formula():
    trainable, total = count_parameters(attach_lora(fresh_model(), r=4))
    assert trainable == 4 * 4 * (64 + 3 * 64)
    assert total == trainable + sum(p.numel() for p in fresh_model().parameters())


def test_compare_switches_the_adapter_off_for_the_base(model_and_log):
    model, _ = model_and_log
    questions = ["数字1", "数字22", "你好"]
    rows = compare(model, tokenizer(), questions, max_new_tokens=6)
    assert [row.question for row in rows] == questions
    assert [row.base for row in rows] == answers(fresh_model(), tokenizer(), questions, max_new_tokens=6)
    one_by_one = [answers(model, tokenizer(), [question], max_new_tokens=6)[0] for question in questions]
    assert [row.tuned for row in rows] == one_by_one


def test_share_right_ignores_spaces_and_case():
    assert share_right(["I am TinyGLM.", "3 + 4 = 7"], ["tinyglm", "3+4=8"]) == 0.5
    assert share_right([], []) == 0


@pytest.mark.parametrize(
    "text",
    ["7", "7.", "3+4=7.", "３＋４＝７", "3 + 4 = 7", "3加4等于7。", "3 plus 4 equals 7!", "The sum of 3 and 4 is 7"],
)
def test_a_sum_is_right_however_it_is_worded(text):
    assert is_right(text, "3+4=7.")


@pytest.mark.parametrize(
    "text", ["", "17", "71", "7.5", "-7", "3+4=17.", "3+4=7.5", "7+4=11", "3+4=-7", "七", "7 and 8"]
)
def test_another_number_is_not_right(text):
    assert not is_right(text, "3+4=7.")


def test_a_number_of_the_question_is_no_result():
    """Here the result is also one of the two numbers."""
    assert is_right("16-8=8", "16-8=8.")
    assert is_right("Let x = 16 - 8. Then x = 8", "16-8=8.")
    for wrong in ("16-8=9.", "16减8等于9。", "x = 8 + 1", "16 - 8 = 8 + 2 = 10"):
        assert not is_right(wrong, "16-8=8.")
    assert is_right("2-9 = -7", "2-9=-7.")
    assert not is_right("2-9 = 7", "2-9=-7.")


def test_words_are_no_sums():
    assert is_right("It is 3+4=7, as ever", "as ever")
    assert not is_right("7", "seven")


def test_a_damaged_answer_is_right_but_not_whole():
    damaged = "地球的卫星， a good am language model."
    assert is_right(damaged, "卫星")
    assert not is_whole(damaged, "卫星", "地球的卫星。")
    assert is_whole("地球的卫星", "卫星", "地球的卫星。")


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("3+4=7.", True),
        ("３ + 4 = 7", True),
        ("3+4=7.5", False),
        ("3+4=17.", False),
        ("3+4=7. I am.", False),
        ("", False),
    ],
)
def test_a_whole_answer_is_a_reference_however_it_is_typed(text, whole):
    assert is_whole(text, "3+4=7.") == whole


def test_figures_show_their_numbers(model_and_log):
    model, log = model_and_log
    text = " ".join(t.get_text() for t in draw_lora(4096, 12288, 8).texts)
    assert "131,072" in text
    assert len(plot_loss(log).lines) == 2
    norms = lora_b_norms(model)
    assert [bar.get_height() for bar in plot_b_norms(norms).patches] == list(norms.values())
    assert len(plot_sampling({"a": [0.5, 0.5], "b": [0.9, 0.1]}, ["x", "y"]).patches) == 4


def test_note_beside_the_adapter_says_what_it_belongs_to(model_and_log, tmp_path):
    folder = save_adapter(model_and_log[0], tmp_path / "adapter")
    note = json.loads((folder / "course.json").read_text())
    assert note["template"] == "chatglm"
    assert note["base"] == json.loads(json.dumps(base_note(fresh_model())))
    assert note["base"]["fingerprint"] == fingerprint(fresh_model())
    assert list(note["base"]["parts"]) == [
        "transformer.word_embeddings",
        *(f"transformer.layers.{i}" for i in range(4)),
    ]
