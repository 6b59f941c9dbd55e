"""The fixed-cache decoder against the original's recorded tokens, `generate`, and the plain forward pass."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers.generation.logits_process import TopPLogitsWarper

from glmhelpers.cost_model.sizes import Setting, Shape
from glmhelpers.cost_model.step_memory import cache_bytes
from glmhelpers.inference import decoder as decode
from glmhelpers.inference.decoder import BUCKET, Decoder, bucket_for, likely, pick, stage_parts, state_of
from tests.helpers.reference import fresh_model, generation_cases, model, tokenizer

PROMPTS = ["你好", "晚上睡不着应该怎么办", "What is the capital of France?"]


def cut(ids, end=2661):
    return ids[: ids.index(end) + 1] if end in ids else ids


def inputs_of(*texts):
    return tokenizer()(list(texts), padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def decoder():
    return Decoder(model())


@pytest.fixture(params=["one stage", "three stages on two devices"])
def stages(request, monkeypatch):
    """The second one is the map with the embedding beside the head, as if the CPU were two devices."""
    if request.param != "one stage":
        parts = [["embedding"], ["0", "1"], ["2", "3", "norm", "head"]]
        monkeypatch.setattr(decode, "stage_parts", lambda net: [(part, torch.device("cpu")) for part in parts])


# The same tokens


@pytest.mark.parametrize("case", generation_cases()["greedy_single"], ids=lambda case: case["prompt"][:12])
def test_against_original_greedy(case, stages):
    got = Decoder(model()).generate(torch.tensor([case["input_ids"]]), max_new_tokens=24)
    assert got == [cut(case["new_ids"])]


def test_against_original_greedy_batch(stages):
    case = generation_cases()["greedy_batch"]
    got = Decoder(model()).generate(**inputs_of(*case["prompts"]), max_new_tokens=24)
    assert got == [cut(ids) for ids in case["new_ids"]]


def test_logits_of_every_step_are_those_of_a_plain_forward(monkeypatch, stages):
    """Padded batch, cache filled beyond one bucket: each step's logits against the whole sequence at once."""
    seen = []
    monkeypatch.setattr(decode, "pick", lambda logits, *rest: seen.append(logits.clone()) or pick(logits, *rest))
    texts = ["长" * 240, "你好"]
    batch = inputs_of(*texts)
    new = Decoder(model()).generate(**batch, max_new_tokens=30)
    for row, text in enumerate(texts):
        ids = tokenizer()([text], return_tensors="pt")["input_ids"][0].tolist()
        whole = model()(input_ids=torch.tensor([ids + new[row]])).logits[0, len(ids) - 1 : -1]
        steps = torch.stack([logits[row] for logits in seen[: len(new[row])]])
        torch.testing.assert_close(steps, whole, atol=1e-4, rtol=0)


def test_one_decoder_serves_any_prompt_in_any_order(decoder):
    """Short after long, one after many: nothing of an earlier answer is left in the buffers."""
    for texts in (PROMPTS, ["你好"], ["长" * 600], ["你好", "长" * 300], PROMPTS[::-1]):
        batch = inputs_of(*texts)
        want = model().generate(**batch, do_sample=False, max_new_tokens=12)[:, batch["input_ids"].shape[1] :]
        assert decoder.generate(**batch, max_new_tokens=12) == [cut(ids) for ids in want.tolist()]


def test_leaving_early_leaves_nothing_behind(decoder):
    batch = inputs_of(PROMPTS[1])
    whole = decoder.generate(**batch, max_new_tokens=10)
    with contextlib.closing(decoder.stream(**batch, max_new_tokens=400)) as stream:
        assert [next(stream) for _ in range(3)] == [[token] for token in whole[0][:3]]
    assert decoder.generate(**batch, max_new_tokens=10) == whole


def test_answers_end_at_eop_or_at_the_limit(monkeypatch, decoder):
    ids = inputs_of("你好")["input_ids"]
    tokens = [token for (token,) in decoder.stream(ids, max_new_tokens=5)]
    assert len(tokens) == 5
    monkeypatch.setattr(model().config, "eos_token_id", tokens[2])
    assert [token for (token,) in decoder.stream(ids, max_new_tokens=5)] == tokens[:3]


# The adapter


@contextlib.contextmanager
def merged(net):
    net.merge_adapter()
    yield
    net.unmerge_adapter()


def test_adapter_on_off_and_merged_between_answers():
    torch.manual_seed(0)
    net = get_peft_model(fresh_model(), LoraConfig(r=4, target_modules=["query_key_value"]))
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    net.eval()
    decoder, batch, states, answers = Decoder(net), inputs_of(*PROMPTS), set(), []
    for context in (contextlib.nullcontext, net.disable_adapter, lambda: merged(net), contextlib.nullcontext):
        with context():
            want = net.generate(**batch, do_sample=False, max_new_tokens=8)[:, batch["input_ids"].shape[1] :]
            answers.append(decoder.generate(**batch, max_new_tokens=8))
            assert answers[-1] == [cut(ids) for ids in want.tolist()]
            states.add(state_of(net))
    assert answers[0] != answers[1]
    assert answers[0] == answers[2] == answers[3]
    assert len(states) == 3, "a graph recorded in one state would be replayed in another"


def test_a_replaced_weight_is_another_state():
    net = fresh_model()
    before = state_of(net)
    net.transformer.layers[1].mlp.dense_h_to_4h.weight.data += 1
    assert state_of(net) == before, "in place: a recorded step reads the new values"
    layer = net.transformer.layers[1].mlp.dense_h_to_4h
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    assert state_of(net) != before


# Sampling


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12, unique=True), st.floats(0.05, 0.99))
def test_likely_keeps_what_the_library_keeps(weights, top_p):
    """Whole numbers: of two tokens that are equally likely in float32, either may be the one that is kept."""
    probabilities = torch.tensor([weights]) / sum(weights)
    reached = probabilities.sort(descending=True).values.cumsum(-1)
    if (reached - top_p).abs().min() < 1e-4:
        return  # on the border rounding decides
    kept = likely(probabilities, top_p)[0] > 0
    warped = TopPLogitsWarper(top_p)(None, probabilities.log())[0]
    assert kept.tolist() == torch.isfinite(warped).tolist()


def test_likely_of_one_keeps_everything():
    probabilities = torch.full((1, 7), 1 / 7)
    assert torch.equal(likely(probabilities, 1.0), probabilities)


def test_pick_draws_by_probability():
    """20,000 draws of five tokens at temperature 2: the counts lie within five standard deviations."""
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    count = 20_000
    noise = torch.empty(count, 5).exponential_(generator=torch.Generator().manual_seed(0))
    tokens = pick(scores.expand(count, 5), 2.0, 1.0, noise)
    want = torch.softmax(scores / 2, -1)
    got = torch.bincount(tokens, minlength=5) / count
    assert ((got - want).abs() <= 5 * (want * (1 - want) / count).sqrt()).all()
    assert set(pick(scores.expand(count, 5), 2.0, 0.6, noise).tolist()) == {0, 1}


def test_greedy_pick_is_argmax_and_flags_what_is_no_number():
    scores = torch.tensor(
        [[1.0, 3.0, 2.0], [torch.nan, 0, 0], [-torch.inf] * 3, [-torch.inf, 0, -1], [torch.inf, 0, 0]]
    )
    assert pick(scores).tolist() == [1, -1, -1, 1, -1]
    assert pick(scores.half()).tolist() == [1, -1, -1, 1, -1]


def test_seed_repeats_an_answer_and_another_seed_changes_it(decoder):
    batch = inputs_of("你好")
    settings = {"max_new_tokens": 12, "temperature": 2.0}
    first, again, other = (decoder.generate(**batch, seed=seed, **settings) for seed in (1, 1, 2))
    assert first == again != other


def test_sampling_leaves_the_global_generator_alone(decoder):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    decoder.generate(**inputs_of("你好"), max_new_tokens=4, temperature=1.0)
    assert torch.equal(torch.rand(3), want)


def test_no_token_without_a_piece():
    net = fresh_model()
    with torch.no_grad():  # a padding row of the embedding becomes the likeliest token
        net.lm_head.weight[3039] = net.lm_head.weight.abs().sum(0) * 100
        net.transformer.final_layernorm.bias.fill_(10)
    batch = inputs_of("你好")
    assert Decoder(net).generate(**batch, max_new_tokens=1) == [[3039]]
    assert Decoder(net).generate(**batch, max_new_tokens=1, pieces=3000)[0][0] < 3000


# Sizes and errors


@given(st.integers(1, 5000))
def test_bucket_is_the_next_multiple(tokens):
    bucket = bucket_for(tokens)
    assert bucket % BUCKET == 0
    assert tokens <= bucket < tokens + BUCKET


def test_buffers_have_the_size_that_the_planner_counts():
    decoder = Decoder(model())
    assert decoder.cache is None
    decoder.generate(**inputs_of(*PROMPTS), max_new_tokens=4)
    shape, setting = Shape.of(model().config), Setting(batch_size=3, dtype="float32", training=False)
    assert decoder.cache.nbytes == {"cpu": cache_bytes(shape, setting, BUCKET, shape.layers)}
    decoder.generate(**inputs_of("长" * 400), max_new_tokens=4)
    one = Setting(batch_size=1, dtype="float32", training=False)
    assert decoder.cache.nbytes == {"cpu": cache_bytes(shape, one, 2 * BUCKET, shape.layers)}
    decoder.forget()
    assert decoder.cache is None


def test_stages_follow_the_devices():
    net = fresh_model()
    net.transformer.layers[2].to("meta")
    places = [(parts, device.type) for parts, device in stage_parts(net)]
    assert places == [(["embedding", "0", "1"], "cpu"), (["2"], "meta"), (["3", "norm", "head"], "cpu")]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_reported(temperature):
    net = fresh_model()
    with torch.no_grad():
        net.transformer.final_layernorm.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"new token 1 are NaN.*verify_weights"):
        Decoder(net).generate(**inputs_of("你好"), max_new_tokens=3, temperature=temperature)


def test_a_nan_of_one_answer_is_not_in_the_next():
    """The cache is used again, and no mask keeps a NaN out: the longer prompt's places must be empty."""
    net = fresh_model()
    ours = Decoder(net)
    good = ours.generate(**inputs_of("你好"), max_new_tokens=8)
    weight = net.transformer.layers[0].attention.query_key_value.weight
    whole = weight.detach().clone()
    weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        ours.generate(**inputs_of("晚上睡不着应该怎么办" * 4), max_new_tokens=8)
    weight.data.copy_(whole)
    assert ours.generate(**inputs_of("你好"), max_new_tokens=8) == good


def test_too_long_and_malformed_prompts_are_refused(decoder):
    ids = inputs_of("你好")["input_ids"]
    with pytest.raises(ValueError, match=r"prompt of 5 tokens and 2044 new ones.*2048"):
        decoder.generate(ids, max_new_tokens=2044)
    with pytest.raises(ValueError, match="at least 1"):
        decoder.generate(ids, max_new_tokens=0)
    with pytest.raises(ValueError, match="no <sop>"):
        decoder.generate(ids[:, :-1], max_new_tokens=3)
    with pytest.raises(TypeError, match="got Linear"):
        Decoder(torch.nn.Linear(2, 2))
