"""Bytes that tensors really take."""

from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def storage_bytes(tensors):
    """Of distinct storages."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def hidden(model, ids, precision, cached=True):
    with torch.autocast(
        "cpu", torch.bfloat16, enabled=precision == "autocast", cache_enabled=cached
    ):
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def saved_bytes(model, ids, precision):
    """What a forward pass keeps for the backward pass, the model's own weights apart."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = []

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden(model, ids, precision)
    return storage_bytes(kept)


def peak_bytes(model, ids, precision, cached=True):
    """The most that is alive in forward and backward, weights and their gradients apart."""
    hidden(model, ids, precision, cached).sum().backward()  # gradients exist from here on
    return most_alive(lambda: hidden(model, ids, precision, cached).sum().backward())


def looking_bytes(model, ids, precision, cached):
    """The most that is alive in a forward pass without gradients, weights apart."""
    with torch.no_grad():
        return most_alive(lambda: hidden(model, ids, precision, cached))


def most_alive(work):
    """The most that is alive of what `work` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(change for _, change in changes))
