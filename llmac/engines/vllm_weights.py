"""Two ways of a complete stream of weights into vLLM's model, and which of them is safe.

`copy_in` writes every tensor into the parameter it belongs to: one copy, nothing else. Right only where vLLM computes
with the parameters as they were loaded, which on CPU can be seen by looking (`is_as_loaded`).

`reload` is vLLM's own `reload_weights`: layers are made anew, loaded, processed again (quantized, packed, permuted) and
copied over the old ones, so that CUDA graphs hold. Facts it rests on (vLLM 0.32), proved at run time by `probe.py`:
    - An update is ONE call over the complete stream: a fused layer split over two calls is neither old nor new.
    - Tensors of a fused layer are kept by reference until the last of its parts has arrived.
    - After a stream that broke off, half-loaded layers stay counted as half loaded: the next stream would process them
      too early. `abandon` ends that.
    - Experts are packed on CPU only while their layer has no kernel yet: it is taken away before each update.
    - A `lm_head` tied to the embedding keeps computing with the copy it packed on CPU: it is dispatched anew.

On 100M parameters in float32, one CPU thread, `copy_in` takes 1.2 times and `reload` 4.8 times a memcpy of the same
bytes.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import vllm

Stream = Iterable[tuple[str, Tensor]]


def is_as_loaded(llm: "vllm.LLM") -> bool:
    """Whether all layers compute on CPU with their parameters as they came from the checkpoint.

    A packed layer keeps its own copy in a closure; a layer of another kind (mixture of experts, convolution) has no
    plain matrix product at all. Both are answered with False, as is what this function does not know.
    """
    if llm.llm_engine.model_config.use_mla:  # derives matrices from kv_b_proj
        return False
    return all(llm.apply_model(_computes_plainly))


def copy_in(llm: "vllm.LLM", stream: Stream) -> None:
    """Overwrite the parameters one after another, fused and sharded as the model's own loader does it."""
    with torch.no_grad():
        llm.apply_model(lambda model: model.load_weights(iter(stream)))  # type: ignore[operator]


def reload(llm: "vllm.LLM", stream: Stream) -> None:
    """Load as at the start, processing included, into the memory the parameters have."""
    kept = ((name, tensor.clone()) for name, tensor in stream)
    with torch.no_grad():
        llm.apply_model(_pack_experts_anew)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": kept})
        llm.apply_model(_dispatch_head_anew)


def abandon(llm: "vllm.LLM") -> None:
    """Let vLLM forget what arrived in a `reload` that broke off; its weights are undefined until the next one."""
    with torch.no_grad():
        llm.collective_rpc(_finish_half_loaded_layers)


def _computes_plainly(model: nn.Module) -> bool:
    for layer in model.modules():
        # Names vLLM gives: `quant_method` to layers whose weights it may process, `cpu_linear` to the matrix product
        # it chose. torch's own product is a function that closes over nothing.
        if getattr(layer, "quant_method", None) is None:
            continue
        product = getattr(layer, "cpu_linear", None)
        if product is None or getattr(product, "__closure__", None) is not None:
            return False
    return True


def _finish_half_loaded_layers(worker: Any) -> None:
    """Run in vLLM's worker, whose type is not public."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    with set_current_vllm_config(worker.vllm_config):
        finalize_layerwise_reload(worker.model_runner.get_model(), worker.model_config)


def _pack_experts_anew(model: nn.Module) -> None:
    """Let mixtures of experts pack the weights that come next, as they did the first ones (CPU only)."""
    for layer in model.modules():
        # vLLM's names, of layers of its own; a layer that has its kernel leaves reloaded experts unpacked.
        method = getattr(layer, "quant_method", None)
        if method is None or getattr(method, "moe_kernel", None) is None:
            continue
        if all(parameter.device.type == "cpu" for parameter in layer.parameters()):
            method.moe_kernel = None


def _dispatch_head_anew(model: nn.Module) -> None:
    """Let a tied output layer forget the weights it packed when it was built (CPU only)."""
    # The layer's name in vLLM's models; absent in embedding models.
    head = getattr(model, "lm_head", None)
    if head is None or not hasattr(head, "cpu_linear"):
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(head, remove_weight=False)


class Source:
    """A stream that knows whether it was read to the end, and whether it was itself what failed."""

    def __init__(self, items: Iterable[tuple[str, Tensor]]) -> None:
        """Take the items; nothing is read yet."""
        self._items = iter(items)
        self.exhausted = False
        self.failed = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """The items, one by one, once."""
        try:
            # A reader that gives up closes what it yields from, and nothing were left to drain.
            for item in self._items:  # noqa: UP028
                yield item
        except Exception:
            self.failed = True
            raise
        self.exhausted = True

    def drain(self) -> None:
        """Read what is left: producing it may be a collective, in which other ranks wait for this one."""
        if not self.failed:
            for _ in self._items:
                pass
            self.exhausted = True
