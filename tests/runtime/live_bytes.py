"""Bytes of the tensors that some code creates: those alive now, and the most at any one time."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end; those that were there before do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._see((args, kwargs), ours=False)
        result = func(*args, **(kwargs or {}))
        self._see(result, ours=True)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Also count a tensor over memory that no operation made: shared with another process."""
        storage = tensor.untyped_storage()
        self._follow(storage, ours=False)
        self._add(storage._cdata, storage.nbytes() - self._sizes[storage._cdata])

    def _see(self, tree, *, ours: bool) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor) and type(leaf) in (torch.Tensor, torch.nn.Parameter):
                self._follow(leaf.untyped_storage(), ours)

    def _follow(self, storage: torch.UntypedStorage, ours: bool) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            # torch keeps one Python object for a storage as long as the storage lives.
            weakref.finalize(storage, self._forget, key)
            self._add(key, storage.nbytes() if ours else 0)

    def _add(self, key: int, size: int) -> None:
        self._sizes[key] += size
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
