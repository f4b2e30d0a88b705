import math

import pytest
import tiny_clip
import torch

from slsgu_cli.compare.training import adamw, clamp_logit_scale, cosine_rate, is_decayed


def test_matrices_decay_and_norms_biases_and_the_scale_do_not():
    model = tiny_clip.fresh_model()
    decayed = {name for name, p in model.named_parameters() if is_decayed(name, p)}
    block = "visual.transformer.resblocks.0."
    assert {"visual.proj", "text_projection", "token_embedding.weight"} < decayed
    assert {f"{block}attn.in_proj_weight", f"{block}mlp.c_fc.weight"} < decayed
    spared = {f"{block}ln_1.weight", f"{block}attn.in_proj_bias", "logit_scale"}
    assert not decayed & {*spared, "visual.class_embedding", "ln_final.weight"}


def test_the_optimizer_has_the_papers_settings():
    model = tiny_clip.fresh_model()
    groups = adamw(model, 1e-6).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-6, (0.9, 0.98), 1e-6)


def test_the_rate_falls_from_whole_to_nothing_by_half_a_cosine():
    rates = [cosine_rate(2.0, step, 8) for step in range(9)]
    assert rates[0] == 2.0
    assert rates[4] == pytest.approx(1.0)
    assert rates[8] == pytest.approx(0.0)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("value", "kept"), [(-1.0, 0.0), (2.0, 2.0), (9.0, math.log(100))])
def test_the_logit_scale_stays_within_bounds(value, kept):
    model = tiny_clip.fresh_model()
    model.logit_scale.data.fill_(value)
    clamp_logit_scale(model)
    assert float(model.logit_scale.detach()) == pytest.approx(kept)
    assert isinstance(model.logit_scale, torch.nn.Parameter)
