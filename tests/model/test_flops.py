"""Prices equal what a counter sees in the real forward and backward, to the last operation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from koinon.model.flops import item_flops, token_flops
from koinon.units import Flops
from tests.model.small import SMALL, VARIANTS, stages_of, tokens_of, variant


@pytest.mark.parametrize("name", VARIANTS)
def test_an_item_costs_what_is_counted(name: str) -> None:
    config = variant(name)
    ids, targets = tokens_of(config, 3)
    c = None
    for stage in stages_of(config):
        price = item_flops(config, stage.index, *ids.shape)
        c_in = None if c is None else c.detach().requires_grad_()
        # Unfused attention: the fused backward computes its scores again, which is no useful work.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
            c = stage.loss_sum(ids, c_in, targets) if stage.is_last else stage(ids, c_in)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
            c.backward(torch.ones_like(c))
        assert price.forward == Flops(forward.get_total_flops())
        assert price.backward == Flops(backward.get_total_flops())


def test_a_token_costs_its_share_of_an_item_in_every_stage() -> None:
    items = [item_flops(SMALL, index, 4, 10).total.count for index in range(3)]
    assert token_flops(SMALL).count * 40 == sum(items)


def test_a_longer_sequence_makes_a_token_dearer_and_a_narrow_rank_cheaper() -> None:
    assert token_flops(SMALL, 5).count < token_flops(SMALL, 10).count
    assert token_flops(replace(SMALL, rank=4)).count < token_flops(SMALL).count
