"""Placement room: will a recipe fit these GPUs, and if not, what to change. Arithmetic on shapes; nothing is loaded.

Read `phases.py` first: it says what is alive in which phase, of the modules in `parts.py`; `plan.py` deals out the GPUs
and says what is too much. They ask `skeletons.py` (parameters and shapes, from the real classes without weights),
`sharding.py` (bytes a weight costs under DDP, ZeRO and FSDP2), `activations.py` (what a forward pass keeps) and
`sampling.py` (the engine's weights and its cache). `ways_out.py` looks for the smallest change that fits, `report.py`
prints. `../../docs/placement.md` has the formulas with their sources and how close they came.

To add a way to shard: a member of `Sharding` and one function in `sharding.py`. May import everything but `build`.
"""
