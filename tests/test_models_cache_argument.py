"""The cache among a forward pass's arguments, whatever the installed transformers calls it."""

import pytest
import torch
from torch import nn
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache

from dive_fast.models.cache_argument import cache_among, cache_argument
from dive_fast.models.tiny import tiny_llama


class NewName(nn.Module):
    def forward(self, input_ids, cache=None): ...


class OldName(nn.Module):
    def forward(self, input_ids, past_key_values=None): ...


class HandsOn(nn.Module):
    def forward(self, *args, **kwargs): ...


class OtherCache(Cache): ...


@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(tiny_llama().config, 8), lambda: OtherCache([])])
def test_a_cache_is_found_by_its_type(make):
    cache = make()
    assert cache_among([torch.ones(2), None, {"a": 1}, cache]) is cache
    assert cache_among([torch.ones(2), (torch.ones(1), torch.ones(1))]) is None


def test_a_model_gets_it_by_the_name_that_it_takes():
    cache = DynamicCache()
    assert cache_argument(NewName(), cache) == {"cache": cache}
    assert cache_argument(OldName(), cache) == {"past_key_values": cache}
    [(name, given)] = cache_argument(tiny_llama(), cache).items()
    assert given is cache and cache_argument(HandsOn(), cache) == {name: cache}
    assert name in LlamaForCausalLM.forward.__annotations__


@pytest.mark.filterwarnings("error::FutureWarning")
def test_no_deprecated_name_is_used():
    model, ids = tiny_llama(), torch.tensor([[5, 6, 7]])
    cache = cache_among(model(ids, use_cache=True).values())
    again = model(ids, **cache_argument(model, cache))
    assert cache.get_seq_length() == 6 and cache_among(again.values()) is cache
