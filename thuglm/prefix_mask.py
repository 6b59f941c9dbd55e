"""Which token sees which, and where each token stands: all that tells a prompt from its answer.

The prefix mask (row = the token that looks, column = the token it sees, `#` = visible), prompt a b c, answer x y:

                     a   b   c [gM] <s>  x   y
              a      #   #   #   #   .   .   .      prompt: everybody sees the whole prompt,
              b      #   #   #   #   .   .   .              also what stands to the right,
              c      #   #   #   #   .   .   .              but nothing of the answer
            [gMASK]  #   #   #   #   .   .   .
            <sop>    #   #   #   #   #   .   .      answer: the whole prompt, and the answer
              x      #   #   #   #   #   #   .              up to and including itself
              y      #   #   #   #   #   #   #

              visible[i, j]  =  j < context  or  j <= i            context = index of the first <sop>

Two positions per token. The first says where the token stands in the prompt (the whole answer stands in the hole, at
the position of `[gMASK]`), the second where it stands inside the answer:

                     a   b   c [gM] <s>  x   y
            row 0    0   1   2   3   3   3   3      rotates the first half of each head
            row 1    0   0   0   0   1   2   3      rotates the second half

Both follow from the ids of prompt and answer, and from nothing else. So a step of generation gets all ids so far, and
not only the newest: whatever it feeds (one token, five guessed ones, a prompt) then has the mask and the positions that
it would have in one pass over everything. Keys that a cache holds *before* the prompt (a learnt prefix) have no ids:
everybody sees them, and the prompt still starts at position 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from thuglm.configuration_chatglm import ChatGLMConfig


def check_input_ids(input_ids: Tensor, config: ChatGLMConfig, *, prompt: bool = True, mask_token: bool = True) -> None:
    """Refuse ids that the model would misread.

    Looking at values makes the CPU wait for a GPU, so `forward` calls this only for ids that are still on the CPU, and
    `generate` once per prompt; a collator does well to call it too.

    Args:
        input_ids: [B, L].
        prompt: the rows start with a prompt, and must have a `<sop>`.
        mask_token: they must also have `[gMASK]` or `[MASK]`, since positions are to be derived from it.

    Raises:
        ValueError: names the row, what is wrong, and what to do.
    """
    for row, ids in enumerate(input_ids.tolist()):
        if bad := [token for token in ids if not 0 <= token < config.vocab_size]:
            raise ValueError(
                f"Row {row} of input_ids holds id {bad[0]}, the vocabulary has ids 0 to {config.vocab_size - 1}. "
                "Tokenizer and model are of different checkpoints: load both from one folder."
            )
        if prompt and len(ids) == 1 and config.bos_token_id not in ids:
            raise ValueError(
                f"Row {row} of input_ids is a single token (id {ids[0]}), and there is no cache. As a step of an "
                "answer it needs the cache that the step before returned, as past_key_values (cache, from transformers "
                "5.24 on); as a prompt it needs [gMASK] <sop>, which tokenizer(text) adds."
            )
        if prompt and config.bos_token_id not in ids:
            raise ValueError(
                f"Row {row} of input_ids has no <sop> (id {config.bos_token_id}): where does the answer start? Make "
                "the ids with tokenizer(text), which ends a prompt with [gMASK] <sop>, and do not cut off the end."
            )
        if prompt and mask_token and config.gmask_token_id not in ids and config.mask_token_id not in ids:
            raise ValueError(
                f"Row {row} of input_ids has neither [gMASK] (id {config.gmask_token_id}) nor [MASK] (id "
                f"{config.mask_token_id}), so its positions are unknown. Make the ids with tokenizer(text), or pass "
                "position_ids."
            )


def check_position_ids(position_ids: Tensor) -> None:
    """Refuse positions with one number a token.

    Raises:
        ValueError: they are not [B, 2, L].
    """
    if position_ids.dim() != 3 or position_ids.shape[1] != 2:
        raise ValueError(
            f"position_ids is {list(position_ids.shape)}: [B, 2, L] is needed, the place of each token in the "
            "prompt and in the answer. Leave them out, and they are derived from the ids."
        )


def visible_of(mask: Tensor) -> Tensor:
    """A 4-D mask [B, 1, L, keys] as bool, True = visible.

    Args:
        mask: bool, as the published model takes it: True = *masked*; or float, added to the scores: 0 = visible, the
            lowest number or -inf = masked. Values are looked at on the CPU only.

    Raises:
        ValueError: neither; or True = visible, as transformers has it.
    """
    look = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if mask.dtype == torch.bool:
        own = mask.diagonal(mask.shape[-1] - mask.shape[-2], -2, -1)
        if look and (own & ~mask.all(dim=-1)).any():
            raise ValueError(
                "The 4-D bool attention_mask hides a token from itself and shows it others: here True means masked, as "
                "in the published model. Pass ~attention_mask, or the [B, L] one."
            )
        return ~mask
    if not mask.is_floating_point() or (look and ((mask != 0) & (mask > -100)).any()):
        raise ValueError(
            f"A 4-D attention_mask of {mask.dtype} is bool (True = masked) or float (0 = visible, -inf = masked) and "
            "nothing between. Pass one of these, or the [B, L] one."
        )
    return mask == 0


def has_prompts(input_ids: Tensor, config: ChatGLMConfig) -> bool:
    """Whether each row of [B, L] holds a prompt of its own, up to `<sop>`. Waits for a GPU that holds the ids."""
    return input_ids.shape[1] > 1 and bool((input_ids == config.bos_token_id).any(dim=1).all())


def ids_of(embeddings: Tensor, table: Tensor, config: ChatGLMConfig) -> Tensor:
    """[B, L] ids: `[MASK]`, `[gMASK]` and `<sop>` where [B, L, H] has their rows of `table`, another one elsewhere.

    Raises:
        ValueError: there is a row without `<sop>`, or without a hole.
    """
    special = (config.mask_token_id, config.gmask_token_id, config.bos_token_id)
    other = next(number for number in range(4) if number not in special)
    ids = torch.full(embeddings.shape[:2], other, device=embeddings.device)
    for token in special:
        ids[(embeddings == table[token].to(embeddings)).all(dim=-1)] = token
    holes = (ids == config.gmask_token_id) | (ids == config.mask_token_id)
    if not (has_prompts(ids, config) and holes.any(dim=1).all()):
        raise ValueError(
            "inputs_embeds alone: mask and positions are derived from the places of [gMASK] and <sop>, and a row has "
            "no embedding that is exactly theirs. Give input_ids beside inputs_embeds."
        )
    return ids


def first_index(matches: Tensor) -> Tensor:
    """Index of the first True in each row, [B, L] -> [B, 1]; the row length where there is none. Does not wait."""
    index = torch.arange(matches.shape[1], device=matches.device)
    return index.where(matches, matches.shape[1]).amin(dim=1, keepdim=True)


def context_lengths(input_ids: Tensor, config: ChatGLMConfig) -> Tensor:
    """Tokens before the answer, [B, 1]: the index of the first `<sop>` (left padding counts)."""
    return first_index(input_ids == config.bos_token_id)


def make_position_ids(input_ids: Tensor, config: ChatGLMConfig, attention_mask: Tensor | None = None) -> Tensor:
    """The two position rows of the module's docstring, [B, 2, L].

    Padding (where `attention_mask` [B, L] is 0) is not counted. Without a mask, as in the original model, padding
    counts like text. A prompt with both `[MASK]` and `[gMASK]` is filled at `[gMASK]`.
    """
    length = input_ids.shape[1]
    index = torch.arange(length, device=input_ids.device)
    context = context_lengths(input_ids, config)
    gmask = first_index(input_ids == config.gmask_token_id)
    mask = first_index(input_ids == config.mask_token_id)
    hole = gmask.where(gmask < length, mask)
    place = index.expand(input_ids.shape)
    if attention_mask is not None:
        place = ((attention_mask != 0).cumsum(dim=1) - 1).clamp_min(0)
    in_prompt = place.where(index < context, place.gather(1, hole.clamp_max(length - 1)))
    in_answer = (index - context + 1).clamp_min(0)
    return torch.stack((in_prompt, in_answer), dim=1)


def continued_positions(prompt_positions: Tensor, length: int) -> Tensor:
    """Positions [B, 2, P] of a prompt up to `<sop>`, and of the answer behind it, [B, 2, length].

    The hole stays where it is; the place inside the answer grows by one.
    """
    steps = torch.arange(1, length - prompt_positions.shape[-1] + 1, device=prompt_positions.device)
    last = prompt_positions[..., -1:]
    return torch.cat((prompt_positions, last + torch.stack((torch.zeros_like(steps), steps))), dim=-1)


def positions_before(position_ids: Tensor, length: int) -> Tensor:
    """[B, 2, L] -> [B, 2, length]: what stands before a prompt has the places before its 0, and none in the answer."""
    missing = length - position_ids.shape[-1]
    if missing <= 0:
        return position_ids
    places = torch.arange(-missing, 0, device=position_ids.device).expand(position_ids.shape[0], -1)
    return torch.cat((torch.stack((places, torch.zeros_like(places)), dim=1), position_ids), dim=-1)


def make_visible(
    input_ids: Tensor,
    config: ChatGLMConfig,
    attention_mask: Tensor | None = None,
    *,
    new: int | None = None,
    before: int | Tensor = 0,
    keys: int | None = None,
    answer_only: bool = False,
) -> Tensor:
    """The prefix mask drawn above, bool [B, 1, new, keys], True = visible; padding neither sees nor is seen.

    Args:
        input_ids: [B, L], all ids so far.
        attention_mask: [B, before + L], or [B, L]; 0 = padding.
        new: how many of the ids look, the last ones; all by default.
        before: keys in front of the first id, which everybody sees.
        keys: room for keys, `before + L` by default; a static cache has more than are filled.
        answer_only: a row without `<sop>` is a piece of an answer, whose prompt is among the keys before it.

    Raises:
        ValueError: the mask is longer than the keys that there are.
    """
    length = input_ids.shape[1]
    new = length if new is None else new
    context = context_lengths(input_ids, config)
    if answer_only:
        context = context.where(context < length, 0)
    filled = before + length
    keys = int(filled) if keys is None else keys
    index = torch.arange(keys, device=input_ids.device) - before
    looks = torch.arange(length - new, length, device=input_ids.device)[:, None]
    visible = (index < context)[:, None] | (index <= looks)
    if attention_mask is not None:
        real = attention_mask != 0
        if isinstance(filled, int):
            if real.shape[1] > filled:
                raise ValueError(
                    f"attention_mask is {list(attention_mask.shape)}: at most {filled} columns are expected, "
                    f"{before} for what the cache holds before the ids, and {length} for the ids."
                )
            real = F.pad(real, (filled - real.shape[1], 0), value=True)
        visible = visible & real[:, -new:, None]
        visible = visible & F.pad(real, (0, keys - real.shape[1]), value=False)[:, None]
    return visible[:, None]
