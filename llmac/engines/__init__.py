"""Who samples responses. One file per engine, behind `core.protocols.RolloutEngine`.

An engine owns its copy of the weights, reports the log-probability of every sampled token under the distribution it
was drawn from, and takes new weights live: `load_weights` gives all of them or none.

Read `hf_engine.py` first (a batched decoder over any transformers causal LM: `sampling.py` draws tokens,
`row_cache.py` holds keys and values, `attention.py` reads them), then `vllm_engine.py`, the only file of the project
that imports vllm. `manifest.py` checks a stream of weights; `probe.py` proves that updates arrive.

May import: torch, transformers, `llmac.core`, `llmac.errors`. To add an engine: implement the protocol, build it in
`build._engine`, name it in `config/schema.py`, and run `tests/engines/` over it.
"""
