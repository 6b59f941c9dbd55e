"""P-tuning v2: learnt keys in front of the text, by peft, by the authors' checkpoints, or as a text that prompts share."""

import json

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModel, DynamicCache

from glmhelpers.inference import Decoder, Generation, answers, compare
from glmhelpers.inference.chat import ChatSession
from glmhelpers.training import run_step
from tests.helpers.reference import CHECKPOINT, fresh_model, model, tensors, tokenizer
from tests.helpers.tiny_models import PROMPTS, right_padded, the_batch, training_rows
from thuglm import ChatGLMConfig
from thuglm.modeling_chatglm import CACHE_NAME
from thuglm.prefix_mask import make_position_ids

LENGTH = 5
LAYERS, HEADS, HIDDEN = 4, 4, 64
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def matrix(seed=0):
    """Learnt numbers as every program keeps them, [P, layers * 2 * H]."""
    torch.manual_seed(seed)
    return torch.randn(LENGTH, LAYERS * 2 * HIDDEN)


def tuned(base=None, **settings):
    net = get_peft_model(
        base or fresh_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, **settings)
    )
    if not settings:
        net.prompt_encoder["default"].embedding.weight.data.copy_(matrix())
    return net.eval()


def published(folder, **changes):
    """A model as the authors' evaluation script builds it: the base, and the prefix of a training's checkpoint."""
    config = AutoConfig.from_pretrained(CHECKPOINT, pre_seq_len=LENGTH, **changes)
    net = AutoModel.from_pretrained(CHECKPOINT, config=config, dtype=torch.float32)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    start = "transformer.prefix_encoder."
    net.transformer.prefix_encoder.load_state_dict({name.removeprefix(start): value for name, value in state.items()})
    return net.eval()


@pytest.fixture
def ptuning(tmp_path):
    torch.save({"transformer.prefix_encoder.embedding.weight": matrix()}, tmp_path / "pytorch_model.bin")
    return tmp_path


def by_hand(ids, mask, numbers=None):
    """Logits [B, L, V] with the keys put in a cache, and mask and positions written out here, pair by pair."""
    numbers = matrix() if numbers is None else numbers
    keys = numbers.view(LENGTH, LAYERS, 2, HEADS, HIDDEN // HEADS)
    cache = DynamicCache()
    for layer in range(LAYERS):
        key, value = (keys[:, layer, part].transpose(0, 1)[None].repeat(len(ids), 1, 1, 1) for part in (0, 1))
        cache.update(key, value, layer)
    hidden = torch.ones(len(ids), 1, ids.shape[1], LENGTH + ids.shape[1], dtype=torch.bool)
    for row, (tokens, real) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        context = tokens.index(2660)
        for looks in range(len(tokens)):
            hidden[row, 0, looks, :LENGTH] = not real[looks]
            for seen in range(len(tokens)):
                hidden[row, 0, looks, LENGTH + seen] = not (
                    real[looks] and real[seen] and (seen < context or seen <= looks)
                )
    positions = make_position_ids(ids, model().config, mask)
    return model()(ids, attention_mask=hidden, position_ids=positions, past_key_values=cache, use_cache=True).logits


def batches():
    ids, mask, _ = right_padded(training_rows())
    left = tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    return [(ids, mask), (left["input_ids"], left["attention_mask"])]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", ["peft", "published"])
def test_equals_the_mask_by_hand(kind, side, attention, ptuning):
    ids, mask = batches()[side]
    want = by_hand(ids, mask)
    assert (want - model()(ids, attention_mask=mask).logits)[mask == 1].abs().max() > 0.1, "the prefix does nothing"
    net = tuned() if kind == "peft" else published(ptuning)
    (net.base_model if kind == "peft" else net).config._attn_implementation = attention
    for train in (False, True):
        net.train(train)
        for module in net.modules():
            module.p = 0.0  # no dropout
        got = net(input_ids=ids, attention_mask=mask, return_logits=True).logits
        torch.testing.assert_close(got[mask == 1], want[mask == 1], atol=1e-4, rtol=0)


def test_keys_that_the_mask_hides_leave_the_golden_logits():
    ids = tensors("a_single")["input_ids"]
    keys = torch.randn(1, HEADS, LENGTH, HIDDEN // HEADS)
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(keys, keys, layer)
    mask = torch.cat((torch.zeros(1, LENGTH), torch.ones_like(ids)), dim=1)
    got = model()(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(got, tensors("a_single")["logits"], atol=1e-4, rtol=0)


def test_a_text_that_prompts_share_is_read_once():
    """Its keys are seen by every prompt; cut into steps or not, the answer is the same."""
    shared, ids = torch.tensor([[5, 256, 2657, 2660]]), torch.tensor([training_rows()[1]])

    def cache():
        return model()(shared, use_cache=True)[CACHE_NAME]

    whole = model()(ids, past_key_values=cache(), use_cache=True).logits
    assert (whole - model()(ids).logits).abs().max() > 1e-3
    cut = ids[0].tolist().index(2660) + 1
    first = model()(ids[:, :cut], past_key_values=cache(), use_cache=True)
    rest = model()(ids[:, cut:], all_ids=ids, past_key_values=first[CACHE_NAME], use_cache=True)
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), whole, atol=1e-4, rtol=0)
    answer = model().generate(ids[:, :cut], **{CACHE_NAME: cache()}, attention_mask=torch.ones(1, 4 + cut), **GREEDY)
    greedy = ids[:, :cut]
    for _ in range(answer.shape[1] - cut):
        logits = model()(greedy, past_key_values=cache(), use_cache=True).logits
        greedy = torch.cat((greedy, logits[:, -1:].argmax(-1)), dim=1)
    assert answer.tolist() == greedy.tolist()


# Training ----------------------------------------------------------------------------------------------------------


def gradients(net):
    net.zero_grad()
    loss = run_step(net, the_batch(), 2)
    return loss.item(), {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [{}, {"prefix_projection": True, "encoder_hidden_size": 16}])
def test_trains_through_checkpointed_blocks(settings):
    net = tuned(**settings)
    base = net.get_base_model()
    loss, want = gradients(net.train())
    assert all(gradient.abs().max() > 0 for gradient in want.values())
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, got = gradients(net)
    assert again == loss
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=0, rtol=0)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_trains_on_a_base_that_was_placed(device_map):
    want = gradients(tuned().train())
    got = gradients(tuned(fresh_model(device_map=device_map)).train())
    assert got[0] == want[0]


def test_every_block_gets_its_keys_on_its_own_device():
    """Two "devices": blocks without memory stand for the second one, and refuse a tensor of the first."""
    net = tuned()
    parts = ["transformer.word_embeddings", *(f"transformer.layers.{n}" for n in range(LAYERS))]
    places = dict(zip(parts, ["cpu"] * 3 + ["meta"] * 2, strict=True))
    net.get_base_model().place({**places, "transformer.final_layernorm": "meta", "lm_head": "meta"})
    seen = []
    for block in net.get_base_model().transformer.layers:
        block.register_forward_pre_hook(lambda _, args: seen.append({x.device.type for x in args if x is not None}))
    del net.get_base_model().hf_device_map  # or peft would put them there itself
    ids, mask = batches()[0]
    net.train()(input_ids=ids, attention_mask=mask)
    assert seen == [{"cpu"}, {"cpu"}, {"meta"}, {"meta"}]


def test_loss_and_gradient_are_those_of_the_mask_by_hand():
    batch = the_batch()
    numbers = matrix().requires_grad_()
    logits = by_hand(batch["input_ids"], batch["attention_mask"], numbers)
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    want.backward()
    net = tuned().train()
    loss = net(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), abs=1e-5)
    torch.testing.assert_close(net.prompt_encoder["default"].embedding.weight.grad, numbers.grad, atol=1e-6, rtol=1e-4)


def test_peft_trains_saves_loads_and_answers(tmp_path):
    net = tuned().train()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(run_step(net, the_batch()).item())
        optimizer.step()
    assert losses[-1] < losses[0] / 3
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        "prompt_encoder.default.embedding.weight"
    }
    want = answers(net.eval(), tokenizer(), PROMPTS)
    net.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh_model(), tmp_path)
    assert answers(again, tokenizer(), PROMPTS) == want
    rows = compare(again, tokenizer(), PROMPTS)
    assert [row.tuned for row in rows] == want
    assert [row.base for row in rows] == answers(fresh_model(), tokenizer(), PROMPTS) != want


# Answering ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["peft", "published"])
def test_generate_and_decoder_equal_one_pass_for_each_token(kind, ptuning):
    net = tuned() if kind == "peft" else published(ptuning)
    batch = tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    want, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(GREEDY["max_new_tokens"]):
        token = by_hand(want, mask)[:, -1:].argmax(-1)
        want, mask = torch.cat((want, token), 1), torch.cat((mask, torch.ones_like(token)), 1)
    ended, length = model().config.eos_token_id, batch["input_ids"].shape[1]
    for row, wanted in zip(
        net.generate(**batch, **GREEDY)[:, length:].tolist(), want[:, length:].tolist(), strict=True
    ):
        end = wanted.index(ended) + 1 if ended in wanted else len(wanted)
        assert row[:end] == wanted[:end]
    rows = Decoder(net).generate(**batch, max_new_tokens=GREEDY["max_new_tokens"])
    for row, wanted in zip(rows, want[:, length:].tolist(), strict=True):
        assert row == wanted[: len(row)]


def test_beams_and_chats_with_the_prefix_and_without():
    net = tuned()
    session = ChatSession(net, tokenizer(), settings=Generation(temperature=0, max_new_tokens=16))
    with_prefix = session.chat("你好").text
    session.clear()
    session.adapter = False
    assert session.chat("你好").text == answers(fresh_model(), tokenizer(), ["你好"], max_new_tokens=16)[0]
    assert with_prefix == answers(net, tokenizer(), ["你好"], max_new_tokens=16)[0] != session.history[0][1]
    batch = tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    beams = {"num_beams": 3, **GREEDY}
    assert net.generate(**batch, **beams).tolist() == net.generate(**batch, **beams, use_cache=False).tolist()


FASTER = {
    "lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 2},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("how", FASTER)
def test_faster_ways_give_the_same_answer_or_are_refused(how, ptuning):
    net, by_peft = published(ptuning), tuned()
    for prompt in PROMPTS:
        inputs = tokenizer()([prompt], return_tensors="pt")
        want = net.generate(**inputs, **GREEDY).tolist()
        assert net.generate(**inputs, **GREEDY, **FASTER[how]).tolist() == want
        with pytest.raises(ValueError, match="a learnt prefix or prompt"):
            by_peft.generate(**inputs, **GREEDY, **FASTER[how])
        with by_peft.disable_adapter():
            plain = fresh_model().generate(**inputs, **GREEDY).tolist()
            assert by_peft.generate(**inputs, **GREEDY, **FASTER[how]).tolist() == plain


# The authors' checkpoints --------------------------------------------------------------------------------------------


def test_a_published_checkpoint_loads_whole_and_is_saved_again(ptuning, tmp_path):
    net = published(ptuning)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        "transformer.prefix_encoder.embedding.weight"
    }
    net.save_pretrained(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["pre_seq_len"] == LENGTH
    again = AutoModel.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert torch.equal(again.transformer.prefix_encoder.embedding.weight, matrix())
    ids, mask = batches()[0]
    torch.testing.assert_close(again(ids, attention_mask=mask).logits, net(ids, attention_mask=mask).logits)


def test_a_projected_prefix_is_the_published_network(tmp_path):
    config = AutoConfig.from_pretrained(CHECKPOINT, pre_seq_len=LENGTH, prefix_projection=True)
    encoder = AutoModel.from_config(config, dtype=torch.float32).eval().transformer.prefix_encoder
    want = encoder.trans[2](torch.tanh(encoder.trans[0](encoder.embedding.weight)))
    assert {name for name, _ in encoder.named_parameters()} == {
        "embedding.weight",
        *(f"trans.{number}.{part}" for number in (0, 2) for part in ("weight", "bias")),
    }
    key, value = encoder(2, torch.float32)[1]
    view = want.view(LENGTH, LAYERS, 2, HEADS, HIDDEN // HEADS)[:, 1]
    for got, part in ((key, 0), (value, 1)):
        torch.testing.assert_close(got, view[:, part].transpose(0, 1).expand(2, -1, -1, -1))


def test_an_empty_prefix_is_refused():
    with pytest.raises(ValueError, match="pre_seq_len is 0"):
        ChatGLMConfig(pre_seq_len=0)
