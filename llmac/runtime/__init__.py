"""The distributed room: processes, devices, gradients across ranks, checkpoints, outgoing weights.

The only package that may import accelerate or DeepSpeed; nothing above it knows how many processes
there are, beyond `Runtime.sum` and its siblings. May import `core`, `errors`, torch, peft.

Read `context.py` first (what a rank is and how ranks talk), then `learner.py` (how a gradient is
made), `trained.py` (how a module is spread: whole; `zero.py` and `fully_sharded.py` in shards),
`weights.py` (how weights leave for an engine), `checkpoint.py` (what survives a kill), `phases.py`
and `liveness.py` (what is watched). To add a way to distribute: a `Trained` of your own, and a
branch in `context.py`.
"""
