"""Pre-training room: a critic, a file of rollouts, and nothing else of a run.

`file.py` says whether the one can teach the other, `rows.py` who learns what when, `report.py` how good the critic is
by then; `bench.py` builds it without a run around it. For a critic that writes: `trace_states.py` chooses states,
`teachers.py` asks what to write about them. Read `llmac/value_pretrain.py` first: the epochs are there.
Critics, models, configuration and what is below may be imported here. To add an instrument: a line in `report.py` and
its row in `docs/metrics.md`.
"""
