"""The distributed room: processes, devices, gradients across ranks, checkpoints, outgoing weights.

The only package that may import accelerate or DeepSpeed; nothing above it knows how many processes
there are, beyond `Runtime.sum` and its siblings. May import `core`, `errors`, torch, peft.

Read `context.py` first (what a rank is and how ranks talk), then `learner.py` (how a gradient is
made), `checkpoint.py` (what survives a kill), `phases.py` (what is timed and watched), `weights.py`
(LoRA merged on the way to an engine). To add a way to distribute: `context.py` alone.
"""
