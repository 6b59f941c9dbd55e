"""Checks of appendix C, run in its kernel after the last cell."""

# Both styles of names, by hand and by the helper; and the adapter does change the logits.
assert (wanted - before).abs().max() > 0.1
for mine, helper in differences.values():
    assert mine < 1e-3
    assert helper == 0.0
assert len(differences) == 2
assert {name.count(".default.") for name in styles["peft 0.3"]} == {1}
assert {name.count(".default.") for name in styles["peft 0.2"]} == {0}

# The form of two thirds: another rank, the same alpha / r, and the middle third is the base's.
assert (settings.r, settings.lora_alpha) == (16, 64)
assert thirds_difference < 1e-3
with torch.no_grad():
    assert (halves(input_ids=ids).logits - before).abs().max() > 0.1
third = base().config.hidden_size
for changed_block, block in zip(by_thirds.transformer.layers, base().transformer.layers, strict=True):
    one, other = (x.attention.query_key_value.weight for x in (changed_block, block))
    assert torch.equal(one[third : 2 * third], other[third : 2 * third])
    assert not torch.equal(one[:third], other[:third])
    assert not torch.equal(one[2 * third :], other[2 * third :])

# Four refusals, each for its own reason.
assert len(refused) == 4
for words, reason in zip(("lm_head", "no lora_B", "transformer.layers.2", "'alpaca'"), refused, strict=True):
    assert words in reason
