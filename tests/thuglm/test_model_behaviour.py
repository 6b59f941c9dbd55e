"""What a user of transformers expects of the model: padding, caches, errors, files, adapters, checkpointing."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, StaticCache, Trainer, TrainingArguments
from transformers.utils import find_labels

from glmhelpers.inference import Decoder
from glmhelpers.training import run_step
from tests.helpers.reference import CHECKPOINT, fresh_model, model, tokenizer
from tests.helpers.tiny_models import PROMPTS, lora, lora_gradients, random_model, right_padded, training_rows
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from thuglm.modeling_chatglm import CACHE_NAME

# Padding ---------------------------------------------------------------------------------------------------------------


def test_left_padded_batch_equals_rows_one_by_one():
    batch = tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    together = model()(**batch).logits
    for number, prompt in enumerate(PROMPTS):
        alone = model()(**tokenizer()([prompt], return_tensors="pt")).logits[0]
        torch.testing.assert_close(together[number, -alone.shape[0] :], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("with_mask", [True, False])
def test_right_padded_batch_equals_rows_one_by_one(with_mask):
    rows = training_rows()
    ids, mask, labels = right_padded(rows, multiple=8)
    together = model()(input_ids=ids, attention_mask=mask if with_mask else None, labels=labels)
    total, count = 0.0, 0
    for number, row in enumerate(rows):
        alone = model()(input_ids=torch.tensor([row]), labels=labels[number : number + 1, : len(row)])
        torch.testing.assert_close(together.logits[number, : len(row)], alone.logits[0], atol=1e-4, rtol=0)
        here = int((labels[number] != -100).sum())
        total, count = total + alone.loss.item() * here, count + here
    assert together.loss.item() == pytest.approx(total / count, abs=1e-5)


def test_padding_leaks_into_nothing():
    """Another id in the padding, another row beside it: the real positions do not move by a bit of a bit."""
    ids, mask, _ = right_padded(training_rows())
    other = ids.clone()
    other[mask == 0] = 7
    a, b = model()(input_ids=ids, attention_mask=mask).logits, model()(input_ids=other, attention_mask=mask).logits
    assert torch.equal(a[mask == 1], b[mask == 1])


def test_generate_in_a_batch_equals_one_by_one():
    batch = tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    together = model().generate(**batch, do_sample=False, max_new_tokens=12)[:, batch["input_ids"].shape[1] :]
    for number, prompt in enumerate(PROMPTS):
        one = tokenizer()([prompt], return_tensors="pt")
        alone = model().generate(**one, do_sample=False, max_new_tokens=12)[0, one["input_ids"].shape[1] :]
        assert together[number].tolist()[: len(alone)] == alone.tolist()


# Caches ----------------------------------------------------------------------------------------------------------------


def test_cache_equals_no_cache_and_static_cache():
    inputs = tokenizer()(PROMPTS[1:2], return_tensors="pt")
    settings = {"do_sample": False, "max_new_tokens": 16}
    with_cache = model().generate(**inputs, **settings)
    assert torch.equal(with_cache, model().generate(**inputs, use_cache=False, **settings))
    static = StaticCache(config=model().config, max_cache_len=inputs["input_ids"].shape[1] + 16)
    assert torch.equal(with_cache, model().generate(**inputs, **{CACHE_NAME: static}, **settings))


def test_forward_takes_the_cache_under_both_names_and_returns_it_under_the_one_of_transformers():
    prompt, step = torch.tensor([[5, 256, 2657, 2660]]), torch.tensor([[9]])
    positions = torch.tensor([[[2], [2]]])
    given = {}
    for name in ("past_key_values", "cache"):
        out = model()(input_ids=prompt, use_cache=True)
        assert CACHE_NAME in out
        given[name] = model()(input_ids=step, position_ids=positions, **{name: out[CACHE_NAME]}).logits
    assert torch.equal(*given.values())
    one, other = (model()(input_ids=prompt, use_cache=True)[CACHE_NAME] for _ in range(2))
    with pytest.raises(ValueError, match="two names of one argument"):
        model()(input_ids=step, position_ids=positions, past_key_values=one, cache=other)


def test_transformers_and_the_model_agree_on_the_name_of_the_cache():
    # generate drops a cache under a name that it does not know, and the next step would start without one.
    outputs, kept = model()(input_ids=torch.tensor([[5, 256, 2657, 2660]]), use_cache=True), {}
    kept = model()._update_model_kwargs_for_generation(outputs, kept)
    assert kept[CACHE_NAME] is outputs[CACHE_NAME]


def test_a_step_without_its_cache_is_told_apart_from_a_bad_prompt():
    with pytest.raises(ValueError, match=r"single token .* no cache"):
        model()(input_ids=torch.tensor([[9]]))


def test_several_new_tokens_after_a_cache_equal_the_full_forward():
    row = torch.tensor([training_rows()[1]])
    cut = row.tolist()[0].index(2660) + 1
    from thuglm.prefix_mask import make_position_ids

    positions = make_position_ids(row, model().config)
    first = model()(input_ids=row[:, :cut], use_cache=True)
    rest = model()(input_ids=row[:, cut:], position_ids=positions[..., cut:], past_key_values=first[CACHE_NAME])
    torch.testing.assert_close(rest.logits, model()(input_ids=row).logits[:, cut:], atol=1e-4, rtol=0)


def test_cached_step_without_positions_is_refused():
    out = model()(input_ids=torch.tensor([[5, 256, 2657, 2660]]), use_cache=True)
    with pytest.raises(ValueError, match=r"position_ids .* must be given"):
        model()(input_ids=torch.tensor([[9]]), past_key_values=out[CACHE_NAME])


def test_given_embeddings_equal_looked_up_ones():
    ids, mask, _ = right_padded(training_rows())
    embeds = model().get_input_embeddings()(ids)
    got = model()(input_ids=ids, attention_mask=mask, inputs_embeds=embeds).logits
    assert torch.equal(got, model()(input_ids=ids, attention_mask=mask).logits)


# Errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[5, 256, 2657, 2660], [5, 256, 223, 2657]], r"Row 1 .* no <sop> \(id 2660\)"),
        ([[5, 256, 2657, 2660], [5, 256, 223, 2660]], r"Row 1 .* neither \[gMASK\]"),
        ([[5, 3040, 2657, 2660]], r"Row 0 .* id 3040, the vocabulary has ids 0 to 3039"),
        ([[5, -1, 2657, 2660]], r"Row 0 .* id -1"),
    ],
)
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_bad_ids_name_the_row_and_the_remedy(rows, message, how):
    call = model() if how == "forward" else model().generate
    with pytest.raises(ValueError, match=message) as error:
        call(input_ids=torch.tensor(rows))
    assert "folder" in str(error.value) or "tokenizer(text)" in str(error.value)


def test_too_long_a_sequence_is_refused():
    net = random_model(max_sequence_length=16)
    with pytest.raises(ValueError, match=r"17 tokens.*max_sequence_length=16"):
        net(input_ids=torch.tensor([[5] * 15 + [2657, 2660]]))


def test_batch_without_labels_is_refused():
    ids, mask, labels = right_padded(training_rows())
    with pytest.raises(ValueError, match="No row of this batch has a label"):
        model()(input_ids=ids, attention_mask=mask, labels=torch.full_like(labels, -100))


@pytest.mark.parametrize("old", [{"vocab_size": 150528}, {"bos_token_id": 150004}])
def test_v1_0_configuration_is_refused(old):
    with pytest.raises(ValueError, match=r"v1\.0"):
        ChatGLMConfig(**old)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        ChatGLMConfig(hidden_size=60, num_attention_heads=10)
    with pytest.raises(ValueError, match="2-D positions"):
        ChatGLMConfig(position_encoding_2d=False)


def test_nan_logits_are_reported_by_chat():
    net = fresh_model()
    with torch.no_grad():
        net.transformer.final_layernorm.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        net.chat(tokenizer(), "你好", do_sample=False, max_new_tokens=3)
    with pytest.raises(FloatingPointError, match="NaN"):
        list(net.stream_chat(tokenizer(), "你好", max_new_tokens=3))


def test_leaving_stream_chat_early_stops_the_model():
    import threading

    before = threading.active_count()
    stream = model().stream_chat(tokenizer(), "你好", do_sample=False, max_new_tokens=400)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_end_ids_may_be_one_several_or_none():
    inputs = tokenizer()(PROMPTS[1:2], return_tensors="pt")
    length, settings = inputs["input_ids"].shape[1], {"max_new_tokens": 12}
    answer = model().generate(**inputs, do_sample=False, **settings)[0, length:].tolist()
    assert len(answer) > 4
    net = fresh_model()
    for ends, want in (([2661, answer[3]], answer[: answer.index(answer[3]) + 1]), (None, None)):
        net.config.eos_token_id = net.generation_config.eos_token_id = ends
        got = net.generate(**inputs, do_sample=False, **settings)[0, length:].tolist()
        assert len(got) == 12 if want is None else got == want
        assert Decoder(net).generate(inputs["input_ids"], **settings) == [got]
    assert ChatGLMConfig(eos_token_id=[5, 6], pad_token_id=None).ends == {5, 6}


# Files -----------------------------------------------------------------------------------------------------------------


def test_save_and_load_again(tmp_path):
    net = fresh_model()
    net.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in names
    ids = torch.tensor([training_rows()[0]])
    for cls in (ChatGLMForConditionalGeneration, AutoModel, AutoModelForCausalLM):
        again = cls.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert isinstance(again, ChatGLMForConditionalGeneration)
        assert again.lm_head.weight is again.transformer.word_embeddings.weight
        assert torch.equal(again(input_ids=ids).logits, net(input_ids=ids).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.num_layers, config.inner_hidden_size, config.max_sequence_length) == (4, 256, 2048)


def test_loading_says_nothing_of_missing_or_unexpected_weights():
    _, info = ChatGLMForConditionalGeneration.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not [key for key in info["unexpected_keys"] if "inv_freq" not in key]


def test_published_dtype_is_kept_unless_another_is_asked_for():
    net = ChatGLMForConditionalGeneration.from_pretrained(CHECKPOINT)
    assert {p.dtype for p in net.parameters()} == {torch.float16}
    assert {p.dtype for p in fresh_model().parameters()} == {torch.float32}


def test_every_parameter_of_a_new_model_is_initialised():
    net = random_model()
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert torch.equal(net.transformer.rotary_emb.inv_freq, model().transformer.rotary_emb.inv_freq)


# Placement -------------------------------------------------------------------------------------------------------------


def test_place_unties_only_a_head_that_goes_elsewhere():
    net = fresh_model()
    parts = [
        "transformer.word_embeddings",
        *(f"transformer.layers.{i}" for i in range(4)),
        "transformer.final_layernorm",
    ]
    net.place({**dict.fromkeys(parts, "cpu"), "lm_head": "cpu"})
    assert net.lm_head.weight is net.transformer.word_embeddings.weight
    net.place({**dict.fromkeys(parts, "cpu"), "lm_head": "meta"})
    assert net.lm_head.weight.device.type == "meta"
    assert net.transformer.word_embeddings.weight.device.type == "cpu"
    assert net.config.tie_word_embeddings is False
    with pytest.raises(KeyError, match=r"transformer\.layer\.0"):
        net.place({"transformer.layer.0": "cpu"})


# Training --------------------------------------------------------------------------------------------------------------


def test_adapter_finds_its_layers():
    net = lora(fresh_model())
    trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 4
    assert sum(p.numel() for p in trainable.values()) == 4 * 8 * (64 + 192)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("checkpointed", [(), (0, 2), (0, 1, 2, 3)])
def test_checkpointing_changes_no_gradient(dropout, checkpointed):
    ids, mask, labels = right_padded(training_rows())
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    net = lora(fresh_model(), dropout)
    loss, want = lora_gradients(net, **batch)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for number, block in enumerate(net.base_model.model.transformer.layers):
        block.gradient_checkpointing = number in checkpointed
    again, got = lora_gradients(net, **batch)
    assert again == loss
    for name, gradient in want.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(got[name], gradient, atol=0, rtol=0)


def test_chunked_training_loss_equals_the_loss_from_all_logits():
    ids, mask, labels = right_padded(training_rows())
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    net = lora(fresh_model())
    loss, got = lora_gradients(net, **batch, loss_chunk=3)
    logits = net.eval()(input_ids=ids, attention_mask=mask).logits
    net.zero_grad()
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 3040), labels[:, 1:].reshape(-1))
    plain.backward()
    assert loss == pytest.approx(plain.item(), abs=1e-5)
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_training_builds_no_logits_and_evaluation_only_if_wanted():
    ids, mask, labels = right_padded(training_rows())
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    net = fresh_model().requires_grad_(False)
    assert net.train()(**batch).logits is None
    assert net.eval()(**batch).logits.shape == (*ids.shape, 3040)
    assert net(**batch, return_logits=False).logits is None


def test_num_items_in_batch_makes_accumulation_exact():
    ids, mask, labels = right_padded(training_rows())
    whole = model()(input_ids=ids, attention_mask=mask, labels=labels).loss
    count = (labels[:, 1:] != -100).sum()
    parts = [
        model()(
            input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count
        ).loss
        for i in range(len(ids))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-6)


def test_target_rows_found_beforehand_change_nothing():
    ids, mask, labels = right_padded(training_rows())
    rows = (labels[:, 1:].reshape(-1) != -100).nonzero().squeeze(1)
    given = model()(input_ids=ids, attention_mask=mask, labels=labels, target_rows=rows).loss
    assert given.item() == model()(input_ids=ids, attention_mask=mask, labels=labels).loss.item()


def test_the_trainer_of_transformers_knows_the_loss_of_an_evaluation(tmp_path):
    assert find_labels(ChatGLMForConditionalGeneration) == ["labels"]
    rows = [
        {"input_ids": row, "labels": [-100 if i <= row.index(2660) else x for i, x in enumerate(row)]}
        for row in training_rows()
    ]
    args = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=1)
    loss = Trainer(fresh_model(), args, eval_dataset=rows).evaluate()["eval_loss"]
    alone = [model()(**{name: torch.tensor([ids]) for name, ids in row.items()}).loss.item() for row in rows]
    assert loss == pytest.approx(sum(alone) / len(alone), abs=1e-5)


def test_a_misspelt_keyword_is_refused_and_the_right_one_named():
    ids = torch.tensor([training_rows()[0]])
    with pytest.raises(TypeError, match=r"'loss_chnk'.*'loss_chunk'"):
        model()(ids, labels=ids, loss_chnk=3)
    with pytest.raises(TypeError, match=r"'output_attention'.*'output_attentions'"):
        model().transformer(ids, output_attention=True)
    with pytest.raises(TypeError, match="'loss_chnk'"):
        run_step(lora(fresh_model()), {"input_ids": ids, "labels": ids}, loss_chnk=3)
    # What the libraries hand to every model is no mistake.
    model()(ids, cache_position=torch.arange(ids.shape[1]), anything=None)


def test_return_dict_false_gives_a_tuple_in_the_same_order():
    ids = torch.tensor([training_rows()[0]])
    outputs = model()(ids, labels=ids)
    loss, logits, *_ = model()(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, outputs.loss)
    assert torch.equal(logits, outputs.logits)
    whole = model().transformer(ids).last_hidden_state
    assert torch.equal(model().transformer(ids, return_dict=False)[0], whole)
