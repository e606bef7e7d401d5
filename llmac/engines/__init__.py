"""Who samples responses: implementations of `core.protocols.RolloutEngine`, and what they stand on.

An engine owns its copy of the weights, reports the log-probability of every sampled token under the distribution it
was drawn from, and takes new weights live: `load_weights` gives all of them or none.

Read `hf_engine.py` first (transformers in this process; `sampling.py` draws, `row_cache.py` and `attention.py` keep and
read keys and values), then `vllm_engine.py` (vLLM in this process, as `vllm_process.py` and `vllm_weights.py` tame it),
then `vllm_server.py` (client of `vllm serve`: `server_pool.py` asks, `server_session.py` updates, `vllm_launch.py`
starts them; weights go from `weight_sender.py` to `vllm_transfer.py` in the servers). `manifest.py` checks a stream of
weights, `checkpoint_form.py` brings it back to parameters, `probe.py` proves that updates arrive.

May import: torch, transformers, `llmac.{core,errors,config,metrics,models,runtime}`; vllm in its `vllm_` files only. To
add an engine: implement the protocol, build it in `build.py`, name it in `config/schema.py`, run `tests/engines/`.
"""
