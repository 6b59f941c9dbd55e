"""What transformers and peft expect of every model: followed, or refused in one sentence."""

import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from glmhelpers.tokens import RightPadCollator
from glmhelpers.training import training_arguments
from glmhelpers.training.guards import refuse_settings
from tests.helpers.reference import fresh_model, model, tokenizer
from tests.helpers.tiny_models import PROMPTS, lora, right_padded, the_batch, training_rows
from thuglm import ChatGLMConfig
from thuglm.modeling_chatglm import CACHE_NAME
from thuglm.prefix_mask import make_position_ids, make_visible

GREEDY = {"do_sample": False, "max_new_tokens": 8}


def batch():
    ids, mask, _ = right_padded(training_rows())
    return ids, mask


# What comes back ---------------------------------------------------------------------------------------------------


def test_the_configuration_says_what_comes_back():
    ids, _ = batch()
    net = fresh_model(attn_implementation="eager")
    want = net(ids, output_hidden_states=True, output_attentions=True)
    net.config.output_hidden_states = net.config.output_attentions = True
    got = net(ids)
    assert len(got.hidden_states) == 5
    assert all(torch.equal(*pair) for pair in zip(got.attentions, want.attentions, strict=True))
    assert (
        net(ids, output_hidden_states=False, output_attentions=False).keys().isdisjoint({"hidden_states", "attentions"})
    )
    net.config.return_dict = False
    assert torch.equal(net(ids)[0], want.logits)
    assert torch.equal(net(ids, return_dict=True).logits, want.logits)
    assert isinstance(net.transformer(ids), tuple)
    assert torch.isfinite(net(ids, labels=ids)[0])


def test_the_attention_can_be_changed():
    ids, _ = batch()
    net = fresh_model()
    asked = net(ids, output_attentions=True)
    net.set_attn_implementation("eager")
    weights = net(ids, output_attentions=True).attentions[-1]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    assert torch.equal(asked.attentions[-1], weights)
    assert torch.equal(asked.logits, net(ids).logits)
    net.set_attn_implementation("sdpa")
    assert net(ids).attentions is None
    torch.testing.assert_close(net(ids).logits, model()(ids).logits)


def test_logits_of_chosen_positions():
    ids, _ = batch()
    whole = model()(ids).logits
    for chosen in (torch.tensor([0, 3, 2]), torch.tensor([-1]), torch.arange(4)):
        torch.testing.assert_close(model()(ids, logits_to_keep=chosen).logits, whole[:, chosen])
    torch.testing.assert_close(model()(ids, logits_to_keep=2).logits, whole[:, -2:])


def test_labels_that_are_shifted_already():
    batch = the_batch()
    want = model()(**batch).loss
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    for labels in (batch["labels"], torch.full_like(batch["labels"], 7)):
        got = model()(**{**batch, "labels": labels}, shift_labels=shifted).loss
        torch.testing.assert_close(got, want)


# Masks and positions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_positions", [False, True])
def test_masks_with_four_dimensions(with_positions):
    ids, mask = batch()
    visible = make_visible(ids, model().config, mask)
    more = {"position_ids": make_position_ids(ids, model().config)} if with_positions else {}
    want = model()(ids, attention_mask=mask, **more).logits[mask == 1]
    numbers = torch.zeros(visible.shape)
    for given in (
        ~visible,
        numbers.masked_fill(~visible, float("-inf")),
        numbers.masked_fill(~visible, torch.finfo(torch.float32).min),
    ):
        got = model()(ids, attention_mask=given, **more).logits
        torch.testing.assert_close(got[mask == 1], want, atol=1e-5, rtol=0)
    for other, message in (
        (visible, "True means masked"),
        (visible.long(), "torch.int64 is bool"),
        (visible.float(), "torch.float32 is bool"),
        (numbers.masked_fill(~visible, -3.0), "nothing between"),
    ):
        with pytest.raises(ValueError, match=message):
            model()(ids, attention_mask=other, **more)


def test_a_mask_with_four_dimensions_and_a_cache():
    ids = torch.tensor([training_rows()[1]])
    cut = ids[0].tolist().index(2660) + 1
    hidden = ~make_visible(ids, model().config)
    first = model()(ids[:, :cut], attention_mask=hidden[:, :, :cut, :cut], use_cache=True)
    rest = model()(ids[:, cut:], all_ids=ids, attention_mask=hidden[:, :, cut:], past_key_values=first[CACHE_NAME])
    torch.testing.assert_close(rest.logits, model()(ids).logits[:, cut:], atol=1e-4, rtol=0)


def test_positions_with_one_number_a_token_are_refused():
    ids, _ = batch()
    flat = torch.arange(ids.shape[1]).expand(ids.shape)
    inputs = tokenizer()(PROMPTS[:1], return_tensors="pt")
    flat_prompt = torch.arange(inputs["input_ids"].shape[1])[None]
    for call in (
        lambda: model()(ids, position_ids=flat),
        lambda: model().transformer(ids, position_ids=flat[:, None]),
        lambda: model().generate(**inputs, **GREEDY, position_ids=flat_prompt),
    ):
        with pytest.raises(ValueError, match=r"\[B, 2, L\] is needed"):
            call()


@pytest.mark.parametrize("name", ["bos_token_id", "gmask_token_id", "mask_token_id"])
@pytest.mark.parametrize("value", [None, [5, 6]])
def test_the_ids_of_a_prompt_are_one_each(name, value):
    with pytest.raises(Exception, match=f"'{name}' expected int"):
        ChatGLMConfig(**{name: value})


# Embeddings without ids --------------------------------------------------------------------------------------------


def test_embeddings_alone_hold_their_prompt():
    ids, mask = batch()
    embeddings = model().get_input_embeddings()(ids)
    want = model()(ids, attention_mask=mask).logits
    assert torch.equal(model()(inputs_embeds=embeddings, attention_mask=mask).logits, want)
    labels = the_batch()["labels"][: len(ids)]
    loss = model()(inputs_embeds=embeddings, attention_mask=mask, labels=labels).loss
    assert loss.item() == model()(ids, attention_mask=mask, labels=labels).loss.item()
    with pytest.raises(ValueError, match="inputs_embeds alone"):
        model()(inputs_embeds=embeddings + 1e-3)
    with pytest.raises(ValueError, match="inputs_embeds alone"):
        model().generate(inputs_embeds=embeddings, **GREEDY)
    with pytest.raises(ValueError, match=r"forward needs input_ids"):
        model()()


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig])
def test_pefts_learnt_prompts_train_are_saved_and_answer(config, tmp_path):
    torch.manual_seed(0)
    net = get_peft_model(fresh_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = net(**the_batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < losses[0] * 0.9
    net.save_pretrained(tmp_path)
    net = PeftModel.from_pretrained(fresh_model(), tmp_path).eval()
    inputs = tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    want, mask = inputs["input_ids"], inputs["attention_mask"]
    got = net.generate(**inputs, **GREEDY)
    for step in range(got.shape[1] - want.shape[1]):
        token = net(input_ids=want, attention_mask=mask).logits[:, -1:].argmax(-1)
        here = got[:, want.shape[1]]
        going = (want[:, inputs["input_ids"].shape[1] :] != 2661).all(dim=1)
        assert token[going, 0].tolist() == here[going].tolist(), step
        want, mask = torch.cat((want, here[:, None]), 1), torch.cat((mask, torch.ones_like(token)), 1)


# Compilers ---------------------------------------------------------------------------------------------------------


def test_export_and_whole_graphs():
    ids, mask = batch()
    want = model()(ids, attention_mask=mask).logits[mask == 1]
    arguments = {"attention_mask": mask, "use_cache": False}
    exported = torch.export.export(model(), (ids,), arguments).module()
    torch.testing.assert_close(exported(ids, **arguments).logits[mask == 1], want, atol=1e-4, rtol=0)
    torch._dynamo.reset()
    compiled = torch.compile(model(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, **arguments).logits[mask == 1], want, atol=1e-4, rtol=0)


def test_a_compiled_model_trains():
    torch._dynamo.reset()
    net = lora(fresh_model())
    net.get_base_model().enable_input_require_grads()
    losses = []
    for call in (net, torch.compile(net, backend="eager")):
        net.zero_grad()
        loss = call(**the_batch(), use_cache=False).loss
        loss.backward()
        losses.append((loss.item(), *(p.grad.norm().item() for p in net.parameters() if p.requires_grad)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# Before a GPU would end the process --------------------------------------------------------------------------------


def test_the_trainer_refuses_to_compile(tmp_path):
    with pytest.raises(ValueError, match="torch_compile is not supported"):
        refuse_settings(training_arguments(tmp_path, on_gpu=False, torch_compile=True))


@pytest.mark.parametrize(("name", "wrong"), [("input_ids", 99999), ("input_ids", -1), ("labels", 99999)])
def test_the_collator_refuses_ids_of_another_tokenizer(name, wrong):
    row = {"input_ids": [5, 256, 2657, 2660, 9], "labels": [-100] * 4 + [9]}
    collator = RightPadCollator(tokenizer())
    assert collator([row])["labels"].shape == (1, 8)
    with pytest.raises(ValueError, match=f"row 1 of the batch holds id {wrong}, the tokenizer has ids 0 to"):
        collator([row, {**row, name: [*row[name][:4], wrong]}])


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_of_another_shape_are_refused_and_not_compared_with_other_tokens(name):
    ids, mask = batch()
    for wrong in (ids[:, :-1], ids[:, 1:], ids.reshape(1, -1), ids[0]):
        with pytest.raises(ValueError, match=r"labels have shape \[.*one for each token: \[3, "):
            fresh_model()(ids, mask, **{"labels": ids, name: wrong})


def test_guidance_that_asks_without_a_prompt_is_refused():
    ids, mask = batch()
    with pytest.raises(ValueError, match="guidance_scale compares"):
        model().generate(ids[:1], attention_mask=mask[:1], guidance_scale=1.5, **GREEDY)


@pytest.mark.parametrize("door", ["chat", "stream_chat"])
def test_a_history_that_can_be_read_once_comes_back_whole(door):
    net, said = model(), [("a", "b"), ("c", "d")]
    answer = getattr(net, door)(tokenizer(), "e", history=(turn for turn in said), **GREEDY)
    _, history = answer if door == "chat" else list(answer)[-1]
    assert history[:2] == said
    assert len(history) == 3
